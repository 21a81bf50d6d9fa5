//! Fairness: no endpoint or tenant delays another. Latencies are measured before and meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use contract::{
    ObjectId,
    rpc::{self, ProcessChangeResult},
};
use serde_json::{Value, json};
use test_support::{Receiver, Reply, eventually, free_port};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{Api, DELIVERED, Stack, TEST_TIMEOUT, UPDATE, by_update, process_id};

/// A small pool of slots: a few hanging attempts would exhaust it.
const SMALL_POOL: [(&str, &str); 1] = [("MAX_IN_FLIGHT", "64")];
/// The number of updates per measurement.
const MEASURED: usize = 100;
/// While others misbehave, the 99th percentile stays within this factor of what it was before…
const FACTOR: u32 = 4;
/// …plus this much, which a busy machine with two cores may add. To wait for one hanging attempt would take its five
/// seconds.
const SLACK: Duration = Duration::from_millis(1500);

/// A project with a process, callbacks and a lead.
struct Tenant {
    api: Api,
    applied: ProcessChangeResult,
    lead_id: String,
}

impl Tenant {
    async fn new(stack: &Stack, name: &str, callbacks: Value) -> Self {
        let api = Api::create(stack.api.url.clone(), &stack.client, name).await;
        let spec =
            json!({"projectId": api.project_id, "name": "sales", "states": [{"name": "new"}], "callbacks": callbacks});
        let applied = stack.apply(spec).await;
        let lead_id = api.initiate(process_id(&applied), None).await;
        Self { api, applied, lead_id }
    }

    fn callback_id(&self) -> ObjectId {
        self.applied.process.callbacks[0].callback_id
    }

    async fn update(&self, number: usize) -> String {
        self.api.update(json!({"leadId": self.lead_id, "metadata": {"n": number}})).await
    }
}

/// From the POST of an update to the receipt of its webhook: the median and the 99th percentile.
#[derive(Debug, Clone, Copy)]
struct Latency {
    p50: Duration,
    p99: Duration,
}

/// Measures a tenant with one callback, whose receiver it shares with no other; `between` runs before each update.
async fn measure(tenant: &Tenant, receiver: &Receiver, mut between: impl AsyncFnMut(usize)) -> Latency {
    let mut latencies = Vec::new();
    for number in 0..MEASURED {
        between(number).await;
        let before = receiver.requests().len();
        let begun = Instant::now();
        tenant.update(number).await;
        let requests = receiver.wait_for(TEST_TIMEOUT, |requests| requests.len() > before).await;
        latencies.push(requests[before].received_at.duration_since(begun));
    }
    latencies.sort_unstable();
    Latency { p50: latencies[MEASURED / 2], p99: latencies[MEASURED * 99 / 100] }
}

fn assert_flat(what: &str, before: Latency, during: Latency) {
    println!("{what}: p50 {:?} -> {:?}, p99 {:?} -> {:?}", before.p50, during.p50, before.p99, during.p99);
    assert!(during.p99 <= before.p99 * FACTOR + SLACK, "{what}: {before:?} became {during:?}");
}

/// A server that accepts connections and never answers.
async fn silent() -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/hook", listener.local_addr().expect("an address"));
    let server = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    (url, AbortOnDropHandle::new(server))
}

#[tokio::test]
async fn an_endpoint_that_hangs_delays_no_other_tenant() {
    let stack = Stack::start_with(&SMALL_POOL).await;
    let (url, _silent) = silent().await;
    let healthy = Tenant::new(&stack, "healthy", json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let hanging = json!([{"name": "hanging", "url": url, "timeoutSeconds": 5, "maxInFlight": 1000}]);
    let hanging = Tenant::new(&stack, "hanging", hanging).await;
    let before = measure(&healthy, &stack.receiver, async |_| {}).await;
    let during = measure(&healthy, &stack.receiver, async |number| {
        for more in 0..5 {
            hanging.update(number * 5 + more).await;
        }
    })
    .await;
    assert_flat("one endpoint hangs", before, during);
}

#[tokio::test]
async fn a_callback_that_hangs_delays_no_other_callback_of_its_process() {
    let stack = Stack::start().await;
    stack.receiver.on("/hanging", [Reply::hang()]);
    let callbacks = json!([
        {"name": "hanging", "url": stack.receiver.url("/hanging"), "timeoutSeconds": 30},
        {"name": "healthy", "url": stack.receiver.url("/healthy")},
    ]);
    let tenant = Tenant::new(&stack, "tenant", callbacks).await;

    let begun = Instant::now();
    for number in 0..300 {
        tenant.update(number).await;
    }

    stack.receiver.wait_for_requests("/healthy", 300, TEST_TIMEOUT).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "it waited for the hanging one: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_tenant_that_floods_delays_no_other() {
    let stack = Stack::start_with(&SMALL_POOL).await;
    let (slow, receiver) = (Receiver::start().await, &stack.receiver);
    slow.on("/slow", [Reply::status(200).after(Duration::from_millis(200))]);
    let healthy = Tenant::new(&stack, "healthy", json!([{"name": "crm", "url": receiver.url("/crm")}])).await;
    let callbacks = json!([{"name": "slow", "url": slow.url("/slow")}, {"name": "slower", "url": slow.url("/slow")}]);
    let flooding = Tenant::new(&stack, "flooding", callbacks).await;
    let before = measure(&healthy, receiver, async |_| {}).await;
    let mut floods = JoinSet::new();
    for _ in 0..8 {
        let (api, lead_id) = (flooding.api.clone(), flooding.lead_id.clone());
        floods.spawn(async move {
            loop {
                api.update(json!({"leadId": lead_id, "name": "x"})).await;
            }
        });
    }
    let during = measure(&healthy, receiver, async |_| {}).await;
    floods.shutdown().await;
    println!("the flood: {} webhooks accepted", slow.requests().len());
    assert_flat("one tenant floods", before, during);
}

#[tokio::test]
async fn a_tenant_with_large_leads_is_slowed_down_and_no_other() {
    let stack = Stack::start_with(&[("GATEWAY_WORK_RATE", "16")]).await;
    let (heavy_receiver, receiver) = (Receiver::start().await, &stack.receiver);
    let healthy = Tenant::new(&stack, "healthy", json!([{"name": "crm", "url": receiver.url("/crm")}])).await;
    let heavy = Tenant::new(&stack, "heavy", json!([{"name": "crm", "url": heavy_receiver.url("/crm")}])).await;
    for part in 0..4 {
        let blob = json!({format!("part{part}"): "x".repeat(250_000)});
        heavy.api.update_and_wait(json!({"leadId": heavy.lead_id, "metadata": blob})).await;
    }
    let before = measure(&healthy, receiver, async |_| {}).await;
    let (mut flood, refused) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for _ in 0..16 {
        let (api, lead_id, refused) = (heavy.api.clone(), heavy.lead_id.clone(), refused.clone());
        flood.spawn(async move {
            loop {
                let (status, answer) = api.post(UPDATE, &json!({"leadId": lead_id, "name": "x"})).await;
                assert!([200, 429].contains(&status), "{answer}");
                if status == 429 {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        });
    }
    let during = measure(&healthy, receiver, async |_| {}).await;
    flood.shutdown().await;
    // The healthy one was never refused; how much later its webhooks come depends on the machine.
    println!("large leads: p50 {:?} -> {:?}, p99 {:?} -> {:?}", before.p50, during.p50, before.p99, during.p99);
    assert!(refused.load(Ordering::Relaxed) > 0, "nothing was refused");
}

#[tokio::test]
async fn a_process_with_a_hundred_dead_callbacks_delays_no_other_tenant() {
    let stack = Stack::start_with(&SMALL_POOL).await;
    let failing = Receiver::start().await;
    failing.on("/500", [500]);
    let (hanging, _silent) = silent().await;
    let refusing = format!("http://127.0.0.1:{}/", free_port());
    let urls = [refusing, hanging, failing.url("/500")];
    let dead = (0..100)
        .map(|number| json!({"name": format!("dead {number}"), "url": urls[number % urls.len()], "timeoutSeconds": 5}));
    let healthy = Tenant::new(&stack, "healthy", json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let dying = Tenant::new(&stack, "dying", Value::from_iter(dead)).await;
    let before = measure(&healthy, &stack.receiver, async |_| {}).await;
    let during = measure(&healthy, &stack.receiver, async |number| {
        dying.update(number).await;
    })
    .await;
    println!("the dead: {} requests answered 500", failing.requests().len());
    assert_flat("a hundred callbacks are dead", before, during);
}

#[tokio::test]
async fn waiting_for_a_dead_endpoint_costs_no_attempt() {
    // Without a breaker, an outage of a second would exhaust everything.
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms")]).await;
    stack.receiver.on("/dead", [500]);
    let callbacks = json!([
        {"name": "dead", "url": stack.receiver.url("/dead"), "maxInFlight": 4},
        {"name": "healthy", "url": stack.receiver.url("/healthy")},
    ]);
    let tenant = Tenant::new(&stack, "tenant", callbacks).await;
    for number in 0..100 {
        tenant.update(number).await;
    }
    stack.receiver.wait_for_requests("/healthy", 100, TEST_TIMEOUT).await;
    // Two more probes.
    let before = stack.receiver.requests_to("/dead").len();
    let requests = stack.receiver.wait_for_requests("/dead", before + 2, TEST_TIMEOUT).await;
    let pause = requests[before + 1].received_at.duration_since(requests[before].received_at);
    assert!(pause > Duration::from_millis(400), "one probe at a time: {pause:?}");
    assert!(requests.len() < 30, "{} requests to a dead endpoint", requests.len());
    stack.receiver.on("/dead", [200]);
    // When it works again, the deliveries that waited succeed in their first attempts.
    let exhausted = stack.count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted'").await;
    let delivered = DELIVERED;
    stack.wait_for_count_within(TEST_TIMEOUT * 2, delivered, 200 - exhausted).await;
    assert!(exhausted <= 5, "{exhausted} exhausted");
    let once = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered' AND attempts = 1";
    assert!(stack.count(once).await >= 180, "waiting costs no attempt");
}

#[tokio::test]
async fn a_callback_with_a_rate_limit_is_paced_without_loss_and_delays_no_other() {
    const RATE: u32 = 2;
    const UPDATES: u32 = 12;
    let stack = Stack::start().await;
    let callbacks = json!([
        {"name": "paced", "url": stack.receiver.url("/paced"), "maxPerSecond": RATE},
        {"name": "free", "url": stack.receiver.url("/free")},
    ]);
    let tenant = Tenant::new(&stack, "tenant", callbacks).await;
    let begun = Instant::now();
    for number in 0..UPDATES {
        tenant.update(number as usize).await;
    }
    stack.receiver.wait_for_requests("/free", UPDATES as usize, TEST_TIMEOUT).await;
    let free = begun.elapsed();
    let requests = stack.receiver.wait_for_requests("/paced", UPDATES as usize, TEST_TIMEOUT).await;
    println!("at {RATE}/s: {UPDATES} in {:?}; the other had all after {free:?}", begun.elapsed());
    assert_eq!(by_update(&requests).len(), UPDATES as usize, "each once");
    // In every span no more than the rate allows, plus one saved up and one that was late.
    for (from, first) in requests.iter().enumerate() {
        for (count, last) in requests[from..].iter().enumerate() {
            let span = last.received_at.duration_since(first.received_at).as_secs_f64();
            let most = f64::from(RATE) * span + 2.0;
            assert!(count as f64 + 1.0 <= most + 1e-3, "{} in {span} s", count + 1);
        }
    }
    // Nor is it much slower than the rate.
    assert!(begun.elapsed() < Duration::from_secs_f64(f64::from(UPDATES) / f64::from(RATE)) + TEST_TIMEOUT / 6);
}

#[tokio::test]
async fn a_callback_that_only_fails_is_disabled_until_it_is_enabled() {
    let schedule = ["0s"].into_iter().chain(std::iter::repeat_n("300ms", 60)).collect::<Vec<_>>().join(",");
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", &schedule), ("DISABLE_AFTER", "4s")]).await;
    stack.receiver.on("/crm", [500]);
    let tenant = Tenant::new(&stack, "tenant", json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let update_id = tenant.update(1).await;
    let count = "SELECT count(*) FROM webhooks.callback_failures";
    stack.wait_for_count(count, 1).await;
    let since = "SELECT (extract(epoch FROM failing_since) * 1000)::bigint FROM webhooks.callback_failures";
    let since = stack.count(since).await;
    // The start of the failures survives the notifier.
    stack.notifier.kill9().await;
    stack.notifier.restart().await;
    // An attempt that the crash interrupts waits until its lease of 60 s ends.
    let status = eventually(TEST_TIMEOUT * 2, "the callback is disabled", async || {
        let query = rpc::ListCallbacks { project_id: tenant.api.project_id };
        let list = service_kit::rpc::request(&stack.client, &query).await;
        let status = list.map_err(|e| e.to_string())?.pop().ok_or("no callback")?;
        if status.state == rpc::CallbackState::Disabled { Ok(status) } else { Err(format!("{status:?}")) }
    })
    .await;
    assert_eq!(status.failing_since.map(contract::Timestamp::millis), Some(since));
    let reason = status.reason.unwrap_or_default();
    assert!(reason.contains("nothing but failures since") && reason.contains("500"), "{reason}");
    let subject =
        format!("webhooks.evt.{}.{}.callback.disabled", tenant.api.project_id, status.process_id.expect("an id"));
    let event = stack.wait_for_webhook_event(&subject).await;
    assert!(event["reason"].as_str().is_some_and(|reason| reason.contains("nothing but failures")), "{event}");

    // The pending delivery waits; the endpoint is sent nothing.
    let sent = stack.receiver.requests_to("/crm").len();
    let timeline = tenant.api.outcome(&update_id).await;
    assert_eq!(timeline["deliveries"][0]["status"], "pending", "{timeline}");
    stack.receiver.on("/crm", [200]);
    let enable = rpc::EnableCallback { callback_id: tenant.callback_id() };
    assert_eq!(stack.receiver.requests_to("/crm").len(), sent);
    let enabled = stack.call(&enable).await;
    assert!(enabled.was_disabled);
    stack.wait_for_count(DELIVERED, 1).await;
    stack.wait_for_count(count, 0).await;
}

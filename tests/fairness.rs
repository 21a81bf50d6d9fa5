//! Fairness between the callbacks of one process: no callback delays another, and waiting for an endpoint uses no
//! attempt. `hostile` tests fairness between tenants.

use std::time::{Duration, Instant};

use contract::{ObjectId, rpc};
use serde_json::json;
use test_support::{Reply, eventually};

use crate::support::{DELIVERED, Stack, TEST_TIMEOUT, Tenant, by_update};

impl Tenant {
    fn callback_id(&self) -> ObjectId {
        self.applied.process.callbacks[0].callback_id
    }

    async fn update(&self, number: usize) -> String {
        self.api.update(json!({"leadId": self.lead_id, "metadata": {"n": number}})).await
    }
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

    for number in 0..300 {
        tenant.update(number).await;
    }

    // If these deliveries waited for attempts that hang for 30 s, four at a time, they would take an hour.
    stack.receiver.wait_for_requests("/healthy", 300, TEST_TIMEOUT).await;
}

#[tokio::test]
async fn large_events_for_endpoints_that_hang_do_not_stop_the_events_of_another_project() {
    const CALLBACKS: usize = 80;
    let stack = Stack::start().await;
    stack.receiver.on("/hanging", [Reply::hang()]);
    let hanging = |number: usize| {
        let filter = json!([{"field": "metadata.n", "equals": number.to_string()}]);
        json!({"name": format!("hanging-{number}"), "url": stack.receiver.url("/hanging"), "timeoutSeconds": 30, "filter": filter})
    };
    let busy = Tenant::new(&stack, "busy", (0..CALLBACKS).map(hanging).collect()).await;
    let other = Tenant::new(&stack, "other", json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let text = "x".repeat(60_000);
    for number in 0..6 * CALLBACKS {
        busy.api.update(json!({"leadId": busy.lead_id, "metadata": {"n": number % CALLBACKS, "text": text}})).await;
    }

    let begun = Instant::now();
    other.update(1).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT * 3).await;

    let took = begun.elapsed();
    println!("a webhook beside {} large events: {took:?}", 6 * CALLBACKS);
    assert!(took < Duration::from_secs(5), "the webhook of the other project took {took:?}");
}

#[tokio::test]
async fn waiting_for_a_dead_endpoint_costs_no_attempt() {
    // Without a breaker, an outage of a second would exhaust all deliveries.
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
    // Waits for two more probes.
    let before = stack.receiver.requests_to("/dead").len();
    let requests = stack.receiver.wait_for_requests("/dead", before + 2, TEST_TIMEOUT).await;
    let pause = requests[before + 1].received_at.duration_since(requests[before].received_at);
    assert!(pause > Duration::from_millis(400), "one probe at a time: {pause:?}");
    assert!(requests.len() < 30, "{} requests to a dead endpoint", requests.len());
    stack.receiver.on("/dead", [200]);
    // When the endpoint works again, the waiting deliveries succeed at their first attempts.
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
    // In every time span the endpoint gets at most as many requests as the rate allows, plus one saved token and one
    // late request.
    for (from, first) in requests.iter().enumerate() {
        for (count, last) in requests[from..].iter().enumerate() {
            let span = last.received_at.duration_since(first.received_at).as_secs_f64();
            let most = f64::from(RATE) * span + 2.0;
            assert!(count as f64 + 1.0 <= most + 1e-3, "{} in {span} s", count + 1);
        }
    }
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
    // The start of the failures survives a crash of the notifier.
    stack.notifier.kill9().await;
    stack.notifier.restart().await;
    // A delivery whose attempt the crash interrupts waits until its lease of 60 s ends.
    let status = eventually(TEST_TIMEOUT * 2, "the callback is disabled", async || {
        let query = rpc::ListCallbacks { project_id: tenant.api.project_id, details: false };
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

    // The pending delivery waits, and the endpoint receives no request.
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

//! Backfill: past events are delivered to a new callback, each once, with the same body as at the time of the event.

use std::{
    env,
    time::{Duration, Instant},
};

use contract::{ObjectId, rpc::ProcessChangeResult};
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use test_support::Request;

use crate::support::{DELIVERED, Stack, TEST_TIMEOUT, assert_ok, assert_refused, by_update, numbers, process_id};

/// Makes 20 updates of two leads that are delivered to `/crm`. Returns the process, and the time before the updates.
async fn with_past_updates(stack: &Stack) -> (ProcessChangeResult, String) {
    let applied = stack.process_calling(&["crm"]).await;
    let since = service_kit::clock::now().minus(Duration::from_secs(1)).to_iso();
    let leads =
        [stack.api.initiate(process_id(&applied), None).await, stack.api.initiate(process_id(&applied), None).await];
    for number in 0..20 {
        let campaign = if number % 4 == 0 { "spring" } else { "fall" };
        let metadata = json!({"n": number, "campaign": campaign});
        stack.api.update(json!({"leadId": leads[number % 2], "metadata": metadata})).await;
    }
    stack.wait_for_count(DELIVERED, 20).await;
    // A backfill delays deliveries of events of the last minute.
    stack.sql("UPDATE lead_state.lead_updates SET applied_at = applied_at - interval '5 minutes'").await;
    (applied, since)
}

/// Adds callbacks to the process, and returns the id of the last one.
async fn add(stack: &Stack, callbacks: &[Value]) -> ObjectId {
    let crm = json!({"name": "crm", "url": stack.receiver.url("/crm")});
    let applied = stack.process([&[crm], callbacks].concat().into()).await;
    applied.process.callbacks.last().expect("a callback").callback_id
}

fn path(applied: &ProcessChangeResult, callback_id: ObjectId) -> String {
    format!("/api/v1/processes/{}/callbacks/{callback_id}/backfill", process_id(applied))
}

#[tokio::test]
async fn a_repeated_backfill_delivers_each_past_event_once() {
    let stack = Stack::start().await;
    let (applied, since) = with_past_updates(&stack).await;
    let new = add(&stack, &[json!({"name": "new", "url": stack.receiver.url("/new")})]).await;
    let path = path(&applied, new);

    let dry = assert_ok(stack.api.post(&path, &json!({"since": since, "dryRun": true})).await);
    assert_eq!(dry["data"], json!({"deliveries": 20, "dryRun": true, "until": null, "next": null}));
    let leadctl = ["callback", "backfill", &new.to_string(), "--since", &since, "--dry-run", "--json"];
    assert_eq!(stack.leadctl_of_project(&leadctl).await.assert_ok().json()["deliveries"], 20);
    assert_eq!(stack.receiver.requests_to("/new").len(), 0);

    let body = json!({"since": since, "perSecond": 10});
    let done = assert_ok(stack.api.post(&path, &body).await);
    assert_eq!((&done["data"]["deliveries"], &done["data"]["next"]), (&json!(20), &Value::Null), "{done}");
    let again = assert_ok(stack.api.post(&path, &body).await);
    assert_eq!(again["data"]["deliveries"], 0, "{again}");

    let requests = stack.receiver.wait_for_requests("/new", 20, TEST_TIMEOUT).await;
    let took = requests[19].received_at.duration_since(requests[0].received_at);
    assert!(took >= Duration::from_millis(1200), "ten a second, less a poll of half a second: {took:?}");
    stack.wait_for_clean_audit().await;
    let again = assert_ok(stack.api.post(&path, &body).await);
    assert_eq!(again["data"]["deliveries"], 0, "{again}");
    let requests = stack.receiver.requests_to("/new");
    let (of_new, of_crm) = (by_update(&requests), by_update(&stack.receiver.requests_to("/crm")));
    assert_eq!((requests.len(), of_new.len()), (20, 20));
    assert!(of_new.keys().all(|update| of_crm.contains_key(update)));
}

#[tokio::test]
async fn a_backfill_obeys_events_filter_and_order_and_waits_for_a_paused_callback() {
    let stack = Stack::start().await;
    let (applied, since) = with_past_updates(&stack).await;
    let filter = json!([{"field": "metadata.campaign", "equals": "spring"}]);
    let ordered =
        json!({"name": "ordered", "url": stack.receiver.url("/ordered"), "ordering": "lead", "filter": filter});
    let failed = json!({"name": "failed", "url": stack.receiver.url("/failed"), "events": ["update.failed"]});
    let ordered = add(&stack, &[failed, ordered]).await;
    let pause = path(&applied, ordered).replace("/backfill", "/pause");
    assert_ok(stack.api.post(&pause, &json!({})).await);

    let done = assert_ok(stack.api.post(&path(&applied, ordered), &json!({"since": since})).await);

    assert_eq!(done["data"]["deliveries"], 5, "{done}");
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'", 5).await;
    assert_eq!(stack.receiver.requests_to("/ordered").len(), 0);
    assert_ok(stack.api.post(&pause.replace("/pause", "/resume"), &json!({})).await);
    stack.wait_for_clean_audit().await;
    let numbers = numbers(&stack.receiver.requests_to("/ordered"));
    assert_eq!(numbers.values().collect::<Vec<_>>(), [&[0, 4, 8, 12, 16]]);
    let unknown = ObjectId::from_bytes([1; 12]);
    let refused = stack.api.post(&path(&applied, unknown), &json!({"since": since})).await;
    assert_refused(refused, 404, "callback_not_found");
}

/// The shortest time for which the callbacks are paused.
const PAUSE: Duration = Duration::from_secs(60);
/// Long enough for a hundred thousand deliveries without optimization.
const DEADLINE: Duration = Duration::from_secs(1200);
/// The number of lines of a bulk request.
const LINES: usize = 5000;

/// Asserts that each event was delivered once.
fn assert_each_once(requests: &[Request], events: usize) {
    assert_eq!((requests.len(), by_update(requests).len()), (events, events));
}

/// `just backfill` runs this test; docs/results/backfill.md has the figures. `EVENTS` sets another number of events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: just backfill"]
async fn a_hundred_thousand_events_wait_for_a_paused_callback_and_reach_a_new_one() {
    let events: usize = env::var("EVENTS").map_or(100_000, |text| text.parse().expect("EVENTS"));
    let stack = Stack::start().await;
    let callback = |name: &str, ordering: &str| json!({"name": name, "url": stack.receiver.url(&format!("/{name}")), "ordering": ordering});
    let callbacks = [callback("crm", "none"), callback("ordered", "lead")];
    let applied = stack.process(callbacks.to_vec().into()).await;
    let since = service_kit::clock::now().minus(Duration::from_secs(1)).to_iso();
    let leads = join_all((0..20).map(|_| stack.api.initiate(process_id(&applied), None))).await;
    let paths = [0, 1].map(|place: usize| path(&applied, applied.process.callbacks[place].callback_id));
    for path in &paths {
        assert_ok(stack.api.post(&path.replace("/backfill", "/pause"), &json!({})).await);
    }

    let begun = Instant::now();
    let update = |lead: &str, number: usize| json!({"leadId": lead, "metadata": {"n": number}});
    let accepted: Vec<usize> = join_all(leads.iter().map(async |lead| {
        let mut number = 0;
        while begun.elapsed() < PAUSE {
            stack.api.update_until_accepted(&update(lead, number)).await;
            number += 1;
        }
        number
    }))
    .await;
    let under_load: usize = accepted.iter().sum();
    let rest: Vec<_> = (under_load..events).map(|n| update(&leads[n % leads.len()], n)).collect();
    for lines in rest.chunks(LINES) {
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let request = stack.api.request(Method::POST, "/api/v1/leads/update/bulk").body(body);
        let answer = request.header("content-type", "application/x-ndjson").send().await.expect("an answer");
        assert!(!answer.text().await.expect("lines").contains("\"success\":false"));
    }
    let events = events.max(under_load);
    let held = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 0";
    stack.wait_for_count_within(DEADLINE, held, 2 * events as i64).await;
    assert_eq!(stack.receiver.requests().len(), 0);

    let resumed = Instant::now();
    for path in &paths {
        assert_ok(stack.api.post(&path.replace("/backfill", "/resume"), &json!({})).await);
    }
    stack.wait_for_count_within(DEADLINE, DELIVERED, 2 * events as i64).await;
    let resuming = resumed.elapsed();
    assert_each_once(&stack.receiver.requests_to("/crm"), events);
    let ordered = stack.receiver.requests_to("/ordered");
    assert_each_once(&ordered, events);
    assert!(numbers(&ordered).values().all(|numbers| numbers.is_sorted()), "the order of a lead");

    let added = stack.process([&callbacks[..], &[callback("new", "none")]].concat().into()).await;
    let new = path(&added, added.process.callbacks[2].callback_id);
    let count = assert_ok(stack.api.post(&new, &json!({"since": since, "dryRun": true})).await);
    let filling = Instant::now();
    let (mut body, mut made) = (json!({"since": since, "perSecond": 1000}), 0);
    loop {
        let done = assert_ok(stack.api.post(&new, &body).await);
        made += done["data"]["deliveries"].as_u64().expect("a number");
        body["cursor"] = done["data"]["next"].clone();
        if body["cursor"].is_null() {
            break;
        }
    }
    let making = filling.elapsed();
    stack.wait_for_count_within(DEADLINE, DELIVERED, 3 * events as i64).await;
    assert_each_once(&stack.receiver.requests_to("/new"), events);
    assert_eq!(made, events as u64);
    println!(
        "{under_load} events of a minute under load, {events} in all, two callbacks paused: resumed and delivered in \
         {resuming:.1?}; a new callback's deliveries made in {making:.1?} (counted first: {}), delivered in {:.1?}",
        count["data"],
        filling.elapsed()
    );
    stack.wait_for_clean_audit().await;
}

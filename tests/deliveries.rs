//! Deliveries: retries, exhaustion, disabled callbacks, and endpoints that hold up nobody but themselves.

use std::time::{Duration, Instant};

use contract::{ObjectId, rpc};
use serde_json::{Value, json};
use test_support::{Reply, eventually};

use crate::{
    audit::settled,
    recover::recover,
    stack::{SOON, Stack},
};

/// The deliveries in an update's story.
async fn deliveries(stack: &Stack, update_id: &str) -> Vec<Value> {
    stack.api.outcome(update_id).await["deliveries"].as_array().cloned().unwrap_or_default()
}

/// Waits until the only delivery of an update has this status.
async fn wait_for_status(stack: &Stack, update_id: &str, status: &str) -> Value {
    eventually(SOON, status, async || {
        let deliveries = deliveries(stack, update_id).await;
        match deliveries.first() {
            Some(delivery) if delivery["status"] == status => Ok(delivery.clone()),
            _ => Err(json!(deliveries).to_string()),
        }
    })
    .await
}

#[tokio::test]
async fn a_failing_endpoint_is_tried_again_under_one_webhook_id() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms,100ms")]).await;
    stack.receiver.on(
        "/crm",
        [
            Reply::status(500).body("no"),
            Reply::redirect(&stack.receiver.url("/elsewhere")),
            Reply::drop_connection(),
            Reply::status(204),
        ],
    );
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 4, SOON).await;
    assert!(requests.iter().all(|request| request.header("webhook-id") == Some(update_id.as_str())));
    assert!(requests.iter().all(|request| request.body == requests[0].body));
    assert!(stack.receiver.requests_to("/elsewhere").is_empty(), "redirects are not followed");
    let delivery = wait_for_status(&stack, &update_id, "delivered").await;
    let codes: Vec<_> =
        delivery["attempts"].as_array().expect("a list").iter().map(|a| a["statusCode"].clone()).collect();
    assert_eq!(
        codes,
        [json!(500), json!(302), Value::Null, json!(204)].map(|code| {
            // Whatever status the redirect had.
            if code == json!(302) { delivery["attempts"][1]["statusCode"].clone() } else { code }
        })
    );
    assert_eq!(delivery["attempts"][0]["response"], "no");
}

#[tokio::test]
async fn a_retry_that_takes_long_is_not_begun_again_beside_it() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms")]).await;
    // Longer than the retries look away.
    let slow = Reply::status(200).after(Duration::from_secs(4));
    stack.receiver.on("/crm", [Reply::status(500), slow]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    wait_for_status(&stack, &update_id, "delivered").await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 2);
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    stack.receiver.on("/crm", [Reply::status(503).retry_after(2), Reply::status(200)]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    let pause = requests[1].received_at.duration_since(requests[0].received_at);
    assert!(pause >= Duration::from_secs(2), "{pause:?}");
}

#[tokio::test]
async fn what_nobody_takes_is_exhausted_visibly() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms,50ms")]).await;
    stack.receiver.on("/crm", [500]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    let delivery = wait_for_status(&stack, &update_id, "exhausted").await;
    assert_eq!(delivery["attempts"].as_array().map(Vec::len), Some(3));
    let subject = format!("webhooks.evt.{}.{process_id}.exhausted", stack.api.project_id);
    let event = webhook_event(&stack, &subject).await;
    assert_eq!(
        (&event["type"], &event["updateId"], &event["attempts"]),
        (&json!("exhausted"), &json!(update_id), &json!(3))
    );
}

#[tokio::test]
async fn gone_disables_the_callback_until_it_is_enabled() {
    let stack = Stack::start().await;
    stack.receiver.on("/crm", [410, 200]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(process_id, None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    wait_for_status(&stack, &update_id, "exhausted").await;
    let subject = format!("webhooks.evt.{}.{process_id}.callback.disabled", stack.api.project_id);
    assert_eq!(webhook_event(&stack, &subject).await["callbackId"], json!(callback_id));

    // What comes now is not sent, and not forgotten either.
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "y"})).await;
    wait_for_status(&stack, &update_id, "exhausted").await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 1);

    let enabled: rpc::EnableResult = stack.call(rpc::CALLBACK_ENABLE, &rpc::EnableCallback { callback_id }).await;
    assert!(enabled.was_disabled);
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "z"})).await;
    wait_for_status(&stack, &update_id, "delivered").await;
}

#[tokio::test]
async fn an_endpoint_that_hangs_holds_up_no_other() {
    let stack = Stack::start().await;
    stack.receiver.on("/hanging", [Reply::hang()]);
    let applied = stack
        .process(json!([
            {"name": "hanging", "url": stack.receiver.url("/hanging"), "timeoutSeconds": 30},
            {"name": "healthy", "url": stack.receiver.url("/healthy")},
        ]))
        .await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;
    let begun = Instant::now();
    for number in 0..300 {
        stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }
    stack.receiver.wait_for_requests("/healthy", 300, SOON).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "waited for the hanging one: {:?}", begun.elapsed());
}

#[tokio::test]
async fn events_survive_the_notifiers_death() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,200ms,200ms,200ms,200ms,200ms,200ms,200ms")]).await;
    stack.receiver.on("/flapping", [500, 500, 200]);
    // So that some are under way whenever it dies.
    stack.receiver.on("/steady", [Reply::status(200).after(Duration::from_millis(300))]);
    let applied = stack
        .process(json!([
            {"name": "steady", "url": stack.receiver.url("/steady")},
            {"name": "flapping", "url": stack.receiver.url("/flapping")},
        ]))
        .await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let mut updates = Vec::new();
    for number in 0..200 {
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await);
        if number % 60 == 59 {
            let last = updates.last().expect("an update");
            eventually(SOON, "the last one is on its way", async || {
                stack.receiver.requests_to("/steady").iter().any(|request| request.json()["updateId"] == json!(last))
            })
            .await;
            stack.notifier.kill9().await;
            stack.notifier.restart().await;
        }
    }
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 400, SOON * 3).await;
    for path in ["/steady", "/flapping"] {
        let told = crate::stack::by_update(&stack.receiver.requests_to(path));
        assert!(updates.iter().all(|update| told.contains_key(update)), "{path}");
        assert_eq!(told.len(), updates.len(), "{path}");
    }
}

#[tokio::test]
async fn a_consumer_that_is_lost_does_not_make_anything_told_again() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    for number in 0..20 {
        stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }
    let delivered = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'";
    stack.wait_for_count(delivered, 20, SOON).await;
    let js = service_kit::nats::jetstream(&stack.client);
    let events = js.get_stream(contract::streams::LEAD_EVENTS).await.expect("the events");
    events.delete_consumer(contract::streams::NOTIFIER_CONSUMER).await.expect("deleted");
    stack.api.update(json!({"leadId": lead_id, "name": "last"})).await;
    stack.wait_for_count(delivered, 21, SOON).await;
    // The last event came behind all the others.
    assert_eq!(stack.receiver.requests_to("/crm").len(), 21);
}

/// What the story tells of an update's delivery to a callback: the number and the answer of each attempt.
async fn attempts(stack: &Stack, update_id: &str, callback_id: ObjectId) -> Vec<(u64, u64)> {
    let deliveries = deliveries(stack, update_id).await;
    let delivery = deliveries.iter().find(|delivery| delivery["callbackId"] == json!(callback_id)).expect("a delivery");
    let attempts = delivery["attempts"].as_array().expect("a list").iter();
    attempts.map(|a| (a["number"].as_u64().expect("a number"), a["statusCode"].as_u64().expect("an answer"))).collect()
}

const DELIVERED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'";
/// First attempts that stand in the delivery's row, and attempts that have a row each.
const ROWS: [&str; 2] =
    ["SELECT count(first_started_at) FROM webhooks.deliveries", "SELECT count(*) FROM webhooks.attempts"];

async fn rows(stack: &Stack) -> [i64; 2] {
    [stack.count(ROWS[0]).await, stack.count(ROWS[1]).await]
}

#[tokio::test]
async fn what_is_taken_at_once_is_one_row() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms")]).await;
    stack.receiver.on("/flaky", [Reply::status(500).body("no"), Reply::status(200)]);
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm")},
            // Recorded before it is attempted.
            {"name": "ordered", "url": stack.receiver.url("/ordered"), "ordering": "lead"},
            {"name": "flaky", "url": stack.receiver.url("/flaky")},
        ]))
        .await;
    let [crm, ordered, flaky] = [0, 1, 2].map(|place: usize| applied.process.callbacks[place].callback_id);
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.wait_for_count(DELIVERED, 3, SOON).await;
    assert_eq!(rows(&stack).await, [2, 2]);
    assert_eq!(attempts(&stack, &update_id, crm).await, [(1, 200)]);
    assert_eq!(attempts(&stack, &update_id, ordered).await, [(1, 200)]);
    assert_eq!(attempts(&stack, &update_id, flaky).await, [(1, 500), (2, 200)]);
    let story = stack.api.outcome(&update_id).await;
    for delivery in story["deliveries"].as_array().expect("a list") {
        let attempt = &delivery["attempts"][0];
        assert!(attempt["startedAt"].as_str() >= story["appliedAt"].as_str(), "{story}");
        assert!(attempt["durationMs"].as_u64().is_some_and(|ms| ms < 10_000), "{story}");
        let failed = delivery["callbackId"] == json!(flaky);
        assert_eq!((attempt["error"].is_string(), attempt["response"].is_string()), (failed, failed), "{story}");
    }

    // Announced again: what was told of it stays, and the attempts go on behind it.
    let (well, said) = recover(&stack, &["reannounce", "--since", "1h", "--yes"]).await;
    assert!(well, "{said}");
    stack.wait_for_count(ROWS[1], 4, SOON).await;
    // And made again.
    let path = format!("/api/v1/deliveries/{update_id}-{crm}/redeliver");
    assert_eq!(stack.api.post(&path, &json!({})).await.0, 200);
    stack.wait_for_count(ROWS[1], 5, SOON).await;
    assert_eq!(rows(&stack).await, [2, 5]);
    assert_eq!(attempts(&stack, &update_id, crm).await, [(1, 200), (2, 200), (3, 200)]);
    assert_eq!(attempts(&stack, &update_id, flaky).await, [(1, 500), (2, 200), (3, 200)]);
    let first = &deliveries(&stack, &update_id).await[0]["attempts"][0];
    assert_eq!(first, &story["deliveries"][0]["attempts"][0]);
    settled(&stack).await;
}

#[tokio::test]
async fn what_was_recorded_and_not_attempted_is_one_row_when_it_is_taken() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/crm", [500, 200]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let refused = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    wait_for_status(&stack, &refused, "exhausted").await;
    let untried = stack.api.update(json!({"leadId": lead_id, "name": "y"})).await;
    wait_for_status(&stack, &untried, "delivered").await;
    assert_eq!(rows(&stack).await, [1, 1]);
    // As what comes while its callback is disabled.
    let as_disabled = "
        UPDATE webhooks.deliveries SET status = 'exhausted', attempts = 0, payload = '{}', first_started_at = NULL,
            first_duration_ms = NULL, first_status_code = NULL
        WHERE status = 'delivered'";
    sqlx::query(as_disabled).execute(&stack.pool).await.expect("a row without an attempt");

    let (well, said) = recover(&stack, &["reannounce", "--since", "1h", "--yes"]).await;
    assert!(well, "{said}");
    stack.wait_for_count(DELIVERED, 2, SOON).await;
    assert_eq!(rows(&stack).await, [1, 2]);
    assert_eq!(attempts(&stack, &refused, callback_id).await, [(1, 500), (2, 200)]);
    assert_eq!(attempts(&stack, &untried, callback_id).await, [(1, 200)]);
    settled(&stack).await;
}

/// As versions before recorded it, and as those that still run beside this one do.
#[tokio::test]
async fn a_first_attempt_with_a_row_of_its_own_is_told_too() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    let story = wait_for_status(&stack, &update_id, "delivered").await;
    let as_before = "
        INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt;
        UPDATE webhooks.deliveries SET first_started_at = NULL, first_duration_ms = NULL, first_status_code = NULL";
    sqlx::raw_sql(as_before).execute(&stack.pool).await.expect("rows as before");
    assert_eq!(deliveries(&stack, &update_id).await, [story]);
    let path = format!("/api/v1/deliveries/{update_id}-{callback_id}/redeliver");
    assert_eq!(stack.api.post(&path, &json!({})).await.0, 200);
    stack.wait_for_count(ROWS[1], 2, SOON).await;
    assert_eq!(rows(&stack).await, [0, 2]);
    assert_eq!(attempts(&stack, &update_id, callback_id).await, [(1, 200), (2, 200)]);
    settled(&stack).await;
}

/// Waits for an event on a subject of the webhook events.
pub(crate) async fn webhook_event(stack: &Stack, subject: &str) -> Value {
    let js = service_kit::nats::jetstream(&stack.client);
    let stream = js.get_stream(contract::streams::WEBHOOK_EVENTS).await.expect("the stream");
    eventually(SOON, subject, async || {
        let event = stream.get_last_raw_message_by_subject(subject).await.map_err(|e| e.to_string())?;
        serde_json::from_slice::<Value>(&event.payload).map_err(|e| e.to_string())
    })
    .await
}

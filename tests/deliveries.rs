//! Deliveries: retries, exhaustion, disabled callbacks, and endpoints that hold up nobody but themselves.

use std::time::{Duration, Instant};

use contract::rpc;
use serde_json::{Value, json};
use test_support::{Reply, eventually};

use crate::stack::{SOON, Stack};

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

    let enabled: rpc::Enabled = stack.call(rpc::CALLBACK_ENABLE, &rpc::EnableCallback { callback_id }).await;
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

//! Deliveries: retries, exhaustion, disabled callbacks, and the records of attempts.

use std::time::Duration;

use contract::{
    ObjectId, rpc,
    streams::{LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use futures::TryStreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Reply, eventually};

use crate::support::{DELIVERED, Stack, TEST_TIMEOUT, assert_includes, assert_ok, by_update, process_id};

/// The deliveries in the timeline of an update.
async fn deliveries(stack: &Stack, update_id: &str) -> Vec<Value> {
    stack.api.outcome(update_id).await["deliveries"].as_array().cloned().unwrap_or_default()
}

/// Waits until the only delivery of an update has this status.
async fn wait_for_status(stack: &Stack, update_id: &str, status: &str) -> Value {
    eventually(TEST_TIMEOUT, status, async || {
        let deliveries = deliveries(stack, update_id).await;
        match deliveries.first() {
            Some(delivery) if delivery["status"] == status => Ok(delivery.clone()),
            _ => Err(json!(deliveries).to_string()),
        }
    })
    .await
}

/// Sends an update, waits until its only delivery has this status, and returns the update's id.
async fn update_until(stack: &Stack, lead_id: &str, status: &str) -> String {
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    wait_for_status(stack, &update_id, status).await;
    update_id
}

/// The attempts of an update's delivery to a callback: number and status code of each.
async fn attempts(stack: &Stack, update_id: &str, callback_id: ObjectId) -> Vec<(u64, u64)> {
    let deliveries = deliveries(stack, update_id).await;
    let delivery = deliveries.iter().find(|delivery| delivery["callbackId"] == json!(callback_id)).expect("a delivery");
    let attempts = delivery["attempts"].as_array().expect("a list").iter();
    attempts.map(|a| (a["number"].as_u64().expect("a number"), a["statusCode"].as_u64().expect("a status"))).collect()
}

/// The number of first attempts that are stored in the row of their delivery. Other attempts have a row each.
const FIRST_ATTEMPTS: &str = "SELECT count(first_started_at) FROM webhooks.deliveries";
/// The number of long bodies, which are stored once per update.
const BODIES: &str = "SELECT count(*) FROM webhooks.payloads";
const ATTEMPT_ROWS: &str = "SELECT count(*) FROM webhooks.attempts";

async fn assert_attempt_rows(stack: &Stack, first: i64, further: i64) {
    assert_eq!((stack.count(FIRST_ATTEMPTS).await, stack.count(ATTEMPT_ROWS).await), (first, further));
}

async fn redeliver(stack: &Stack, update_id: &str, callback_id: ObjectId) {
    let path = format!("/api/v1/deliveries/{update_id}-{callback_id}/redeliver");
    assert_ok(stack.api.post(&path, &json!({})).await);
}

async fn reannounce(stack: &Stack) {
    stack.leadctl(&["recover", "reannounce", "--since", "1h", "--yes"]).await.assert_ok();
}

#[tokio::test]
async fn a_failing_endpoint_is_retried_under_one_webhook_id() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms,100ms")]).await;
    let redirect = Reply::redirect(&stack.receiver.url("/elsewhere"));
    // A reused connection that closes before a response is replaced within the attempt, so the third attempt needs two
    // dropped connections.
    let replies = [
        Reply::status(500).body("no"),
        redirect,
        Reply::drop_connection(),
        Reply::drop_connection(),
        Reply::status(204),
    ];
    stack.receiver.on("/crm", replies);
    let lead_id = stack.lead(&["crm"]).await;

    let update_id = update_until(&stack, &lead_id, "delivered").await;

    let requests = stack.receiver.requests_to("/crm");
    assert_eq!(requests.len(), 5);
    assert!(requests.iter().all(|request| request.header("webhook-id") == Some(update_id.as_str())));
    assert!(requests.iter().all(|request| request.body == requests[0].body));
    assert!(stack.receiver.requests_to("/elsewhere").is_empty(), "redirects are not followed");
    let delivery = &deliveries(&stack, &update_id).await[0];
    let codes = delivery["attempts"].as_array().expect("a list").iter().map(|attempt| attempt["statusCode"].clone());
    assert_eq!(codes.collect::<Vec<_>>(), [json!(500), json!(302), Value::Null, json!(204)]);
    assert_eq!(delivery["attempts"][0]["response"], "no");
}

#[tokio::test]
async fn a_slow_retry_is_not_started_a_second_time() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms")]).await;
    // The response takes longer than the initial lease of a claim.
    let slow = Reply::status(200).after(Duration::from_secs(4));
    stack.receiver.on("/crm", [Reply::status(500), slow]);
    let lead_id = stack.lead(&["crm"]).await;

    update_until(&stack, &lead_id, "delivered").await;

    assert_eq!(stack.receiver.requests_to("/crm").len(), 2);
}

#[tokio::test]
async fn a_failure_after_the_end_of_the_lease_does_not_change_the_claim_of_another_notifier() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    let slow = Reply::status(500).after(Duration::from_secs(2));
    stack.receiver.on("/crm", [Reply::status(500), slow, Reply::status(200)]);
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;

    // Writes the same as a claim by another notifier.
    stack.sql("UPDATE webhooks.deliveries SET next_attempt_at = now() + interval '1 hour'").await;

    stack.wait_for_count(ATTEMPT_ROWS, 2).await;
    let claimed = "SELECT count(*) FROM webhooks.deliveries
        WHERE status = 'pending' AND attempts = 2 AND next_attempt_at > now() + interval '30 minutes'";
    assert_eq!(stack.count(claimed).await, 1);
    stack.sql("UPDATE webhooks.deliveries SET next_attempt_at = now()").await;
    stack.wait_for_count(DELIVERED, 1).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    for path in ["/crm", "/bi"] {
        stack.receiver.on(path, [Reply::status(503).retry_after(2), Reply::status(200)]);
    }
    let lead_id = stack.lead(&["crm", "bi"]).await;

    stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;

    // Until the retry, the body, which is too long for a row, is stored once for both deliveries.
    let without_body = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND payload IS NULL";
    stack.wait_for_count(without_body, 2).await;
    assert_eq!(stack.count(BODIES).await, 1);
    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let pause = requests[1].received_at.duration_since(requests[0].received_at);
    assert!(pause >= Duration::from_secs(2), "{pause:?}");
    let others = stack.receiver.wait_for_requests("/bi", 2, TEST_TIMEOUT).await;
    assert!(requests.iter().chain(&others).all(|request| request.body == requests[0].body));
    stack.wait_for_count(BODIES, 0).await;
}

#[tokio::test]
async fn a_long_body_is_not_stored_again_when_its_event_comes_again() {
    let stack = Stack::start().await;
    let callback = json!([{"name": "crm", "url": stack.receiver.url("/crm"), "ordering": "lead"}]);
    let process = process_id(&stack.process(callback).await);
    let lead_id = stack.api.initiate(process, None).await;
    stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 1).await;
    stack.wait_for_count(BODIES, 0).await;

    // Writes the same as a recovery that rewinds all announcements.
    stack.sql("UPDATE lead_state.checkpoints SET generation = generation + 1, announced_sequence = 0").await;

    // This update is recorded after the event that is announced again.
    let short = json!({"leadId": lead_id, "metadata": {"text": null}});
    stack.api.update(short).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 2).await;
    assert_eq!(stack.count(BODIES).await, 0);
}

#[tokio::test]
async fn a_delivery_is_recorded_with_its_long_body_or_not_at_all() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h")]).await;
    stack.receiver.on("/crm", [500]);
    let lead_id = stack.lead(&["crm"]).await;
    // Rejects long bodies. The sequence counts the attempts to write one, even though their transactions are rolled
    // back.
    let reject = "
        CREATE SEQUENCE webhooks.rejected;
        CREATE FUNCTION webhooks.reject() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM nextval('webhooks.rejected'); RAISE EXCEPTION 'rejected'; END $$;
        CREATE TRIGGER reject BEFORE INSERT ON webhooks.payloads EXECUTE FUNCTION webhooks.reject()";
    stack.sql(reject).await;

    stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;

    stack.wait_for_count("SELECT count(*) FROM webhooks.rejected WHERE is_called", 1).await;
    stack.notifier.kill9().await;
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.deliveries").await, 0, "a delivery without its body");
    stack.sql("DROP TRIGGER reject ON webhooks.payloads").await;
    stack.receiver.on("/crm", [200]);
    stack.notifier.restart().await;
    stack.wait_for_count_within(TEST_TIMEOUT * 3, DELIVERED, 1).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_pending_delivery_that_lost_its_body_is_made_when_its_event_comes_again() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h")]).await;
    stack.receiver.on("/crm", [500, 200]);
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 1", 1).await;
    stack.sql("DELETE FROM webhooks.payloads").await;

    let events = stack.js().get_stream(LEAD_EVENTS).await.expect("the events");
    events.delete_consumer(NOTIFIER_CONSUMER).await.expect("deleted");

    stack.wait_for_count_within(TEST_TIMEOUT * 3, DELIVERED, 1).await;
    let requests = stack.receiver.requests_to("/crm");
    assert_eq!((requests.len(), &requests[0].body), (2, &requests[1].body));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_long_body_that_is_delivered_again_is_stored_once() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    for path in ["/crm", "/bi"] {
        stack.receiver.on(path, [Reply::status(200), Reply::status(503).retry_after(2), Reply::status(200)]);
    }
    let applied = stack.process_calling(&["crm", "bi"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 2).await;
    assert_eq!(stack.count(BODIES).await, 0);

    for callback in &applied.process.callbacks {
        redeliver(&stack, &update_id, callback.callback_id).await;
    }

    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE attempts = 2 AND payload IS NULL", 2).await;
    assert_eq!(stack.count(BODIES).await, 1);
    for path in ["/crm", "/bi"] {
        let requests = stack.receiver.wait_for_requests(path, 3, TEST_TIMEOUT).await;
        assert!(requests.iter().all(|request| request.body == requests[0].body));
    }
    stack.wait_for_count(BODIES, 0).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_delivery_that_always_fails_is_exhausted_visibly() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms,50ms")]).await;
    stack.receiver.on("/crm", [500]);
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;

    let update_id = update_until(&stack, &lead_id, "exhausted").await;

    let delivery = &deliveries(&stack, &update_id).await[0];
    assert_eq!(delivery["attempts"].as_array().map(Vec::len), Some(3));
    let subject = format!("webhooks.evt.{}.{}.exhausted", stack.api.project_id, process_id(&applied));
    let event = stack.wait_for_webhook_event(&subject).await;
    assert_includes(&event, json!({"type": "exhausted", "updateId": update_id, "attempts": 3}));
}

#[tokio::test]
async fn a_delivery_that_is_requeued_while_it_is_announced_is_announced_again() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/crm", [500]);
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    update_until(&stack, &lead_id, "exhausted").await;
    let announced = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted' AND exhausted_announced";
    stack.wait_for_count(announced, 1).await;
    assert!(stack.notifier.terminate().await.success());
    // The state after a crash before the delivery was marked as announced. While the transaction locks the row, the
    // delivery cannot be marked.
    stack.sql("UPDATE webhooks.deliveries SET exhausted_announced = false").await;
    let mut transaction = stack.pool.begin().await.expect("a transaction");
    let lock = sqlx::raw_sql("SELECT FROM webhooks.deliveries FOR UPDATE").execute(&mut *transaction).await;
    lock.expect("the row");
    stack.notifier.restart().await;
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%SET exhausted_announced = true%'";
    stack.wait_for_count(waits, 1).await;

    // Writes the same as a redelivery.
    let requeue =
        "UPDATE webhooks.deliveries SET status = 'pending', next_attempt_at = now(), schedule_offset = attempts";
    sqlx::raw_sql(requeue).execute(&mut *transaction).await.expect("requeued");
    transaction.commit().await.expect("committed");

    let subject = format!("webhooks.evt.{}.{}.exhausted", stack.api.project_id, process_id(&applied));
    eventually(TEST_TIMEOUT, "the second exhaustion is announced", async || {
        let event = stack.wait_for_webhook_event(&subject).await;
        if event["attempts"] == 2 { Ok(()) } else { Err(event.to_string()) }
    })
    .await;
    stack.wait_for_count(announced, 1).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn gone_disables_the_callback_until_it_is_enabled() {
    let stack = Stack::start().await;
    stack.receiver.on("/crm", [410, 200]);
    let applied = stack.process_calling(&["crm"]).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    update_until(&stack, &lead_id, "exhausted").await;
    let subject = format!("webhooks.evt.{}.{}.callback.disabled", stack.api.project_id, process_id(&applied));
    assert_eq!(stack.wait_for_webhook_event(&subject).await["callbackId"], json!(callback_id));

    // While the callback is disabled, deliveries are recorded and wait.
    stack.api.update(json!({"leadId": lead_id, "name": "Ada"})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'", 1).await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 1);

    let enabled = stack.call(&rpc::EnableCallback { callback_id }).await;
    assert!(enabled.was_disabled);
    stack.wait_for_count(DELIVERED, 1).await;
}

#[tokio::test]
async fn gone_from_a_url_that_was_replaced_disables_nothing() {
    let stack = Stack::start().await;
    stack.receiver.on("/old", [Reply::status(410).after(Duration::from_secs(3))]);
    let callback = |path| json!([{"name": "crm", "url": stack.receiver.url(path)}]);
    let applied = stack.process(callback("/old")).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let refused = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.receiver.wait_for_requests("/old", 1, TEST_TIMEOUT).await;

    stack.process(callback("/new")).await;

    wait_for_status(&stack, &refused, "exhausted").await;
    update_until(&stack, &lead_id, "delivered").await;
    assert_eq!(stack.receiver.requests_to("/new").len(), 1);
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.callback_health").await, 0);
}

#[tokio::test]
async fn a_delivery_that_is_exhausted_again_without_an_attempt_is_announced_again() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/crm", [500]);
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    update_until(&stack, &lead_id, "exhausted").await;
    let announced = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted' AND exhausted_announced";
    stack.wait_for_count(announced, 1).await;
    stack.process_calling(&[]).await;
    eventually(TEST_TIMEOUT, "the notifier has removed the callback", async || {
        let callbacks = stack.call(&rpc::ListCallbacks { project_id: stack.api.project_id, details: false }).await;
        if callbacks.is_empty() { Ok(()) } else { Err(format!("{callbacks:?}")) }
    })
    .await;

    // What a redelivery writes.
    let requeue = "UPDATE webhooks.deliveries SET status = 'pending', next_attempt_at = now(),
                       schedule_offset = attempts, exhausted_announced = false";
    stack.sql(requeue).await;

    let subject = format!("webhooks.evt.{}.{}.exhausted", stack.api.project_id, process_id(&applied));
    eventually(TEST_TIMEOUT, "the second exhaustion is announced", async || {
        let event = stack.wait_for_webhook_event(&subject).await;
        if event["error"] == "the callback was removed" { Ok(()) } else { Err(event.to_string()) }
    })
    .await;
    stack.wait_for_count(announced, 1).await;
}

#[tokio::test]
async fn an_attempt_whose_record_was_committed_without_a_reply_is_counted_once() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h")]).await;
    stack.receiver.on("/crm", [Reply::status(500).after(Duration::from_secs(2)), Reply::status(200)]);
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "first"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;

    // The commit of the record waits for a standby. When its session is terminated, the record is committed.
    stack.postgres.set_synchronous(true).await.expect("a standby is required");
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'webhook-notifier' AND wait_event = 'SyncRep' AND query LIKE '%records AS MATERIALIZED%'";
    stack.wait_for_count(waits, 1).await;
    let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE application_name = 'webhook-notifier' AND wait_event = 'SyncRep'";
    assert!(stack.count(terminate).await > 0);
    stack.postgres.set_synchronous(false).await.expect("no standby is required");

    // The records of the second update are written after the repetition.
    stack.api.update(json!({"leadId": lead_id, "name": "second"})).await;
    stack.wait_for_count(DELIVERED, 1).await;
    assert_attempt_rows(&stack, 1, 1).await;
    let attempted_once = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 1";
    assert_eq!(stack.count(attempted_once).await, 1);
    stack.sql("UPDATE webhooks.deliveries SET next_attempt_at = now() WHERE status = 'pending'").await;
    stack.wait_for_count(DELIVERED, 2).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn deliveries_of_a_callback_that_is_not_in_memory_yet_are_made() {
    let stack = Stack::start().await;
    let callbacks = ["crm", "bi"].map(|name| json!({"name": name, "url": stack.receiver.url(&format!("/{name}"))}));
    let applied = stack.process(json!(&callbacks[..1])).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    update_until(&stack, &lead_id, "delivered").await;
    // No service sees the change below for some seconds.
    let bucket = stack.js().get_stream("KV_processes").await.expect("the bucket");
    let watches = bucket.consumer_names().try_collect::<Vec<_>>().await.expect("the watches");
    for watch in watches {
        bucket.delete_consumer(&watch).await.expect("deleted");
    }
    let applied = stack.process(json!(callbacks)).await;

    let added = applied.process.callbacks.iter().find(|callback| callback.name == "bi").expect("the new callback");
    let backfilled = format!(
        "INSERT INTO webhooks.deliveries (update_id, callback_id, kind, project_id, process_id, status, attempts,
                                          next_attempt_at, created_at, updated_at, payload)
         SELECT update_id, decode('{}', 'hex'), kind, project_id, process_id, 'pending', 0, now(), now(), now(), '{{}}'
         FROM webhooks.deliveries",
        added.callback_id
    );
    stack.sql(&backfilled).await;

    stack.wait_for_count(DELIVERED, 2).await;
    assert_eq!(stack.receiver.requests_to("/bi").len(), 1);
}

#[tokio::test]
async fn a_delivery_that_is_requeued_during_an_erasure_is_erased_too() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/bi", [Reply::status(500).body("no")]);
    let lead_id = stack.lead(&["crm", "bi"]).await;
    stack.api.update(json!({"leadId": lead_id, "metadata": {"text": "x".repeat(5000)}})).await;
    stack.wait_for_count(DELIVERED, 1).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted'", 1).await;
    // The erasure has exhausted the pending deliveries, and waits before it deletes the bodies.
    let mut attempts = stack.pool.begin().await.expect("a transaction");
    let lock = sqlx::raw_sql("SELECT FROM webhooks.attempts FOR UPDATE").execute(&mut *attempts).await;
    lock.expect("the attempts");
    assert_ok(stack.api.ask(Method::DELETE, &format!("/api/v1/leads/{lead_id}"), &[], &json!(null)).await);
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'webhook-notifier' AND wait_event_type = 'Lock' AND query LIKE '%SET response = NULL%'";
    stack.wait_for_count_within(TEST_TIMEOUT * 2, waits, 1).await;

    // What a redelivery writes.
    let requeue = "UPDATE webhooks.deliveries SET status = 'pending', next_attempt_at = now() + interval '1 hour'
                       WHERE status = 'delivered' AND kind = 'update' AND payload IS NULL
                           AND EXISTS (SELECT FROM webhooks.payloads AS p WHERE p.update_id = deliveries.update_id)";
    stack.sql(requeue).await;
    attempts.rollback().await.expect("rolled back");

    stack.wait_for_count_within(TEST_TIMEOUT * 2, "SELECT count(*) FROM webhooks.pending_erasures", 0).await;
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'").await, 0);
    assert_eq!(stack.count(BODIES).await, 0);
}

#[tokio::test]
async fn deliveries_survive_the_death_of_the_notifier() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,200ms,200ms,200ms,200ms,200ms,200ms,200ms")]).await;
    stack.receiver.on("/flapping", [500, 500, 200]);
    // The endpoint is slow, so that some deliveries are in flight whenever the notifier dies.
    stack.receiver.on("/steady", [Reply::status(200).after(Duration::from_millis(300))]);
    let lead_id = stack.lead(&["steady", "flapping"]).await;

    let mut updates = Vec::new();
    for number in 0..200 {
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await);
        if number % 60 == 59 {
            let last = updates.last().expect("an update");
            eventually(TEST_TIMEOUT, "the last one is on its way", async || {
                by_update(&stack.receiver.requests_to("/steady")).contains_key(last)
            })
            .await;
            stack.notifier.kill9().await;
            stack.notifier.restart().await;
        }
    }

    stack.wait_for_count_within(TEST_TIMEOUT * 3, DELIVERED, 400).await;
    for path in ["/steady", "/flapping"] {
        let delivered = by_update(&stack.receiver.requests_to(path));
        assert!(updates.iter().all(|update| delivered.contains_key(update)), "{path}");
        assert_eq!(delivered.len(), updates.len(), "{path}");
    }
}

#[tokio::test]
async fn a_lost_consumer_causes_no_second_delivery() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    for number in 0..20 {
        stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }
    stack.wait_for_count(DELIVERED, 20).await;

    let events = stack.js().get_stream(LEAD_EVENTS).await.expect("the events");
    events.delete_consumer(NOTIFIER_CONSUMER).await.expect("deleted");
    stack.api.update(json!({"leadId": lead_id, "name": "last"})).await;

    stack.wait_for_count(DELIVERED, 21).await;
    // The new consumer sent all earlier events again before the last event.
    assert_eq!(stack.receiver.requests_to("/crm").len(), 21);
}

#[tokio::test]
async fn a_first_attempt_is_kept_in_the_row_of_its_delivery() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms")]).await;
    stack.receiver.on("/flaky", [Reply::status(500).body("no"), Reply::status(200)]);
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm")},
            // The delivery of an ordered callback is recorded before its first attempt.
            {"name": "ordered", "url": stack.receiver.url("/ordered"), "ordering": "lead"},
            {"name": "flaky", "url": stack.receiver.url("/flaky")},
        ]))
        .await;
    let [crm, ordered, flaky] = [0, 1, 2].map(|place: usize| applied.process.callbacks[place].callback_id);
    let lead_id = stack.api.initiate(process_id(&applied), None).await;

    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.wait_for_count(DELIVERED, 3).await;

    assert_attempt_rows(&stack, 2, 2).await;
    assert_eq!(attempts(&stack, &update_id, crm).await, [(1, 200)]);
    assert_eq!(attempts(&stack, &update_id, ordered).await, [(1, 200)]);
    assert_eq!(attempts(&stack, &update_id, flaky).await, [(1, 500), (2, 200)]);
    let timeline = stack.api.outcome(&update_id).await;
    for delivery in timeline["deliveries"].as_array().expect("a list") {
        let attempt = &delivery["attempts"][0];
        assert!(attempt["startedAt"].as_str() >= timeline["appliedAt"].as_str(), "{timeline}");
        assert!(attempt["durationMs"].as_u64().is_some_and(|ms| ms < 10_000), "{timeline}");
        let failed = delivery["callbackId"] == json!(flaky);
        assert_eq!((attempt["error"].is_string(), attempt["response"].is_string()), (failed, failed), "{timeline}");
    }

    // Further attempts, after a second announcement and by redelivery, have separate rows. The first attempt does not
    // change.
    reannounce(&stack).await;
    stack.wait_for_count(ATTEMPT_ROWS, 4).await;
    redeliver(&stack, &update_id, crm).await;
    stack.wait_for_count(ATTEMPT_ROWS, 5).await;
    assert_attempt_rows(&stack, 2, 5).await;
    assert_eq!(attempts(&stack, &update_id, crm).await, [(1, 200), (2, 200), (3, 200)]);
    assert_eq!(attempts(&stack, &update_id, flaky).await, [(1, 500), (2, 200), (3, 200)]);
    let first = &deliveries(&stack, &update_id).await[0]["attempts"][0];
    assert_eq!(first, &timeline["deliveries"][0]["attempts"][0]);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_recorded_delivery_without_an_attempt_gets_its_first_one() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/crm", [500, 200]);
    let applied = stack.process_calling(&["crm"]).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let refused = update_until(&stack, &lead_id, "exhausted").await;
    let unattempted = update_until(&stack, &lead_id, "delivered").await;
    assert_attempt_rows(&stack, 1, 1).await;
    // The state of a delivery whose callback was removed before the first attempt. The attempt is not counted then.
    let as_removed = "
        UPDATE webhooks.delivery_counts SET delivered_100ms = 0, delivered_1s = 0, delivered_10s = 0, delivered_longer = 0;
        UPDATE webhooks.deliveries SET status = 'exhausted', attempts = 0, payload = '{}', first_started_at = NULL,
            first_duration_ms = NULL, first_status_code = NULL
        WHERE status = 'delivered'";
    stack.sql(as_removed).await;

    reannounce(&stack).await;

    stack.wait_for_count(DELIVERED, 2).await;
    assert_attempt_rows(&stack, 1, 2).await;
    assert_eq!(attempts(&stack, &refused, callback_id).await, [(1, 500), (2, 200)]);
    assert_eq!(attempts(&stack, &unattempted, callback_id).await, [(1, 200)]);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_first_attempt_recorded_in_a_row_of_its_own_is_shown_and_counted() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let update_id = update_until(&stack, &lead_id, "delivered").await;
    let before = deliveries(&stack, &update_id).await;
    stack
        .sql(
            "INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt;
             UPDATE webhooks.deliveries SET first_started_at = NULL, first_duration_ms = NULL, first_status_code = NULL",
        )
        .await;
    assert_eq!(deliveries(&stack, &update_id).await, before);

    redeliver(&stack, &update_id, callback_id).await;

    stack.wait_for_count(ATTEMPT_ROWS, 2).await;
    assert_attempt_rows(&stack, 0, 2).await;
    assert_eq!(attempts(&stack, &update_id, callback_id).await, [(1, 200), (2, 200)]);
    stack.wait_for_clean_audit().await;
}

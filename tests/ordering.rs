//! Ordered callbacks (`ordering: "lead"`): each delivery of a lead waits for the previous one, with several notifiers
//! and after the death of one. Other leads do not wait, and slow endpoints of other callbacks delay no delivery.

use std::time::Duration;

use contract::rpc::ProcessChangeResult;
use serde_json::{Value, json};
use test_support::{Reply, Service};

use crate::support::{DELIVERED, Stack, TEST_TIMEOUT, assert_ok, numbers, process_id, service};

/// A stack with two notifiers and a process with the ordered callback `crm`. If `one_hangs`, the process has a second
/// callback, whose endpoint hangs.
async fn two_notifiers(schedule: &str, one_hangs: bool) -> (Stack, Service, ProcessChangeResult) {
    let extra = [("RETRY_SCHEDULE", schedule)];
    let stack = Stack::start_with(&extra).await;
    let (mut second, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &extra);
    second.wait_for_http(&ready, TEST_TIMEOUT).await;
    stack.receiver.on("/slow", [Reply::hang()]);
    let mut callbacks = vec![json!({"name": "crm", "url": stack.receiver.url("/crm"), "ordering": "lead"})];
    if one_hangs {
        callbacks.push(json!({"name": "slow", "url": stack.receiver.url("/slow"), "timeoutSeconds": 20}));
    }
    let applied = stack.process(json!(callbacks)).await;
    (stack, second, applied)
}

async fn update(stack: &Stack, lead: &str, n: u32) -> String {
    stack.api.update(json!({"leadId": lead, "metadata": {"n": n}})).await
}

#[tokio::test]
async fn a_retry_delays_only_later_deliveries_of_the_same_lead() {
    let (stack, _second, applied) = two_notifiers("0s,1h", true).await;
    let crm = applied.process.callbacks[0].callback_id;
    let [a, b] =
        [stack.api.initiate(process_id(&applied), None).await, stack.api.initiate(process_id(&applied), None).await];
    stack.receiver.on("/crm", [500, 200]);

    update(&stack, &a, 1).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let second = update(&stack, &a, 2).await;
    update(&stack, &a, 3).await;
    for n in 1..=3 {
        update(&stack, &b, n).await;
    }

    // The other lead's deliveries arrive before the retry.
    let requests = stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    assert_eq!(numbers(&requests), [(a.clone(), vec![1]), (b.clone(), vec![1, 2, 3])].into());
    let waiting = assert_ok(stack.api.get(&format!("/api/v1/deliveries/{second}-{crm}")).await)["data"].take();
    let waiting = (&waiting["status"], &waiting["nextAttemptAt"], &waiting["attempts"]);
    assert_eq!(waiting, (&json!("pending"), &Value::Null, &json!([])));
    stack.sql("UPDATE webhooks.deliveries SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL").await;
    let requests = stack.receiver.wait_for_requests("/crm", 7, TEST_TIMEOUT).await;
    assert_eq!(numbers(&requests)[&a], [1, 1, 2, 3]);
}

#[tokio::test]
async fn an_exhausted_delivery_is_followed_by_the_next_and_a_redelivery_comes_again() {
    let (stack, _second, applied) = two_notifiers("0s,500ms,500ms", false).await;
    let crm = applied.process.callbacks[0].callback_id;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.receiver.on("/crm", [500, 500, 500, 200]);

    let first = update(&stack, &lead, 1).await;
    update(&stack, &lead, 2).await;
    stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    assert_ok(stack.api.post(&format!("/api/v1/deliveries/{first}-{crm}/redeliver"), &json!({})).await);
    update(&stack, &lead, 3).await;

    let requests = stack.receiver.wait_for_requests("/crm", 6, TEST_TIMEOUT).await;
    assert_eq!(numbers(&requests)[&lead], [1, 1, 1, 2, 1, 3]);
}

#[tokio::test]
async fn the_sweep_reaches_leads_beyond_those_that_wait_for_a_retry() {
    let (stack, _second, applied) = two_notifiers("0s,1h", false).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    update(&stack, &lead, 1).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_count(DELIVERED, 1).await;

    // The state that a crashed notifier leaves: the deliveries of the last 5 of 1205 leads were not made due.
    let left = "
        INSERT INTO webhooks.deliveries
            (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at, created_at, updated_at,
             payload, lead_id, order_key, event_stream, event_sequence)
        SELECT substring(update_id FOR 4) || int8send(n), callback_id, project_id, process_id, 'pending', 0,
               CASE WHEN n <= 1200 THEN now() + interval '1 hour' END, now(), now(), '{}',
               decode('00000000', 'hex') || int8send(n), order_key, event_stream, 1
        FROM webhooks.deliveries, generate_series(1, 1205) AS n";
    stack.sql(left).await;

    stack.wait_for_count(DELIVERED, 6).await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 6);
}

#[tokio::test]
async fn the_order_survives_the_death_of_a_notifier() {
    let (mut stack, _second, applied) = two_notifiers("0s,1s,1s,1s", false).await;
    stack.receiver.on("/crm", [Reply::status(200).after(Duration::from_millis(40))]);
    let mut leads = Vec::new();
    for _ in 0..4 {
        leads.push(stack.api.initiate(process_id(&applied), None).await);
    }
    for n in 0..20 {
        for lead in &leads {
            update(&stack, lead, n).await;
        }
    }

    stack.receiver.wait_for_requests("/crm", 15, TEST_TIMEOUT).await;
    stack.notifier.kill9().await;

    // Claims of the dead notifier expire with their lease, and its unacknowledged events are sent to the other
    // notifier.
    let requests = stack
        .receiver
        .wait_for(TEST_TIMEOUT * 5, |requests| {
            let numbers = numbers(requests);
            numbers.len() == 4 && numbers.values().all(|numbers| numbers.contains(&19))
        })
        .await;
    for (lead, numbers) in numbers(&requests) {
        // Deliveries arrive at least once. A delivery that was in flight when the notifier died is sent again, before
        // any later delivery of its lead.
        assert!(numbers.is_sorted(), "{lead}: {numbers:?}");
        let mut distinct = numbers.clone();
        distinct.dedup();
        assert_eq!(distinct, (0..20).collect::<Vec<_>>(), "{lead}");
    }
}

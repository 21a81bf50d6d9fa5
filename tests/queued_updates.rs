//! Updates that are queued during calls (`duringCall: "queue"`) wait for the end or the expiry of the call. They are
//! then decided once and in log order, even after crashes. Updates of other leads do not wait.

use contract::streams::LEAD_EVENTS;
use reqwest::Method;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{Stack, TEST_TIMEOUT, UPDATE, assert_includes, assert_ok, by_update, process_id};

const QUEUED: &str = "SELECT count(*) FROM lead_state.queued_updates";

/// A stack with a process that queues, and a lead of it for each reference.
async fn queueing<const N: usize>(references: [&str; N]) -> (Stack, [String; N]) {
    let stack = Stack::start().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "sales", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}, {"name": "interested"}, {"name": "lost", "kind": "terminal"}],
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/crm")}],
    });
    let process_id = process_id(&stack.apply(spec).await);
    let leads =
        futures::future::join_all(references.map(|reference| stack.api.initiate(process_id, Some(reference)))).await;
    (stack, leads.try_into().expect("as many"))
}

/// Publishes a call event and waits until it is applied.
async fn call(stack: &Stack, event: &str, body: Value) {
    stack.publish_call(event, &body).await;
    stack.wait_until_applied().await;
}

/// The timeline of an update, which may be pending.
async fn timeline(stack: &Stack, update_id: &str) -> Value {
    assert_ok(stack.api.get(&format!("/api/v1/updates/{update_id}")).await)["data"].take()
}

/// Applies an update, then queues three more updates of the lead during two calls, `c-1` and `c-2`: one that succeeds,
/// one that fails, and one that depends on the first.
async fn queue_three(stack: &Stack, lead: &str) -> Vec<String> {
    stack.api.update_and_wait(json!({"leadId": lead, "metadata": {"n": 0}})).await;
    call(stack, "started", json!({"leadId": lead, "callId": "c-1"})).await;
    call(stack, "started", json!({"leadId": lead, "callId": "c-2"})).await;
    let mut queued = Vec::new();
    for (query, body) in [
        ("", json!({"leadId": lead, "metadata": {"n": 1}, "targetState": "interested"})),
        ("", json!({"leadId": lead, "targetState": "nowhere"})),
        ("?expectedState=interested", json!({"leadId": lead, "metadata": {"n": 2}})),
    ] {
        let answer = assert_ok(stack.api.post(&format!("{UPDATE}{query}"), &body).await);
        queued.push(answer["updateId"].as_str().expect("an id").to_owned());
    }
    stack.wait_for_count(QUEUED, 3).await;
    queued
}

#[tokio::test]
async fn a_queued_update_is_shown_as_pending_and_previewed_by_dry_runs() {
    let (stack, [lead, other]) = queueing(["A", "B"]).await;
    let queued = queue_three(&stack, &lead).await;

    let of_other = stack.api.update_and_wait(json!({"leadId": other, "name": "Grace"})).await;
    let dry_run = json!({"leadId": lead, "metadata": {"x": 1}});
    let dry_run = assert_ok(stack.api.post(&format!("{UPDATE}?dryRun=true"), &dry_run).await);

    assert_eq!(of_other["status"], "succeeded", "another lead does not wait");
    for update in &queued {
        let timeline = timeline(&stack, update).await;
        assert_includes(&timeline, json!({"status": "pending", "outcome": null, "command": {"leadId": lead}}));
        assert!(timeline["queuedUntil"].is_string() && timeline["loggedAt"].is_string(), "{timeline}");
    }
    assert!(dry_run["warnings"][0].as_str().expect("a warning").contains("would be queued"), "{dry_run}");
    assert_includes(&dry_run["outcome"], json!({"version": 5, "data": {"n": 2}}));
}

#[tokio::test]
async fn queued_updates_are_decided_in_log_order_when_the_last_call_ends() {
    let (mut stack, [lead, other]) = queueing(["A", "B"]).await;
    let queued = queue_three(&stack, &lead).await;

    // Repeated commands, a new leader and the end of one of two calls do not release the queued updates.
    for lead in [&lead, &other] {
        stack.publish_update(&json!({"updateId": queued[0], "leadId": lead, "name": "again"})).await;
    }
    stack.wait_until_applied().await;
    stack.lead_state.kill9().await;
    stack.lead_state.restart().await;
    stack.wait_until_ready().await;
    call(&stack, "ended", json!({"leadId": lead, "callId": "c-2"})).await;
    let (_, report) = stack.audit(&[]).await;
    let expected = json!({"accepted": 7, "succeeded": 4, "failed": 0, "pending": 3, "queued": 3, "duplicates": 2, "deadLetters": 0});
    assert_eq!((&report["updates"], &report["clean"]), (&expected, &json!(true)), "{report}");

    // An update directly after the end of the call is decided after the queued updates.
    stack.publish_call("ended", &json!({"leadId": lead, "callId": "c-1"})).await;
    let after = json!({"leadId": lead, "metadata": {"n": 3}});
    let after = assert_ok(stack.api.ask(Method::POST, UPDATE, &[("if-match", "\"4\"")], &after).await);
    let after = after["updateId"].as_str().expect("an id").to_owned();

    let mut outcomes = Vec::new();
    for update in queued.iter().chain([&after]) {
        let timeline = stack.api.outcome(update).await;
        assert!(timeline.get("queuedUntil").is_none(), "{timeline}");
        outcomes.push((timeline["errorCode"].clone(), timeline["version"].clone()));
    }
    let at_version = |version: u32| (Value::Null, json!(version));
    assert_eq!(outcomes, [at_version(3), (json!("unknown_state"), Value::Null), at_version(4), at_version(5)]);
    assert_eq!(stack.count(QUEUED).await, 0);
    assert_includes(&stack.wait_for_clean_audit().await["updates"], json!({"succeeded": 8, "failed": 1}));
    let delivered = by_update(&stack.receiver.requests_to("/crm"));
    assert_eq!(delivered.len(), 5);
    assert!(delivered.values().all(|bodies| bodies.len() == 1), "{delivered:?}");
}

#[tokio::test]
async fn queued_updates_are_decided_when_their_call_expires() {
    let (stack, [lead]) = queueing(["A"]).await;
    call(&stack, "started", json!({"leadId": lead, "timeoutSeconds": 2})).await;
    let queued = stack.api.update(json!({"leadId": lead, "name": "Grace"})).await;
    stack.wait_for_count(QUEUED, 1).await;

    // An expiry event that comes too early changes nothing.
    call(&stack, "expired", json!({"leadId": lead})).await;
    assert_eq!(stack.count(QUEUED).await, 1);

    assert_eq!(stack.api.outcome(&queued).await["status"], "succeeded");
}

#[tokio::test]
async fn updates_queued_in_two_overlapping_calls_are_decided_in_log_order() {
    let (stack, [lead]) = queueing(["A"]).await;
    call(&stack, "started", json!({"leadId": lead, "timeoutSeconds": 1})).await;
    let first = stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
    call(&stack, "started", json!({"leadId": lead, "callId": "next"})).await;
    let second = stack.api.update(json!({"leadId": lead, "name": "Eve"})).await;
    stack.wait_for_count(QUEUED, 2).await;

    call(&stack, "ended", json!({"leadId": lead})).await;

    for (update, version) in [(first, 2), (second, 3)] {
        assert_eq!(stack.api.outcome(&update).await["version"], version);
    }
    assert_includes(&stack.wait_for_clean_audit().await["updates"], json!({"accepted": 5, "succeeded": 5}));
}

#[tokio::test]
async fn a_full_queue_refuses_and_is_announced_completely_after_a_crash() {
    let (mut stack, [lead]) = queueing(["A"]).await;
    call(&stack, "started", json!({"leadId": lead})).await;
    for number in 0..256 {
        stack.publish_update(&json!({"leadId": lead, "metadata": {format!("k{}", number % 7): number}})).await;
    }
    stack.wait_until_applied().await;
    assert_eq!(stack.count(QUEUED).await, 256);

    let one_too_many = stack.api.update_and_wait(json!({"leadId": lead, "name": "Grace"})).await;
    assert_includes(&one_too_many, json!({"status": "failed", "errorCode": "queue_full"}));

    call(&stack, "ended", json!({"leadId": lead})).await;
    assert_eq!(stack.count(QUEUED).await, 0);
    stack.wait_for_clean_audit().await;
    // The state after lead-state died before it recorded the announcements. All rows decided at one entry of the log
    // are announced again, even if there are more than one read returns.
    stack.lead_state.kill9().await;
    stack.sql("UPDATE lead_state.checkpoints SET generation = generation + 1, announced_sequence = 0").await;
    stack.lead_state.restart().await;
    eventually(TEST_TIMEOUT, "all are announced again", async || {
        let events = stack.js().get_stream(LEAD_EVENTS).await.map_err(|e| e.to_string())?;
        let last = events.cached_info().state.last_sequence;
        if last == 2 * 259 { Ok(()) } else { Err(last.to_string()) }
    })
    .await;
    assert_eq!(stack.wait_for_clean_audit().await["updates"]["succeeded"], 258);
    let versions = "SELECT count(DISTINCT version) FROM lead_state.lead_updates WHERE success";
    assert_eq!(stack.count(versions).await, 256);
}

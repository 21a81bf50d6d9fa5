//! Updates that are held during calls (`duringCall: queue`): they wait for the end of the call or its expiry, then they are
//! decided in the order of the log, once, whatever dies meanwhile, and nobody else waits.

use contract::rpc;
use serde_json::{Value, json};
use test_support::eventually;

use crate::{
    audit::{audit, settled},
    stack::{Api, SOON, Stack, by_update},
};

const HELD: &str = "SELECT count(*) FROM lead_state.queued_updates";

/// A stack with a process that queues, and one lead of it for each reference.
async fn queueing<const N: usize>(references: [&str; N]) -> (Stack, [String; N]) {
    let stack = Stack::start().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "sales", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}, {"name": "interested"}, {"name": "lost", "kind": "terminal"}],
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/crm")}],
    });
    let applied: rpc::ProcessChangeResult = stack.call(rpc::PROCESS_APPLY, &spec).await;
    let process_id = applied.process.process_id.expect("an id");
    let leads =
        futures::future::join_all(references.map(|reference| stack.api.initiate(process_id, Some(reference)))).await;
    (stack, leads.try_into().expect("as many"))
}

/// Tells that a call began or ended, as an internal producer does, and waits until it is applied.
async fn call(stack: &Stack, what: &str, body: Value) {
    stack.publish(format!("leads.cmd.{}.call.{what}", stack.api.project_id), body.to_string()).await;
    stack.wait_until_applied().await;
}

/// What the story of an update says while it is pending.
async fn story(api: &Api, update_id: &str) -> Value {
    let (status, body) = api.get(&format!("/api/v1/updates/{update_id}")).await;
    assert_eq!(status, 200, "{body}");
    body["data"].clone()
}

#[tokio::test]
async fn what_comes_during_a_call_is_decided_in_order_when_it_ends() {
    let (mut stack, [lead, other]) = queueing(["A", "B"]).await;
    let before = stack.api.update(json!({"leadId": lead, "metadata": {"n": 0}})).await;
    stack.api.outcome(&before).await;
    call(&stack, "started", json!({"leadId": lead, "callId": "c-1"})).await;
    call(&stack, "started", json!({"leadId": lead, "callId": "c-2"})).await;

    let mut held = Vec::new();
    for body in [
        json!({"leadId": lead, "metadata": {"n": 1}, "targetState": "interested"}),
        json!({"leadId": lead, "targetState": "nowhere"}),
        json!({"leadId": lead, "metadata": {"n": 2}, "expectedState": "interested"}),
    ] {
        held.push(stack.api.update(body).await);
    }
    // Nobody else waits.
    let others = stack.api.update(json!({"leadId": other, "name": "Grace"})).await;
    assert_eq!(stack.api.outcome(&others).await["status"], "succeeded");
    stack.wait_for_count(HELD, 3, SOON).await;
    for update in &held {
        let story = story(&stack.api, update).await;
        assert_eq!((&story["status"], &story["outcome"]), (&json!("pending"), &Value::Null), "{story}");
        assert!(story["queuedUntil"].is_string() && story["loggedAt"].is_string(), "{story}");
        assert_eq!(story["command"]["leadId"], lead.as_str());
    }
    let (_, dry) =
        stack.api.post("/api/v1/leads/update", &json!({"leadId": lead, "metadata": {"x": 1}, "dryRun": true})).await;
    assert!(dry["warnings"][0].as_str().expect("a warning").contains("would be queued"), "{dry}");
    assert_eq!((&dry["outcome"]["version"], &dry["outcome"]["data"]["n"]), (&json!(5), &json!(2)), "{dry}");

    // A producer repeats itself; another leader takes over; the other call ends. All of it changes nothing.
    let update = format!("leads.cmd.{}.update", stack.api.project_id);
    for lead in [&lead, &other] {
        stack.publish(update.clone(), json!({"updateId": held[0], "leadId": lead, "name": "again"}).to_string()).await;
    }
    stack.wait_until_applied().await;
    stack.lead_state.kill9().await;
    stack.lead_state.restart().await;
    let ready = stack.lead_state_ready.clone();
    stack.lead_state.wait_for_http(&ready, SOON).await;
    call(&stack, "ended", json!({"leadId": lead, "callId": "c-2"})).await;
    let (_, found) = audit(&stack, &[]).await;
    assert_eq!(
        found["updates"],
        json!({"accepted": 5, "succeeded": 2, "failed": 0, "pending": 3, "queued": 3, "duplicates": 2, "deadLetters": 0}),
        "{found}"
    );
    assert_eq!(found["clean"], true, "{found}");

    // What comes right behind the end of the call comes after what waited for it.
    let ended = format!("leads.cmd.{}.call.ended", stack.api.project_id);
    stack.publish(ended, json!({"leadId": lead, "callId": "c-1"}).to_string()).await;
    let after = stack.api.update(json!({"leadId": lead, "metadata": {"n": 3}, "expectedVersion": 4})).await;
    let mut versions = Vec::new();
    for update in held.iter().chain([&after]) {
        let story = stack.api.outcome(update).await;
        assert!(story.get("queuedUntil").is_none(), "{story}");
        versions.push((story["errorCode"].clone(), story["version"].clone()));
    }
    let ok = |version: u32| (Value::Null, json!(version));
    assert_eq!(versions, [ok(3), (json!("unknown_state"), Value::Null), ok(4), ok(5)]);
    assert_eq!(stack.count(HELD).await, 0);
    let found = settled(&stack).await;
    assert_eq!((&found["updates"]["succeeded"], &found["updates"]["failed"]), (&json!(5), &json!(1)), "{found}");
    let told = by_update(&stack.receiver.requests_to("/crm"));
    assert_eq!(told.len(), 6);
    assert!(told.values().all(|told| told.len() == 1), "{told:?}");
}

#[tokio::test]
async fn a_call_that_nobody_ends_lets_go_when_it_expires() {
    let (stack, [lead]) = queueing(["A"]).await;
    call(&stack, "started", json!({"leadId": lead, "timeoutSeconds": 2})).await;
    let held = stack.api.update(json!({"leadId": lead, "name": "Grace"})).await;
    stack.wait_for_count(HELD, 1, SOON).await;
    // Told too early, it changes nothing.
    call(&stack, "expired", json!({"leadId": lead})).await;
    assert_eq!(stack.count(HELD).await, 1);
    assert_eq!(stack.api.outcome(&held).await["status"], "succeeded");

    // The next call meets nothing of the one before, expired or not.
    call(&stack, "started", json!({"leadId": lead, "timeoutSeconds": 1})).await;
    let second = stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
    call(&stack, "started", json!({"leadId": lead, "callId": "next"})).await;
    let third = stack.api.update(json!({"leadId": lead, "name": "Eve"})).await;
    stack.wait_for_count(HELD, 2, SOON).await;
    call(&stack, "ended", json!({"leadId": lead})).await;
    for (update, version) in [(second, 3), (third, 4)] {
        assert_eq!(stack.api.outcome(&update).await["version"], version);
    }
    let found = settled(&stack).await;
    assert_eq!((&found["updates"]["accepted"], &found["updates"]["succeeded"]), (&json!(3), &json!(3)), "{found}");
}

#[tokio::test]
async fn a_full_queue_refuses_and_is_announced_whole_after_a_crash() {
    let (mut stack, [lead]) = queueing(["A"]).await;
    call(&stack, "started", json!({"leadId": lead})).await;
    let update = format!("leads.cmd.{}.update", stack.api.project_id);
    for number in 0..256 {
        let body = json!({"leadId": lead, "metadata": {format!("k{}", number % 7): number}}).to_string();
        stack.publish(update.clone(), body).await;
    }
    stack.wait_until_applied().await;
    assert_eq!(stack.count(HELD).await, 256);
    let one_too_many = stack.api.update(json!({"leadId": lead, "name": "Grace"})).await;
    let story = stack.api.outcome(&one_too_many).await;
    assert_eq!((&story["status"], &story["errorCode"]), (&json!("failed"), &json!("queue_full")), "{story}");

    call(&stack, "ended", json!({"leadId": lead})).await;
    assert_eq!(stack.count(HELD).await, 0);
    settled(&stack).await;
    // As if it had died before it noted that they are announced, and the events were lost as well: all that was decided
    // at one entry of the log is announced, not only as many as are read at once.
    stack.lead_state.kill9().await;
    sqlx::query("UPDATE lead_state.checkpoints SET generation = generation + 1, announced_sequence = 0")
        .execute(&stack.pool)
        .await
        .expect("set back");
    stack.lead_state.restart().await;
    let js = service_kit::nats::jetstream(&stack.client);
    eventually(SOON, "all are announced again", async || {
        let events = js.get_stream(contract::streams::LEAD_EVENTS).await.map_err(|e| e.to_string())?;
        let last = events.cached_info().state.last_sequence;
        if last == 2 * 257 { Ok(()) } else { Err(last.to_string()) }
    })
    .await;
    assert_eq!(settled(&stack).await["updates"]["succeeded"], 256);
    let versions = "SELECT count(DISTINCT version) FROM lead_state.lead_updates WHERE success";
    assert_eq!(stack.count(versions).await, 256);
}

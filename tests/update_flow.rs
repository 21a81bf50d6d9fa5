//! The path of an update: an update is accepted, the lead changes, and the webhook is delivered.

use std::time::Duration;

use contract::ObjectId;
use serde_json::json;
use service_kit::clock;

use crate::support::{
    Api, CALL_IN_PROGRESS, Stack, TEST_TIMEOUT, UPDATE, assert_includes, assert_main_job, assert_webhook_fields,
    process_id, secret, verify,
};

#[tokio::test]
async fn an_update_changes_the_lead_and_reaches_every_callback() {
    assert_main_job(&Stack::start().await).await;
}

#[tokio::test]
async fn an_update_during_a_call_fails_with_the_documented_error() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let process_id = process_id(&applied);
    let lead_id = stack.api.initiate(process_id, Some("AB123456789")).await;
    stack.publish_call("started", &json!({"leadId": lead_id})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 1).await;

    let update = json!({"leadId": lead_id, "metadata": {"make": "Toyota"}, "targetState": "lost"});
    let update_id = stack.api.update(update).await;

    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    verify(request, &secret(&applied.process, "crm"));
    let body = request.json();
    assert_webhook_fields(&body);
    let expected = json!({
        "action_type": "update", "updateId": update_id, "success": false, "error": CALL_IN_PROGRESS,
        "leadId": lead_id, "referenceId": "AB123456789", "timestamp": body["timestamp"], "data": null,
    });
    assert_eq!(body, expected);
    let lead = stack.api.lead(&lead_id).await;
    assert_includes(&lead, json!({"currentState": "new", "metadata": {"source": "import"}}));

    // The end of the call, addressed by reference, allows updates again.
    stack.publish_call("ended", &json!({"referenceId": "AB123456789", "processId": process_id})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 0).await;
    let timeline = stack.api.update_and_wait(json!({"leadId": lead_id, "targetState": "lost"})).await;
    assert_eq!(timeline["status"], "succeeded");
}

#[tokio::test]
async fn numbers_and_escapes_reach_the_webhook_unchanged() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    let metadata = r#"{"n":123456789012345678901234567890,"f":1.50,"e":1e5,"ü":"\u00e9\ud83d\ude00"}"#;

    let body = format!(r#"{{"leadId":"{lead_id}","metadata":{metadata}}}"#);
    let answer = stack.api.request(reqwest::Method::POST, UPDATE).body(body).send().await.expect("an answer");

    assert_eq!(answer.status().as_u16(), 200);
    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    let text = std::str::from_utf8(&request.body).expect("UTF-8");
    let merged = format!(r#""data":{{"source":"import",{}}}"#, &metadata[1..]);
    assert!(text.ends_with(&merged), "{text}");
}

#[tokio::test]
async fn a_lead_of_another_project_does_not_exist() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    stack.fallback_of(other.project_id, json!([{"name": "fallback", "url": stack.receiver.url("/fallback")}])).await;

    let (status, _) = other.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await;
    let update_id = other.update(json!({"leadId": lead_id, "name": "Mallory"})).await;

    assert_eq!(status, 404);
    let timeline = other.outcome(&update_id).await;
    assert_includes(&timeline, json!({"status": "failed", "errorCode": "lead_not_found"}));
    assert_eq!(stack.api.get(&format!("/api/v1/updates/{update_id}")).await.0, 404);
    // The failure is delivered to the caller's own fallback callback, not to the lead's callback.
    let request = &stack.receiver.wait_for_requests("/fallback", 1, TEST_TIMEOUT).await[0];
    assert_includes(&request.json(), json!({"updateId": update_id, "error": "Lead not found"}));
    assert!(stack.receiver.requests_to("/crm").is_empty());
}

#[tokio::test]
async fn changed_rules_apply_to_the_next_update() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let mut states = vec![json!({"name": "new", "kind": "initial"}), json!({"name": "interested"})];

    // Before each change, the leader has the old rules in its cache.
    for state in ["visited", "won"] {
        let to_state = json!({"leadId": lead_id, "targetState": state});
        let refused = stack.api.update_and_wait(to_state.clone()).await;
        states.push(json!({"name": state}));
        stack.apply(json!({"projectId": stack.api.project_id, "name": "sales", "states": states})).await;
        let accepted = stack.api.update_and_wait(to_state).await;

        assert_eq!(refused["errorCode"], "unknown_state", "{refused}");
        assert_eq!(accepted["status"], "succeeded", "{accepted}");
    }
}

#[tokio::test]
async fn an_update_with_an_old_id_is_pending_until_the_log_is_applied() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    // While this lock is held, the leader cannot write.
    let mut transaction = stack.pool.begin().await.expect("a transaction");
    let lock = sqlx::raw_sql("SELECT FROM lead_state.checkpoints FOR UPDATE").execute(&mut *transaction).await;
    lock.expect("the lock");
    // The id of a request that is repeated under its idempotency key.
    let id = ObjectId::new(clock::now().minus(Duration::from_secs(600)), [7; 8]);
    stack.publish_update(&json!({"updateId": id, "leadId": lead, "name": "Ada"})).await;

    let (status, before) = stack.api.get(&format!("/api/v1/updates/{id}")).await;
    transaction.commit().await.expect("committed");

    assert_eq!((status, &before["data"]["status"]), (200, &json!("pending")), "{before}");
    assert_eq!(stack.api.outcome(&id.to_string()).await["status"], "succeeded");
}

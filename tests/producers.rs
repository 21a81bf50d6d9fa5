//! Internal producers: any NATS client, with or without JetStream headers, takes the same path and gets the same
//! webhook.

use async_nats::HeaderMap;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{LEDGER_ROWS, Stack, TEST_TIMEOUT, process_id};

#[tokio::test]
async fn a_command_without_id_or_headers_is_applied() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;

    let command = json!({"leadId": lead_id, "metadata": {"a": 1}, "userId": "batch"});
    stack.publish_update(&command).await;

    let body = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0].json();
    assert_eq!(body["data"], json!({"source": "import", "a": 1}));
    // Its id is made from the log entry.
    let timeline = stack.api.outcome(body["updateId"].as_str().expect("an id")).await;
    assert_eq!(
        (&timeline["userId"], &timeline["apiKeyId"], &timeline["command"]),
        (&json!("batch"), &Value::Null, &command)
    );
}

#[tokio::test]
async fn a_command_repeated_under_other_message_ids_is_applied_once() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), Some("R-1")).await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let update_id = "65e4b2d9f1a2000000000001";
    let command = json!({"updateId": update_id, "referenceId": "R-1", "processId": process_id(&applied),
        "targetState": "lost"});
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);

    // As a producer does that never received the ack, or that repeats itself long after.
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", trace);
    for number in 1..=3 {
        headers.insert("Nats-Msg-Id", format!("retry-{number}"));
        let body = command.to_string().into();
        stack.client.publish_with_headers(subject.clone(), headers.clone(), body).await.expect("a publish");
    }
    stack.publish_update(&json!({"leadId": lead_id, "name": "Grace"})).await;

    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let of_command: Vec<_> = requests.iter().filter(|request| request.json()["updateId"] == update_id).collect();
    assert_eq!(of_command.len(), 1, "applied and announced once");
    assert_eq!(of_command[0].header("traceparent"), Some(trace));
    assert_eq!(stack.count(LEDGER_ROWS).await, 2);
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 3);
}

#[tokio::test]
async fn a_call_expires_by_its_own_timeout() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    stack.publish_call("started", &json!({"leadId": lead_id, "callId": "a", "timeoutSeconds": 1})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 1).await;

    let refused = stack.api.update_and_wait(json!({"leadId": lead_id, "name": "x"})).await;

    assert_eq!(refused["errorCode"], "call_in_progress");
    eventually(TEST_TIMEOUT, "the call has expired", async || {
        stack.api.update_and_wait(json!({"leadId": lead_id, "name": "x"})).await["status"] == "succeeded"
    })
    .await;
}

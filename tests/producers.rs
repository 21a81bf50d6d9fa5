//! Internal producers: any NATS client, with or without JetStream headers, takes the same path and gets the same webhook.

use serde_json::{Value, json};

use crate::stack::{SOON, Stack};

#[tokio::test]
async fn a_command_over_nats_is_a_command() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, Some("R-1")).await;
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);

    // No id, no headers: the id is made from the log entry.
    let plain = json!({"leadId": lead_id, "metadata": {"a": 1}, "userId": "batch"});
    stack.publish(subject.clone(), plain.to_string()).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    let update_id = request.json()["updateId"].as_str().expect("an id").to_owned();
    assert_eq!(request.json()["data"], json!({"source": "import", "a": 1}));
    let story = stack.api.outcome(&update_id).await;
    assert_eq!((&story["userId"], &story["apiKeyId"], &story["command"]), (&json!("batch"), &Value::Null, &plain));

    // With an id, message id and trace; by reference.
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let update_id = "65e4b2d9f1a2000000000001";
    let command = json!({"updateId": update_id, "referenceId": "R-1", "processId": process_id, "targetState": "lost"});
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("traceparent", trace);
    for number in 1..=3 {
        // Three times, as a producer that never heard the ack does, and long after: each under another message id.
        headers.insert("Nats-Msg-Id", format!("retry-{number}"));
        stack
            .client
            .publish_with_headers(subject.clone(), headers.clone(), command.to_string().into())
            .await
            .expect("publish");
    }
    let after = json!({"leadId": lead_id, "name": "Grace"});
    stack.publish(subject, after.to_string()).await;
    let requests = stack.receiver.wait_for_requests("/crm", 3, SOON).await;
    let of_retries: Vec<_> = requests.iter().filter(|request| request.json()["updateId"] == update_id).collect();
    assert_eq!(of_retries.len(), 1, "applied and announced once");
    assert_eq!(of_retries[0].header("traceparent"), Some(trace));
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 3);
    // The refused repetitions moved nothing: the name came right after.
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 4);
}

#[tokio::test]
async fn a_call_expires_and_a_second_call_holds_on() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let started = format!("leads.cmd.{}.call.started", stack.api.project_id);
    stack.publish(started.clone(), json!({"leadId": lead_id, "callId": "a", "timeoutSeconds": 1}).to_string()).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 1, SOON).await;
    let refused = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    assert_eq!(stack.api.outcome(&refused).await["errorCode"], "call_in_progress");
    test_support::eventually(SOON, "the call has expired", async || {
        let update = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
        stack.api.outcome(&update).await["status"] == "succeeded"
    })
    .await;
}

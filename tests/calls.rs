//! Calls reported over HTTP: they are applied in order with updates, exactly once, and shown like updates.

use contract::streams::LEAD_COMMANDS;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    CALL_IN_PROGRESS, Stack, all_pages, assert_includes, assert_ok, assert_refused, ids, process_id, send,
};

const STARTED: &str = "/api/v1/calls/started";
const ENDED: &str = "/api/v1/calls/ended";
const CALLS: &str = "/api/v1/calls";
const WAIT: (&str, &str) = ("prefer", "wait=30");

/// Reports a call event with `Prefer: wait`, and returns the response.
async fn report(stack: &Stack, path: &str, body: Value) -> Value {
    assert_ok(stack.api.ask(Method::POST, path, &[WAIT], &body).await)
}

/// The calls in progress, as the list shows them.
async fn calls(stack: &Stack) -> Vec<Value> {
    assert_ok(stack.api.get(CALLS).await)["data"].as_array().expect("a list").clone()
}

#[tokio::test]
async fn a_call_that_expired_long_ago_is_deleted() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    report(&stack, STARTED, json!({"leadId": lead, "callId": "c-1", "timeoutSeconds": 600})).await;

    stack.sql("UPDATE lead_state.active_calls SET expires_at = now() - interval '25 hours'").await;

    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 0).await;
}

#[tokio::test]
async fn an_update_between_the_start_and_the_end_of_a_call_fails_with_the_documented_error() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&["crm"]).await);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    let update = json!({"leadId": lead, "name": "Grace"});

    let started = report(&stack, STARTED, json!({"leadId": lead, "callId": "c-1", "timeoutSeconds": 600})).await;
    let during = stack.api.update_and_wait(update.clone()).await;
    let listed = calls(&stack).await;
    let ended = report(&stack, ENDED, json!({"referenceId": "R-1", "processId": process_id, "callId": "c-1"})).await;
    let after = stack.api.update_and_wait(update).await;

    assert_eq!(during["outcome"]["error"], CALL_IN_PROGRESS);
    assert_eq!(after["status"], "succeeded");
    for (response, kind) in [(&started, "call.started"), (&ended, "call.ended")] {
        let outcome = json!({
            "action_type": kind, "updateId": response["updateId"], "success": true, "error": null, "leadId": lead,
            "referenceId": "R-1", "timestamp": response["outcome"]["timestamp"], "data": null,
        });
        assert_eq!(response["outcome"], outcome);
    }
    assert_includes(
        &listed[0],
        json!({"leadId": lead, "processId": process_id, "referenceId": "R-1", "callId": "c-1"}),
    );
    assert_eq!((listed.len(), calls(&stack).await), (1, vec![]));
    // Only the two updates were delivered.
    stack.wait_for_clean_audit().await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 2);
}

#[tokio::test]
async fn a_call_event_has_a_timeline_and_is_in_the_history_of_its_lead() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;

    let started = report(&stack, STARTED, json!({"leadId": lead, "callId": "c-1"})).await;
    let id = started["updateId"].as_str().expect("an id");

    let timeline = assert_ok(stack.api.get(&format!("/api/v1/updates/{id}")).await);
    let command = json!({"updateId": id, "leadId": lead, "callId": "c-1", "apiKeyId": timeline["data"]["apiKeyId"]});
    assert_includes(&timeline["data"], json!({"status": "succeeded", "outcome": started["outcome"], "version": null}));
    assert_eq!((&timeline["data"]["command"], &timeline["data"]["deliveries"]), (&command, &json!([])));
    assert!(timeline["data"]["apiKeyId"].is_string(), "{timeline}");
    let history = assert_ok(stack.api.get(&format!("/api/v1/leads/{lead}/updates")).await);
    assert_includes(&history["data"][0], json!({"kind": "call.started", "updateId": id, "status": "succeeded"}));
    assert_includes(&stack.api.lead(&lead).await["activities"][0], json!({"kind": "call.started", "updateId": id}));
}

#[tokio::test]
async fn a_call_event_for_an_unknown_lead_fails_as_an_update_does() {
    let stack = Stack::start().await;
    stack.process_calling(&["crm"]).await;

    let response = report(&stack, ENDED, json!({"leadId": "f".repeat(24)})).await;

    assert_includes(&response["outcome"], json!({"success": false, "error": "Lead not found", "data": null}));
    let id = response["updateId"].as_str().expect("an id");
    let timeline = assert_ok(stack.api.get(&format!("/api/v1/updates/{id}")).await);
    assert_includes(&timeline["data"], json!({"status": "failed", "errorCode": "lead_not_found"}));
    assert_eq!(stack.dead_letters().await, 0);
}

#[tokio::test]
async fn a_call_event_repeated_under_one_idempotency_key_is_applied_once() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let body = json!({"leadId": lead});
    let key = [("idempotency-key", "call-7"), WAIT];

    let first = assert_ok(stack.api.ask(Method::POST, STARTED, &key, &body).await);
    let ended = report(&stack, ENDED, body.clone()).await;
    let again = assert_ok(stack.api.ask(Method::POST, STARTED, &key, &body).await);
    let conflict = stack.api.ask(Method::POST, ENDED, &key, &body).await;

    assert_eq!(again["updateId"], first["updateId"]);
    assert_ne!(ended["updateId"], first["updateId"]);
    assert_refused(conflict, 422, "idempotency_key_reused");
    stack.wait_until_applied().await;
    assert_eq!(calls(&stack).await, [] as [Value; 0], "the repeated start began no second call");
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn call_events_in_bulk_are_accepted_or_refused_line_by_line() {
    let stack = Stack::start().await;
    let leads = stack.leads(&[], 3).await;
    let line = |body: Value| format!("{body}\n");
    let starts: String = leads.iter().map(|lead| line(json!({"leadId": lead, "callId": "bulk"}))).collect();
    let starts = starts + &line(json!({"leadId": leads[0], "call_id": "c"})) + &line(json!({"callId": "c"}));
    let bulk = async |path: &str, body: String| -> Vec<Value> {
        let request = stack.api.request(Method::POST, &format!("{path}/bulk")).header("idempotency-key", path);
        let response =
            request.header("content-type", "application/x-ndjson").body(body).send().await.expect("a response");
        let text = response.text().await.expect("a body");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };

    let started = bulk(STARTED, starts.clone()).await;
    let again = bulk(STARTED, starts).await;

    let codes: Vec<_> = started.iter().map(|result| result["code"].as_str().unwrap_or("accepted")).collect();
    assert_eq!(codes, ["accepted", "accepted", "accepted", "invalid_field", "address_missing"]);
    assert_eq!(started[..3], again[..3], "repeated lines are the same events");
    for id in ids(&started[..3], "updateId") {
        assert_eq!(stack.api.outcome(&id).await["status"], "succeeded");
    }
    let (listed, pages) = all_pages(&stack.api, "/api/v1/calls?", 2).await;
    assert_eq!((listed.len(), pages), (3, 2), "{listed:?}");
    let of_first = assert_ok(stack.api.get(&format!("{CALLS}?leadId={}", leads[0])).await);
    assert_eq!(of_first["data"].as_array().map(Vec::len), Some(1), "{of_first}");
    let ends = leads.iter().map(|lead| line(json!({"leadId": lead}))).collect();
    let last = ids(&bulk(ENDED, ends).await, "updateId").pop().expect("an id");
    stack.api.outcome(&last).await;
    assert_eq!(calls(&stack).await, [] as [Value; 0]);
}

#[tokio::test]
async fn a_call_event_that_depends_on_the_lead_or_has_parameters_is_refused() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;

    let conditional = stack.api.ask(Method::POST, STARTED, &[("if-match", "\"1\"")], &json!({"leadId": lead})).await;
    let parameters = send(stack.api.request(Method::POST, &format!("{ENDED}?dryRun=true")).body("{}")).await;

    assert_refused(conditional, 400, "invalid_field");
    assert_refused(parameters, 400, "invalid_field");
    assert_eq!(stack.stream_state(LEAD_COMMANDS).await.last_sequence, 0);
}

#[tokio::test]
async fn leadctl_reports_calls_and_lists_those_in_progress() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;

    let start = ["call", "start", "--lead-id", &lead, "--call-id", "c-1", "--timeout", "10m", "--wait", "--json"];
    let started = stack.leadctl(&start).await.assert_ok().json();
    let listed = stack.leadctl_of_project(&["call", "list", "--json"]).await.assert_ok().json();
    let shown = stack.leadctl(&["update", "get", started["updateId"].as_str().expect("an id")]).await.assert_ok();
    stack.leadctl(&["call", "end", "--lead-id", &lead, "--wait"]).await.assert_ok().assert_prints(&["succeeded"]);
    let unknown = stack.leadctl(&["call", "end", "--lead-id", &"f".repeat(24), "--wait"]).await;

    assert_eq!(started["status"], "succeeded");
    assert_includes(&listed, json!({"leadId": lead, "callId": "c-1"}));
    shown.assert_prints(&["call.started "]);
    unknown.assert_code(5).assert_prints(&["Lead not found"]);
    stack.leadctl_of_project(&["call", "list"]).await.assert_ok().assert_prints(&["no calls in progress"]);
}

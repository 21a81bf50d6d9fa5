//! Options of update requests beyond the vendor's API: an expected version or state of the lead (`If-Match`,
//! `?expectedState=`), a preview (`?dryRun=true`), and the outcome in the response (`Prefer: wait`).

use std::time::{Duration, Instant};

use contract::streams::LEAD_COMMANDS;
use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{
    Api, CALL_IN_PROGRESS, LEDGER_ROWS, Stack, TEST_TIMEOUT, UPDATE, assert_includes, assert_refused, by_update,
    process_id,
};

struct Answer {
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn update_id(&self) -> &str {
        self.body["updateId"].as_str().unwrap_or_else(|| panic!("not accepted: {}", self.body))
    }
}

/// Posts an update with these headers, which must be answered with 200.
async fn post(api: &Api, headers: &[(&str, &str)], body: &Value) -> Answer {
    post_with(api, "", headers, body).await
}

/// Posts an update with this query string.
async fn post_with(api: &Api, query: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    let request = api.request(Method::POST, &format!("{UPDATE}{query}")).body(body.to_string());
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let answer = request.send().await.expect("an answer");
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    let body: Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    assert_eq!(status, 200, "{body}");
    Answer { headers, body }
}

/// Posts an update with these headers, waits for its outcome, and returns its timeline.
async fn outcome(api: &Api, headers: &[(&str, &str)], body: &Value) -> Value {
    api.outcome(post(api, headers, body).await.update_id()).await
}

/// The entity tag of a lead.
async fn etag(api: &Api, lead_id: &str) -> String {
    let request = api.request(Method::GET, &format!("/api/v1/leads/get?leadId={lead_id}"));
    let answer = request.send().await.expect("an answer");
    answer.headers()["etag"].to_str().expect("text").to_owned()
}

#[tokio::test]
async fn of_two_updates_of_one_seen_version_the_second_fails() {
    let stack = Stack::start().await;
    let (api, lead_id) = (&stack.api, stack.lead(&[]).await);
    let seen = etag(api, &lead_id).await;
    assert_eq!(seen, "\"1\"");

    let first = json!({"leadId": lead_id, "targetState": "interested"});
    let first = outcome(api, &[("if-match", &seen)], &first).await;
    let second = outcome(api, &[("if-match", &seen)], &json!({"leadId": lead_id, "name": "Eve"})).await;

    assert_eq!(first["status"], "succeeded", "{first}");
    let error = "Lead is at version 2, not at the expected version 1";
    let expected = json!({"status": "failed", "errorCode": "version_mismatch", "outcome": {"error": error}});
    assert_includes(&second, expected);
    assert_eq!(etag(api, &lead_id).await, "\"2\"");
}

#[tokio::test]
async fn an_update_expecting_another_state_fails() {
    let stack = Stack::start().await;
    let (api, lead_id) = (&stack.api, stack.lead(&[]).await);

    let rename = json!({"leadId": lead_id, "name": "Eve"});
    let expecting = async |state: &str, headers: &[(&str, &str)]| {
        let answer = post_with(api, &format!("?expectedState={state}"), headers, &rename).await;
        api.outcome(answer.update_id()).await
    };

    let refused = expecting("interested", &[]).await;
    let accepted = expecting("new", &[("if-match", "\"1\"")]).await;
    let unknown = api.post(&format!("{UPDATE}?expected_state=new"), &rename).await;

    let error = "Lead is in the state \"new\", not in the expected state \"interested\"";
    let expected = json!({"status": "failed", "errorCode": "state_mismatch", "outcome": {"error": error}});
    assert_includes(&refused, expected);
    assert_includes(&accepted, json!({"status": "succeeded", "version": 2}));
    assert_refused(unknown, 400, "invalid_field");
}

#[tokio::test]
async fn an_expectation_is_part_of_the_request_behind_an_idempotency_key() {
    let stack = Stack::start().await;
    let (api, lead_id) = (&stack.api, stack.lead(&[]).await);
    let rename = json!({"leadId": lead_id, "name": "Ada"});

    let first = post(api, &[("idempotency-key", "k"), ("if-match", "\"1\"")], &rename).await;
    let again = post(api, &[("idempotency-key", "k"), ("if-match", "\"1\"")], &rename).await;

    assert_eq!(again.update_id(), first.update_id());
    let other = [("idempotency-key", "k"), ("if-match", "\"4\"")];
    assert_refused(api.ask(Method::POST, UPDATE, &other, &rename).await, 422, "idempotency_key_reused");
    assert_refused(api.ask(Method::POST, UPDATE, &[("if-match", "3")], &rename).await, 400, "invalid_field");
    assert_eq!(api.outcome(first.update_id()).await["status"], "succeeded");
}

#[tokio::test]
async fn a_dry_run_previews_the_outcome_and_changes_nothing() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let process_id = process_id(&applied);
    let lead_id = stack.api.initiate(process_id, Some("R")).await;
    let dry_run = async |body: &Value| {
        let answer = post_with(&stack.api, "?dryRun=true", &[("idempotency-key", "k")], body).await;
        assert!(answer.body["dryRun"] == true && answer.body.get("updateId").is_none(), "{}", answer.body);
        answer.body["outcome"].clone()
    };
    let change = json!({
        "referenceId": "R", "projectId": stack.api.project_id, "processId": process_id, "targetState": "interested",
        "metadata": {"n": 1.5},
    });

    let preview = dry_run(&change).await;
    let refused = dry_run(&json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    let unknown = dry_run(&json!({"leadId": "00000000000000000000dead", "name": "Ada"})).await;

    let expected = json!({
        "success": true, "error": null, "errorCode": null, "leadId": lead_id, "referenceId": "R", "fromState": "new",
        "toState": "interested", "version": 2, "data": {"source": "import", "n": 1.5},
    });
    assert_eq!(preview, expected);
    assert_includes(&refused, json!({"success": false, "errorCode": "unknown_state"}));
    assert_includes(&unknown, json!({"errorCode": "lead_not_found", "fromState": null}));
    assert_eq!(stack.stream_state(LEAD_COMMANDS).await.last_sequence, 0);
    assert_eq!(stack.count(LEDGER_ROWS).await, 0);
    assert_eq!(etag(&stack.api, &lead_id).await, "\"1\"");

    // The idempotency key is still unused, and the update has the previewed outcome.
    let made = post(&stack.api, &[("idempotency-key", "k")], &change).await;
    assert_eq!(made.headers.get("idempotent-replayed"), None);
    let timeline = stack.api.outcome(made.update_id()).await;
    assert_includes(&timeline, json!({"fromState": "new", "toState": "interested", "version": 2}));
    assert_eq!(timeline["outcome"]["data"], preview["data"]);
    assert_eq!(stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await.len(), 1);
}

/// Posts an update that prefers to wait for its outcome.
async fn wait(api: &Api, key: &str, seconds: u32, body: &Value) -> (Answer, Duration) {
    let begun = Instant::now();
    let preference = format!("respond-async, wait={seconds}");
    let answer = post(api, &[("prefer", &preference), ("idempotency-key", key)], body).await;
    (answer, begun.elapsed())
}

#[tokio::test]
async fn each_waiting_request_is_answered_with_its_own_outcome() {
    let stack = Stack::start().await;
    let (api, lead_id) = (&stack.api, &stack.lead(&["crm"]).await);

    // The second round repeats the idempotency keys after the outcomes are known.
    for _ in 0..2 {
        let many = (0..50).map(async |n| {
            let body = json!({"leadId": lead_id, "metadata": {format!("k{n}"): n}});
            (n, wait(api, &format!("many-{n}"), 30, &body).await)
        });
        for (n, (answer, _)) in futures::future::join_all(many).await {
            assert_eq!(answer.headers["preference-applied"], "wait=30");
            let outcome = &answer.body["outcome"];
            assert_includes(outcome, json!({"updateId": answer.update_id(), "success": true}));
            assert_eq!(outcome["data"][format!("k{n}")], n, "{outcome}");
        }
        stack.receiver.wait_for_requests("/crm", 50, TEST_TIMEOUT).await;
    }

    // The outcome is the body of the webhook.
    let (answer, _) = wait(api, "many-7", 30, &json!({"leadId": lead_id, "metadata": {"k7": 7}})).await;
    let webhooks = by_update(&stack.receiver.requests_to("/crm"));
    assert_eq!(webhooks[answer.update_id()], [answer.body["outcome"].clone()]);
}

#[tokio::test]
async fn a_waiting_request_is_answered_with_a_failure() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    stack.publish_call("started", &json!({"leadId": lead_id})).await;

    let (answer, _) = wait(&stack.api, "refused", 30, &json!({"leadId": lead_id, "name": "Eve"})).await;

    assert_includes(&answer.body["outcome"], json!({"success": false, "error": CALL_IN_PROGRESS}));
}

#[tokio::test]
async fn an_undecided_update_is_answered_at_the_timeout_or_when_the_gateway_stops() {
    let mut stack = Stack::start().await;
    let (api, lead_id) = (stack.api.clone(), stack.lead(&[]).await);
    let rename = json!({"leadId": lead_id, "name": "Eve"});
    stack.lead_state.terminate().await;

    let (late, took) = wait(&api, "late", 1, &rename).await;
    let log = stack.js().get_stream(LEAD_COMMANDS).await.expect("the log");
    let logged = log.cached_info().state.last_sequence;
    let stopping = async {
        eventually(TEST_TIMEOUT, "the update is logged", async || {
            let last = log.get_info().await.expect("its state").state.last_sequence;
            if last == logged + 1 { Ok(()) } else { Err(last) }
        })
        .await;
        assert!(stack.gateway.terminate().await.success());
    };
    let ((stopped, _), ()) = tokio::join!(wait(&api, "stopped", 30, &rename), stopping);

    assert!(took >= Duration::from_secs(1), "{took:?}");
    for answer in [late, stopped] {
        assert!(answer.body["updateId"].is_string() && answer.body.get("outcome").is_none(), "{}", answer.body);
        assert!(answer.headers.get("preference-applied").is_none());
    }
}

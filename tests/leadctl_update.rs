//! `leadctl update` sends an update with all options of the gateway, and follows it to its end.

use std::{process::Stdio, time::Duration};

use serde_json::{Value, json};
use test_support::Reply;

use crate::support::{Stack, TEST_TIMEOUT, assert_includes};

/// Exit codes of leadctl.
const NOT_FOUND: i32 = 3;
const UNAVAILABLE: i32 = 4;
const UPDATE_FAILED: i32 = 5;
const DELIVERY_EXHAUSTED: i32 = 6;
const PENDING: i32 = 7;

/// Runs `leadctl update send` for a lead, and returns the exit code and the last printed value.
async fn send(stack: &Stack, lead: &str, args: &[&str]) -> (i32, Value) {
    let run = stack.leadctl(&[&["update", "send", "--lead-id", lead, "--json"], args].concat()).await;
    (run.code, run.json_lines().pop().unwrap_or_default())
}

#[tokio::test]
async fn watch_ends_with_the_deliveries_and_exits_by_their_outcome() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    let lead = stack.lead(&["crm"]).await;
    stack.receiver.on("/crm", [Reply::status(500), Reply::status(200), Reply::status(200), Reply::status(500)]);

    for (state, code, status, delivery) in [
        ("interested", 0, "succeeded", "delivered"),
        ("nowhere", UPDATE_FAILED, "failed", "delivered"),
        ("followup_2", DELIVERY_EXHAUSTED, "succeeded", "exhausted"),
    ] {
        let update = stack.api.update(json!({"leadId": lead, "targetState": state})).await;
        let run = stack.leadctl(&["update", "watch", &update, "--json"]).await.assert_code(code);
        let last = &run.json_lines().pop().expect("a timeline")["data"];
        assert_eq!((&last["status"], &last["deliveries"][0]["status"]), (&json!(status), &json!(delivery)), "{last}");
    }
    stack.receiver.wait_for_requests("/crm", 5, TEST_TIMEOUT).await;
    stack.leadctl(&["update", "watch", "0123456789abcdef01234567"]).await.assert_code(NOT_FOUND);
}

#[tokio::test]
async fn watch_waits_for_deliveries_that_are_not_recorded_and_through_an_outage() {
    let mut stack = Stack::start().await;
    let lead = stack.lead(&["crm", "slow"]).await;
    stack.receiver.on("/slow", [Reply::status(200).after(Duration::from_secs(6))]);
    let update = stack.api.update(json!({"leadId": lead, "targetState": "interested"})).await;
    stack.receiver.wait_for_requests("/slow", 1, TEST_TIMEOUT).await;

    let run = stack.leadctl(&["update", "watch", &update, "--timeout", "1s", "--json"]).await.assert_code(PENDING);
    let last = &run.json_lines().pop().expect("a timeline")["data"];
    assert_eq!((&last["deliveries"][0]["status"], &last["unrecorded"]), (&json!("delivered"), &json!(1)), "{last}");

    stack.gateway.kill9().await;
    let mut watch = stack.leadctl_command(&["update", "watch", &update, "--json"]);
    let watch = watch.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("leadctl");
    stack.gateway.restart().await;
    let output = watch.wait_with_output().await.expect("an end");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let timeline = stack.api.outcome(&update).await;
    assert_eq!((timeline["deliveries"].as_array().map(Vec::len), &timeline["unrecorded"]), (Some(2), &json!(0)));
}

#[tokio::test]
async fn update_send_exits_by_what_became_of_the_update() {
    let stack = Stack::start().await;
    let leads = stack.leads(&[], 5).await;
    a_dry_run_shows_the_outcome_and_exits_by_it(&stack, &leads[0]).await;
    metadata_comes_from_a_file_and_single_fields(&stack, &leads[1]).await;
    an_unmet_expectation_fails_the_update_and_with_wait_the_command(&stack, &leads[2]).await;
    one_idempotency_key_sends_one_update(&stack, &leads[3]).await;
    an_undecided_update_is_pending_and_a_missing_gateway_unavailable(stack, &leads[4]).await;
}

async fn a_dry_run_shows_the_outcome_and_exits_by_it(stack: &Stack, lead: &str) {
    let (code, answer) = send(stack, lead, &["--target-state", "interested", "--dry-run"]).await;
    assert_eq!((code, &answer["outcome"]["toState"]), (0, &json!("interested")), "{answer}");

    let (code, answer) = send(stack, lead, &["--target-state", "nowhere", "--dry-run"]).await;
    assert_eq!((code, &answer["outcome"]["errorCode"]), (UPDATE_FAILED, &json!("unknown_state")), "{answer}");
}

async fn metadata_comes_from_a_file_and_single_fields(stack: &Stack, lead: &str) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), r#"{"make": "Kia", "price": 1.50}"#).expect("a file");

    let metadata = format!("@{}", file.path().display());
    let args = ["--metadata", &metadata, "--set", "make=Toyota", "--expected-version", "1", "--wait"];
    let (code, answer) = send(stack, lead, &args).await;

    assert_eq!((code, &answer["status"]), (0, &json!("succeeded")), "{answer}");
    let lead = stack.api.lead(lead).await;
    assert_eq!(lead["metadata"], json!({"source": "import", "make": "Toyota", "price": 1.50}));
}

async fn an_unmet_expectation_fails_the_update_and_with_wait_the_command(stack: &Stack, lead: &str) {
    let (code, answer) = send(stack, lead, &["--name", "Eve", "--if-match", "2", "--wait=20"]).await;
    assert_eq!((code, &answer["status"]), (UPDATE_FAILED, &json!("failed")), "{answer}");
    assert!(answer["error"].as_str().is_some_and(|error| error.contains('1')), "the version is named: {answer}");

    // Without --wait the exit code shows only that the update was accepted.
    let (code, answer) = send(stack, lead, &["--name", "Eve", "--expected-state", "lost"]).await;
    assert_eq!((code, &answer["status"]), (0, &json!("failed")), "{answer}");
}

async fn one_idempotency_key_sends_one_update(stack: &Stack, lead: &str) {
    let keyed = ["--idempotency-key", "a \"key\"", "--name"];

    let (_, one) = send(stack, lead, &[&keyed[..], &["Eve"]].concat()).await;
    let (code, two) = send(stack, lead, &[&keyed[..], &["Eve"]].concat()).await;
    let (code_of_other, _) = send(stack, lead, &[&keyed[..], &["Ida"]].concat()).await;

    assert_eq!(code, 0);
    assert_includes(&two, json!({"updateId": one["updateId"], "status": "succeeded"}));
    assert_eq!(code_of_other, 1, "another update under the same key");
    let shown = stack.leadctl(&["update", "get", two["updateId"].as_str().expect("an id")]).await;
    shown.assert_prints(&["succeeded"]);
}

async fn an_undecided_update_is_pending_and_a_missing_gateway_unavailable(mut stack: Stack, lead: &str) {
    stack.lead_state.terminate().await;
    let (code, answer) = send(&stack, lead, &["--name", "Ida", "--wait=1"]).await;
    assert_eq!((code, &answer["status"]), (PENDING, &json!("pending")), "{answer}");

    stack.gateway.terminate().await;
    assert_eq!(send(&stack, lead, &["--name", "Ida"]).await.0, UNAVAILABLE);
}

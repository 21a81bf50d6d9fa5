//! `leadctl doctor`: a healthy installation has no findings. A fault that the test causes is reported with the command
//! that fixes it.

use std::time::Duration;

use async_nats::jetstream::stream;
use contract::streams::LEAD_EVENTS;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{LeadctlRun, Stack, TEST_TIMEOUT, process_id};

/// The exit code for findings that are only warnings.
const WARNINGS: i32 = 9;
const FAILED: i32 = 8;

/// The checks that an installation passes.
const CHECKS: [&str; 22] = [
    "stream LEAD_COMMANDS",
    "bucket api_keys",
    "events to deliver",
    "dead letters",
    "log, ledger and events",
    "lead-state",
    "webhook-notifier",
    "postgres version",
    "clock of Postgres",
    "schema lead_state",
    "schema webhooks",
    "leader",
    "log to apply",
    "updates to announce",
    "partitions",
    "projection",
    "callbacks",
    "parked events",
    "deliveries",
    "calls",
    "queued updates",
    "replication",
];

/// Runs the doctor, and returns the exit code and the checks.
async fn doctor(stack: &Stack, args: &[&str]) -> (i32, Vec<Value>) {
    let run = stack.leadctl(&[&["doctor", "--json"], args].concat()).await;
    (run.code, run.json()["checks"].as_array().expect("checks").clone())
}

/// The checks that are neither ok nor unknown, except for the version of the server that the test runs on.
fn findings(checks: &[Value]) -> Vec<Value> {
    let amiss = |check: &&Value| {
        check["check"] != "nats version" && !["ok", "unknown"].contains(&check["state"].as_str().expect("a state"))
    };
    checks.iter().filter(amiss).cloned().collect()
}

/// Waits until a check has this state, and returns the check.
async fn wait_for(stack: &Stack, what: &str, state: &str) -> Value {
    eventually(TEST_TIMEOUT, what, async || {
        let (_, checks) = doctor(stack, &[]).await;
        let found = checks.iter().find(|check| check["check"] == what && check["state"] == state);
        found.cloned().ok_or_else(|| format!("{checks:?}"))
    })
    .await
}

/// Waits until a check has this state and this finding, and returns the check.
async fn wait_for_finding(stack: &Stack, what: &str, state: &str, finding: &str) -> Value {
    let check = wait_for(stack, what, state).await;
    assert!(check["finding"].as_str().is_some_and(|found| found.starts_with(finding)), "{check}");
    check
}

#[tokio::test]
async fn a_healthy_installation_has_no_findings() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;

    let health = [&stack.gateway_ready, &stack.lead_state_ready, &stack.notifier_ready].map(|url| url.as_str());
    let (code, checks) = doctor(&stack, &["--health", &health.join(",")]).await;

    assert_eq!(findings(&checks), Vec::<Value>::new());
    let old = stack.nats.version() < (2, 15, 0);
    assert_eq!(code, if old { WARNINGS } else { 0 }, "{checks:?}");
    let whats: Vec<_> = checks.iter().map(|check| check["check"].as_str().expect("a check")).collect();
    for what in CHECKS {
        assert!(whats.contains(&what), "{what} was not checked: {whats:?}");
    }
    for service in ["gateway", "lead_state", "webhook_notifier"] {
        let at_url = format!("{service} at http://");
        let of_service = |check: &&Value| check["check"].as_str().is_some_and(|what| what.starts_with(&at_url));
        let check = checks.iter().find(of_service).unwrap_or_else(|| panic!("{service}: {whats:?}"));
        assert_eq!(check["finding"], concat!("ready, version ", env!("CARGO_PKG_VERSION")));
    }
    let printed = stack.leadctl(&["doctor"]).await.stdout;
    assert!(printed.contains("\nHEALTHY") && !printed.contains("FAILED"), "{printed}");
}

#[tokio::test]
async fn a_stream_that_drops_unread_events_is_reported_with_the_command_that_mends_it() {
    let stack = Stack::start().await;
    let js = stack.js();
    let config = js.get_stream(LEAD_EVENTS).await.expect("the events").cached_info().config.clone();

    js.update_stream(stream::Config { max_age: Duration::from_secs(3600), ..config }).await.expect("an update");

    let found = wait_for(&stack, "stream LEAD_EVENTS", "failed").await;
    assert_eq!(found["advice"], "nats stream edit LEAD_EVENTS --max-age=0", "{found}");
}

#[tokio::test]
async fn broken_tables_disabled_callbacks_and_dead_letters_are_reported() {
    let stack = Stack::start().await;
    let callback_id = stack.process_calling(&["crm"]).await.process.callbacks[0].callback_id;
    let month = "SELECT to_char(now() AT TIME ZONE 'UTC' + interval '1 month', 'YYYY_MM')";
    let next: String = sqlx::query_scalar(month).fetch_one(&stack.pool).await.expect("a month");

    stack.sql(&format!("ALTER TABLE lead_state.lead_updates DETACH PARTITION lead_state.lead_updates_{next}")).await;
    wait_for_finding(&stack, "partitions", "failed", &format!("lead_updates_{next} missing")).await;

    let disabled = format!(
        "INSERT INTO webhooks.callback_health (callback_id, project_id, disabled_at, reason)
         VALUES (decode('{callback_id}', 'hex'), decode('{}', 'hex'), now(), '410 Gone')",
        stack.api.project_id
    );
    stack.sql(&disabled).await;
    wait_for_finding(&stack, "callbacks", "warning", &format!("1 disabled: {callback_id} (410 Gone)")).await;

    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    wait_for_finding(&stack, "dead letters", "warning", "1 leads.dead.invalid_json").await;

    stack.sql("UPDATE webhooks._sqlx_migrations SET version = -1 WHERE version = 1").await;
    let found = wait_for_finding(&stack, "schema webhooks", "failed", "lacks migrations [1]").await;
    assert_eq!(found["advice"], "leadctl migrate");
}

#[tokio::test]
async fn missing_services_are_reported() {
    let mut stack = Stack::start().await;
    let ready = stack.notifier_ready.clone();

    assert!(stack.notifier.terminate().await.success());
    wait_for_finding(&stack, "webhook-notifier", "failed", "no replica answers").await;
    wait_for(&stack, "events to deliver", "failed").await;
    let (code, checks) = doctor(&stack, &["--health", &ready, "--nats-monitor", "http://127.0.0.1:9"]).await;
    assert_eq!(code, FAILED);
    for what in ["service at http://", "nats at http://"] {
        let failed = |check: &Value| {
            check["check"].as_str().is_some_and(|text| text.starts_with(what)) && check["state"] == "failed"
        };
        assert!(checks.iter().any(failed), "{what}: {checks:?}");
    }

    assert!(stack.lead_state.terminate().await.success());
    wait_for(&stack, "lead-state", "failed").await;
    let found = wait_for(&stack, "log, ledger and events", "failed").await;
    assert!(found["advice"].as_str().expect("text").contains("start lead-state"), "{found}");
}

#[tokio::test]
async fn queued_updates_behind_an_expired_call_are_reported_after_ten_minutes() {
    let mut stack = Stack::start().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "queueing", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}],
    });
    let lead_id = stack.api.initiate(process_id(&stack.apply(spec).await), None).await;
    stack.publish_call("started", &json!({"leadId": lead_id})).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.queued_updates", 1).await;
    assert_eq!(findings(&doctor(&stack, &[]).await.1), Vec::<Value>::new());
    // Stops lead-state, because it would publish the expiry.
    assert!(stack.lead_state.terminate().await.success());

    let expired =
        |minutes: u32| format!("UPDATE lead_state.active_calls SET expires_at = now() - interval '{minutes} minutes'");
    stack.sql(&expired(9)).await;
    wait_for(&stack, "queued updates", "ok").await;
    stack.sql(&expired(11)).await;
    wait_for_finding(&stack, "queued updates", "warning", "of 1 leads are still queued").await;
}

#[tokio::test]
async fn unreachable_servers_are_reported() {
    let stack = Stack::start().await;
    let mut command = stack.leadctl_command(&["doctor", "--json"]);
    command.env("DATABASE_URL", "postgres://127.0.0.1:9/x").env("NATS_URL", "nats://127.0.0.1:9");

    let run = LeadctlRun::of(command).await.assert_code(FAILED);

    run.assert_prints(&[r#""check":"postgres","state":"failed""#, r#""check":"nats","state":"failed""#]);
}

//! `leadctl doctor`: nothing to say of what is healthy; what is broken by hand is named, and how to mend it.

use std::time::Duration;

use contract::streams::LEAD_EVENTS;
use serde_json::{Value, json};
use test_support::{binary, eventually};

use crate::stack::{SOON, Stack};

/// Examines: the exit code and what was found.
async fn doctor(stack: &Stack, args: &[&str]) -> (i32, Vec<Value>) {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    command.args(["doctor", "--json"]).args(args);
    command.env("DATABASE_URL", stack.postgres.url()).env("NATS_URL", stack.nats.url());
    let output = command.output().await.expect("leadctl");
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    (output.status.code().expect("a code"), found["checks"].as_array().expect("checks").clone())
}

/// What is neither well nor unknown. An old server is none of the test's doing.
fn findings(checks: &[Value]) -> Vec<Value> {
    let amiss = |check: &&Value| {
        check["check"] != "nats version" && !["ok", "unknown"].contains(&check["state"].as_str().expect("a state"))
    };
    checks.iter().filter(amiss).cloned().collect()
}

/// Waits until the doctor finds this of something; the finding.
async fn wait_for(stack: &Stack, what: &str, state: &str) -> Value {
    eventually(SOON, what, async || {
        let (_, checks) = doctor(stack, &[]).await;
        let found = checks.iter().find(|check| check["check"] == what && check["state"] == state);
        found.cloned().ok_or_else(|| format!("{checks:?}"))
    })
    .await
}

async fn sql(stack: &Stack, statements: &str) {
    let ran = sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned())).execute(&stack.pool).await;
    if let Err(e) = ran {
        panic!("{statements}: {e}");
    }
}

#[tokio::test]
async fn of_a_healthy_installation_there_is_nothing_to_say() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.receiver.wait_for_requests("/crm", 1, SOON).await;
    let old = stack.nats.version() < (2, 15, 0);
    let health = [&stack.gateway_ready, &stack.lead_state_ready, &stack.notifier_ready].map(|url| url.as_str());
    let (code, checks) = doctor(&stack, &["--health", &health.join(",")]).await;
    assert_eq!(findings(&checks), Vec::<Value>::new());
    assert_eq!(code, if old { 9 } else { 0 }, "{checks:?}");
    let whats: Vec<_> = checks.iter().map(|check| check["check"].as_str().expect("what")).collect();
    for what in [
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
        "callbacks",
        "deliveries",
        "calls",
        "queued updates",
    ] {
        assert!(whats.contains(&what), "{what} was not looked at: {whats:?}");
    }
    for service in ["gateway", "lead_state", "webhook_notifier"] {
        let of = |check: &&Value| {
            check["check"].as_str().is_some_and(|what| what.starts_with(&format!("{service} at http://")))
        };
        let check = checks.iter().find(of).unwrap_or_else(|| panic!("{service}: {whats:?}"));
        assert_eq!(check["finding"], concat!("ready, version ", env!("CARGO_PKG_VERSION")));
    }
    // For people.
    let mut command = tokio::process::Command::new(binary("leadctl"));
    command.arg("doctor").env("DATABASE_URL", stack.postgres.url()).env("NATS_URL", stack.nats.url());
    let output = command.output().await.expect("leadctl");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("\nHEALTHY") && !text.contains("FAILED"), "{text}");
}

#[tokio::test]
async fn what_is_broken_is_named_with_what_mends_it() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    // An update that is held while a call goes on.
    let spec = json!({
        "projectId": stack.api.project_id, "name": "queueing", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}],
    });
    let applied: contract::rpc::ProcessChangeResult = stack.call(contract::rpc::PROCESS_APPLY, &spec).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let call = format!("leads.cmd.{}.call.started", stack.api.project_id);
    stack.publish(call, json!({"leadId": lead_id}).to_string()).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.queued_updates", 1, SOON).await;
    assert_eq!(findings(&doctor(&stack, &[]).await.1), Vec::<Value>::new());

    // A stream that forgets what nobody read yet.
    let js = service_kit::nats::jetstream(&stack.client);
    let mut stream = js.get_stream(LEAD_EVENTS).await.expect("the events");
    let as_it_was = stream.info().await.expect("its state").config.clone();
    let config = async_nats::jetstream::stream::Config { max_age: Duration::from_secs(3600), ..as_it_was.clone() };
    js.update_stream(config).await.expect("an update");
    let found = wait_for(&stack, "stream LEAD_EVENTS", "failed").await;
    assert_eq!(found["advice"], "nats stream edit LEAD_EVENTS --max-age=0", "{found}");
    js.update_stream(as_it_was).await.expect("an update");

    // A partition that is not there, a callback that is disabled, a delivery that is late, a call that nobody swept.
    let next: String = sqlx::query_scalar("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '1 month', 'YYYY_MM')")
        .fetch_one(&stack.pool)
        .await
        .expect("a month");
    sql(
        &stack,
        &format!(
            "ALTER TABLE lead_state.lead_updates DETACH PARTITION lead_state.lead_updates_{next};
             INSERT INTO webhooks.callback_health (callback_id, project_id, disabled_at, reason)
             VALUES (decode('{callback_id}', 'hex'), decode('{}', 'hex'), now(), '410 Gone')",
            stack.api.project_id
        ),
    )
    .await;
    let found = wait_for(&stack, "partitions", "failed").await;
    assert!(found["finding"].as_str().expect("text").starts_with(&format!("lead_updates_{next} missing")), "{found}");
    let found = wait_for(&stack, "callbacks", "warning").await;
    assert_eq!(found["finding"], format!("1 disabled: {callback_id} (410 Gone)"));
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let found = wait_for(&stack, "dead letters", "warning").await;
    assert_eq!(found["finding"], "1 leads.dead.invalid_json");

    // A schema of an older version.
    sql(&stack, "UPDATE webhooks._sqlx_migrations SET version = -1 WHERE version = 1").await;
    let found = wait_for(&stack, "schema webhooks", "failed").await;
    assert_eq!((&found["finding"], &found["advice"]), (&json!("lacks migrations [1]"), &json!("leadctl migrate")));
    sql(&stack, "UPDATE webhooks._sqlx_migrations SET version = 1 WHERE version = -1").await;

    // Services that are not there.
    let ready = stack.notifier_ready.clone();
    assert!(stack.notifier.terminate().await.success());
    let found = wait_for(&stack, "webhook-notifier", "failed").await;
    assert_eq!(found["finding"], "no replica answers");
    wait_for(&stack, "events to deliver", "failed").await;
    let (code, checks) = doctor(&stack, &["--health", &ready, "--nats-monitor", "http://127.0.0.1:9"]).await;
    assert_eq!(code, 8);
    let wrong = |what: &str| {
        checks
            .iter()
            .any(|check| check["check"].as_str().is_some_and(|w| w.starts_with(what)) && check["state"] == "failed")
    };
    assert!(wrong("service at http://") && wrong("nats at http://"), "{checks:?}");
    assert!(stack.lead_state.terminate().await.success());
    wait_for(&stack, "lead-state", "failed").await;
    let found = wait_for(&stack, "log, ledger and events", "failed").await;
    assert!(found["advice"].as_str().expect("text").contains("start lead-state"), "{found}");

    // Nobody says in the log that the call has expired.
    let expired =
        |minutes: u32| format!("UPDATE lead_state.active_calls SET expires_at = now() - interval '{minutes} minutes'");
    sql(&stack, &expired(9)).await;
    wait_for(&stack, "queued updates", "ok").await;
    sql(&stack, &expired(11)).await;
    let found = wait_for(&stack, "queued updates", "warning").await;
    assert!(found["finding"].as_str().expect("text").starts_with("of 1 leads are still queued"), "{found}");

    // Nothing at all.
    let mut command = tokio::process::Command::new(binary("leadctl"));
    command
        .args(["doctor", "--json"])
        .env("DATABASE_URL", "postgres://127.0.0.1:9/x")
        .env("NATS_URL", "nats://127.0.0.1:9");
    let output = command.output().await.expect("leadctl");
    assert_eq!(output.status.code(), Some(8));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(r#""check":"postgres","state":"failed""#) && text.contains(r#""check":"nats","state":"failed""#),
        "{text}"
    );
}

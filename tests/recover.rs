//! Set back to an older state, each without the other: noticed, said, and mended by one command; then the audit is clean.

use std::path::Path;

use contract::{ObjectId, rpc::Recovery, streams::LEAD_EVENTS};
use serde_json::json;
use test_support::{binary, eventually};

use crate::{
    audit::settled,
    stack::{SOON, Stack, by_update},
};

/// Runs `leadctl recover`: whether it went well, and what it said.
async fn recover(stack: &Stack, args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    let output = command.arg("recover").args(args).env("NATS_URL", stack.nats.url()).output().await.expect("leadctl");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Waits until lead-state is halted for this reason.
async fn wait_for_halt(stack: &Stack, reason: &str) -> Recovery {
    eventually(SOON, reason, async || {
        let (_, text) = recover(stack, &["--json"]).await;
        let recovery: Recovery = serde_json::from_str(&text).map_err(|_| text.clone())?;
        match &recovery.halted {
            Some(halted) if halted.reason == reason => Ok(recovery),
            _ => Err(text),
        }
    })
    .await
}

async fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = tokio::process::Command::new("cp").arg("-a").arg(from).arg(to).status().await.expect("cp");
    assert!(copied.success());
}

/// A stack with a lead, and updates that were told.
async fn started() -> (Stack, String) {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    updates(&stack, &lead, 3).await;
    settled(&stack).await;
    (stack, lead)
}

/// Updates that have their outcome; their ids.
async fn updates(stack: &Stack, lead: &str, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for number in 0..count {
        let id = stack.api.update_stubbornly(&json!({"leadId": lead, "metadata": {"n": number}})).await;
        assert_eq!(stack.api.outcome(&id).await["status"], "succeeded");
        ids.push(id);
    }
    ids
}

#[tokio::test]
async fn a_database_that_was_restored_is_replayed_from_the_log() {
    let (mut stack, lead) = started().await;
    let data = stack.postgres.dir().join("data");
    let backup = tempfile::tempdir().expect("a directory");
    stack.postgres.stop().await.expect("stopped");
    copy(&data, &backup.path().join("data")).await;
    stack.postgres.restart().await.expect("started");
    let since = updates(&stack, &lead, 4).await;
    settled(&stack).await;

    stack.postgres.stop().await.expect("stopped");
    copy(&backup.path().join("data"), &data).await;
    stack.postgres.restart().await.expect("started");
    let seen = wait_for_halt(&stack, "database_restored").await;
    assert_eq!(seen.last_seq, 3);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 3);

    let (well, said) = recover(&stack, &[]).await;
    assert!(well && said.contains("leadctl recover replay"), "{said}");
    let (well, said) = recover(&stack, &["new-epoch"]).await;
    assert!(!well && said.contains("--yes"), "{said}");
    let (well, said) = recover(&stack, &["replay", "--yes"]).await;
    assert!(well, "{said}");
    let found = settled(&stack).await;
    assert_eq!(found["updates"]["succeeded"], 7, "{found}");
    // Told before, and again under the same ids.
    let told = by_update(&stack.receiver.requests());
    for update in &since {
        assert_eq!(stack.api.outcome(update).await["status"], "succeeded");
        assert!(told[update].len() >= 2, "{update}");
    }
    updates(&stack, &lead, 1).await;
    let (well, said) = recover(&stack, &["replay", "--yes"]).await;
    assert!(!well && said.contains("not_applicable"), "{said}");
}

#[tokio::test]
async fn a_log_that_was_set_back_goes_on_in_a_new_epoch() {
    let (mut stack, lead) = started().await;
    let store = stack.nats.dir().join("store");
    let backup = tempfile::tempdir().expect("a directory");
    stack.nats.stop().await.expect("stopped");
    copy(&store, &backup.path().join("store")).await;
    stack.nats.restart().await.expect("started");
    updates(&stack, &lead, 2).await;
    settled(&stack).await;

    stack.nats.stop().await.expect("stopped");
    copy(&backup.path().join("store"), &store).await;
    stack.nats.restart().await.expect("started");
    wait_for_halt(&stack, "log_lost_end").await;
    // It goes on where it was set back to, and passes the checkpoint: that is noticed all the same.
    for number in 0..3 {
        stack.api.update_stubbornly(&json!({"leadId": lead, "metadata": {"late": number}})).await;
    }
    wait_for_halt(&stack, "log_replaced").await;
    let (well, said) = recover(&stack, &["new-epoch", "--yes"]).await;
    assert!(well, "{said}");
    let found = settled(&stack).await;
    assert_eq!((&found["updates"]["succeeded"], &found["checkpoint"]["epoch"]), (&json!(8), &json!(2)), "{found}");
    updates(&stack, &lead, 1).await;
    settled(&stack).await;
}

#[tokio::test]
async fn events_that_were_lost_are_announced_again_by_themselves() {
    let (mut stack, lead) = started().await;
    stack.notifier.kill9().await;
    let untold = updates(&stack, &lead, 3).await;
    let js = service_kit::nats::jetstream(&stack.client);
    js.delete_stream(LEAD_EVENTS).await.expect("deleted");
    // Who makes the streams is lead-state, at its start.
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_log("announcing again what may not have been told", SOON).await;
    stack.notifier.restart().await;
    let found = settled(&stack).await;
    assert_eq!(found["checkpoint"]["generation"], 1, "{found}");
    let told = by_update(&stack.receiver.requests());
    assert!(untold.iter().all(|update| told.contains_key(update)));
}

#[tokio::test]
async fn deliveries_that_were_lost_are_told_again() {
    let (stack, _) = started().await;
    for table in ["DELETE FROM webhooks.deliveries", "DELETE FROM webhooks.attempts"] {
        sqlx::query(table).execute(&stack.pool).await.expect("deleted");
    }
    let (well, said) = recover(&stack, &["reannounce", "--since", "1h", "--yes"]).await;
    assert!(well, "{said}");
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 3, SOON).await;
    let found = settled(&stack).await;
    assert_eq!(found["callbacks"][0]["delivered"], 3, "{found}");
    let ids: Vec<_> =
        stack.receiver.requests().iter().filter_map(|r| r.header("webhook-id").map(str::to_owned)).collect();
    assert_eq!(ids.len(), 6);
    assert!(ids.iter().all(|id| id.parse::<ObjectId>().is_ok()));
}

//! Recovery: the database or the log is restored to an older state without the other. That is detected and reported,
//! one command resolves it, and the audit is clean afterwards.

use std::path::Path;

use contract::{headers, position::EventPosition, streams::LEAD_EVENTS};
use serde_json::json;
use tempfile::TempDir;
use test_support::{NatsOptions, eventually, nats_with};

use crate::support::{
    DELIVERED, LEDGER_ROWS, Stack, TEST_TIMEOUT, assert_includes, by_update, health_page, process_id, service,
};

/// Waits until the metrics at the address of this readiness page show that lead-state is halted for exactly this
/// reason, or is not halted.
async fn wait_for_gauge(ready: &str, halted: Option<&str>) {
    eventually(TEST_TIMEOUT, "the gauge shows why it is halted", async || {
        let (_, text) = health_page(ready, "/metrics").await?;
        let shown = text.lines().filter_map(|line| line.strip_prefix("leadrelay_lead_state_halted{reason=\""));
        let shown: Vec<_> = shown.filter_map(|line| line.split_once("\"} ")).collect();
        let halts: Vec<_> = shown.iter().filter(|(_, value)| *value == "1").map(|(reason, _)| *reason).collect();
        if shown.len() == 4 && halts == halted.as_slice() { Ok(()) } else { Err(text) }
    })
    .await;
}

async fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = tokio::process::Command::new("cp").arg("-a").arg(from).arg(to).status().await.expect("cp");
    assert!(copied.success());
}

/// Copies the data of Postgres while it is stopped.
async fn copy_postgres(stack: &mut Stack) -> TempDir {
    let copied = tempfile::tempdir().expect("a directory");
    stack.postgres.stop().await.expect("stopped");
    copy(&stack.postgres.dir().join("data"), &copied.path().join("data")).await;
    stack.postgres.restart().await.expect("started");
    copied
}

async fn set_postgres_back(stack: &mut Stack, to: &TempDir) {
    stack.postgres.stop().await.expect("stopped");
    copy(&to.path().join("data"), &stack.postgres.dir().join("data")).await;
    stack.postgres.restart().await.expect("started");
}

/// Copies the streams of NATS while it is stopped.
async fn copy_nats(stack: &mut Stack) -> TempDir {
    let copied = tempfile::tempdir().expect("a directory");
    stack.nats.stop().await.expect("stopped");
    copy(&stack.nats.dir().join("store"), &copied.path().join("store")).await;
    stack.nats.restart().await.expect("started");
    copied
}

async fn set_nats_back(stack: &mut Stack, to: &TempDir) {
    stack.nats.stop().await.expect("stopped");
    copy(&to.path().join("store"), &stack.nats.dir().join("store")).await;
    stack.nats.restart().await.expect("started");
}

/// A stack with a lead and three delivered updates.
async fn started() -> (Stack, String) {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    update(&stack, &lead, 3).await;
    stack.wait_for_clean_audit().await;
    (stack, lead)
}

/// Sends updates, waits for their outcomes, and returns their ids.
async fn update(stack: &Stack, lead: &str, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for number in 0..count {
        let id = stack.api.update_until_accepted(&json!({"leadId": lead, "metadata": {"n": number}})).await;
        assert_eq!(stack.api.outcome(&id).await["status"], "succeeded");
        ids.push(id);
    }
    ids
}

async fn recover(stack: &Stack, how: &str) {
    stack.leadctl(&["recover", how, "--yes"]).await.assert_ok();
}

#[tokio::test]
async fn a_restored_database_is_replayed_from_the_log() {
    let (mut stack, lead) = started().await;
    let backup = copy_postgres(&mut stack).await;
    let since = update(&stack, &lead, 4).await;
    stack.wait_for_clean_audit().await;

    set_postgres_back(&mut stack, &backup).await;

    let halted = stack.wait_for_halt("database_restored").await;
    assert_eq!(halted.applied.sequence, 3);
    wait_for_gauge(&stack.lead_state_ready, Some("database_restored")).await;
    assert_eq!(stack.count(LEDGER_ROWS).await, 3);
    stack.leadctl(&["recover"]).await.assert_ok().assert_prints(&["leadctl recover replay"]);
    stack.leadctl(&["recover", "new-epoch"]).await.assert_fails("--yes");

    recover(&stack, "replay").await;

    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["succeeded"], 7, "{report}");
    // The updates were delivered before, and are delivered again under the same ids.
    let delivered = by_update(&stack.receiver.requests());
    for id in &since {
        assert_eq!(stack.api.outcome(id).await["status"], "succeeded");
        assert!(delivered[id].len() >= 2, "{id}");
    }
    update(&stack, &lead, 1).await;
    stack.leadctl(&["recover", "replay", "--yes"]).await.assert_fails("not_applicable");
}

#[tokio::test]
async fn a_replay_decides_queued_updates_as_before() {
    let (mut stack, _) = started().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "queueing", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}], "callbacks": [{"name": "crm", "url": stack.receiver.url("/queued")}],
    });
    let lead = stack.api.initiate(process_id(&stack.apply(spec).await), None).await;
    let update = async |stack: &Stack, n: u32| stack.api.update(json!({"leadId": lead, "metadata": {"n": n}})).await;
    stack.publish_call("started", &json!({"leadId": lead})).await;
    let mut ids = vec![update(&stack, 1).await];
    stack.wait_until_applied().await;
    let backup = copy_postgres(&mut stack).await;
    ids.push(update(&stack, 2).await);
    stack.publish_call("ended", &json!({"leadId": lead})).await;
    ids.push(update(&stack, 3).await);
    stack.wait_for_clean_audit().await;

    set_postgres_back(&mut stack, &backup).await;
    stack.wait_for_halt("database_restored").await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.queued_updates").await, 1);
    recover(&stack, "replay").await;
    stack.wait_for_clean_audit().await;

    for (id, version) in ids.iter().zip([2, 3, 4]) {
        assert_eq!(stack.api.outcome(id).await["version"], version);
    }
}

#[tokio::test]
async fn a_log_that_was_set_back_continues_in_a_new_epoch() {
    let (mut stack, lead) = started().await;
    let backup = copy_nats(&mut stack).await;
    update(&stack, &lead, 2).await;
    stack.wait_for_clean_audit().await;

    set_nats_back(&mut stack, &backup).await;
    stack.wait_for_halt("log_lost_end").await;
    wait_for_gauge(&stack.lead_state_ready, Some("log_lost_end")).await;
    // New commands fill the log up to the checkpoint and beyond. It is still recognized as another log.
    for number in 0..3 {
        stack.api.update_until_accepted(&json!({"leadId": lead, "metadata": {"late": number}})).await;
    }
    stack.wait_for_halt("log_replaced").await;
    wait_for_gauge(&stack.lead_state_ready, Some("log_replaced")).await;

    recover(&stack, "new-epoch").await;

    let report = stack.wait_for_clean_audit().await;
    assert_includes(&report, json!({"updates": {"succeeded": 8}, "checkpoint": {"epoch": 2}}));
    wait_for_gauge(&stack.lead_state_ready, None).await;
    update(&stack, &lead, 1).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn the_leader_stops_when_the_log_is_set_back_while_it_reads() {
    let (mut stack, lead) = started().await;
    let other_log = copy_nats(&mut stack).await;
    update(&stack, &lead, 2).await;
    stack.wait_for_clean_audit().await;

    // The reader is disconnected in the meantime. When it sees the log again, the log is already longer than the part
    // that was read.
    stack.nats.stop().await.expect("stopped");
    let mut other = nats_with(NatsOptions::durable(other_log.path())).await;
    let js = async_nats::jetstream::new(other.connect().await.expect("a client"));
    for number in 0..3 {
        let command = json!({"leadId": lead, "metadata": {"late": number}}).to_string();
        let subject = format!("leads.cmd.{}.update", stack.api.project_id);
        js.publish(subject, command.into()).await.expect("published").await.expect("an ack");
    }
    other.stop().await.expect("stopped");
    set_nats_back(&mut stack, &other_log).await;

    // The gauge is set by the leader itself, not by a query.
    wait_for_gauge(&stack.lead_state_ready, Some("log_replaced")).await;
    assert_eq!(stack.count(LEDGER_ROWS).await, 5);
}

#[tokio::test]
async fn an_instance_that_halted_and_stands_by_shows_no_halt() {
    let (stack, lead) = started().await;
    let (mut standby, ready) = service("lead-state", &stack.nats, &stack.postgres, &[]);
    standby.wait_for_http(&ready, TEST_TIMEOUT).await;
    stack.sql("UPDATE lead_state.checkpoints SET last_sequence = last_sequence + 99, announced_sequence = announced_sequence + 99").await;
    stack.publish_update(&json!({"leadId": lead, "name": "n"})).await;
    // Both instances lead in turn, and halt.
    for ready in [&stack.lead_state_ready, &ready] {
        wait_for_gauge(ready, Some("log_lost_end")).await;
    }

    recover(&stack, "new-epoch").await;

    // One leads, the other stands by; neither is halted.
    for ready in [&stack.lead_state_ready, &ready] {
        wait_for_gauge(ready, None).await;
        assert_eq!(health_page(ready, "/readyz").await.expect("an answer").0, 200);
    }
    update(&stack, &lead, 1).await;
}

#[tokio::test]
async fn lost_events_are_announced_again_without_an_operator() {
    let (mut stack, lead) = started().await;
    stack.wait_for_count("SELECT delivered_sequence FROM lead_state.checkpoints", 3).await;
    let before = by_update(&stack.receiver.requests());
    stack.notifier.kill9().await;
    let undelivered = update(&stack, &lead, 3).await;

    stack.js().delete_stream(LEAD_EVENTS).await.expect("deleted");
    // lead-state creates the streams when it starts.
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_log("announcing again from the delivered watermark", TEST_TIMEOUT).await;
    stack.notifier.restart().await;

    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["checkpoint"]["generation"], 1, "{report}");
    let delivered = by_update(&stack.receiver.requests());
    assert!(undelivered.iter().all(|id| delivered.contains_key(id)));
    // Updates that were recorded as delivered before the loss are not delivered again.
    assert_eq!(before.len(), 3);
    assert!(before.iter().all(|(id, bodies)| delivered[id].len() == bodies.len()));
}

/// The statement of a recovery that rewinds all announcements.
const REWIND: &str = "UPDATE lead_state.checkpoints SET generation = generation + 1, announced_sequence = 0";

/// Waits until lead-state waits for a lock in Postgres.
async fn wait_until_blocked(stack: &Stack) {
    let waiting = "SELECT least(count(*), 1) FROM pg_stat_activity WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    stack.wait_for_count(waiting, 1).await;
}

/// Waits until at least three updates were delivered this often.
async fn wait_for_deliveries(stack: &Stack, times: usize) {
    eventually(TEST_TIMEOUT, "all is delivered again", async || {
        let delivered = by_update(&stack.receiver.requests());
        let done = delivered.values().filter(|bodies| bodies.len() >= times).count();
        if done >= 3 { Ok(()) } else { Err(done) }
    })
    .await;
}

#[tokio::test]
async fn a_leader_from_before_a_recovery_writes_no_batch() {
    let (stack, lead) = started().await;

    let mut recovery = stack.pool.begin().await.expect("a transaction");
    sqlx::query(REWIND).execute(&mut *recovery).await.expect(REWIND);
    let late = stack.api.update(json!({"leadId": lead, "name": "late"})).await;
    wait_until_blocked(&stack).await;
    recovery.commit().await.expect("commit");

    assert_eq!(stack.api.outcome(&late).await["status"], "succeeded");
    wait_for_deliveries(&stack, 2).await;
    // The batch was announced only in the new generation.
    let events = stack.js().get_stream(LEAD_EVENTS).await.expect("the events");
    let mut generations = Vec::new();
    for sequence in 1..=events.cached_info().state.last_sequence {
        let event = events.get_raw_message(sequence).await.expect("an event");
        let position = event.headers.get(headers::POSITION).expect("a position").as_str();
        let position: EventPosition = position.parse().expect("a position");
        generations.extend((position.log.sequence == 4).then_some(position.generation));
    }
    assert_eq!(generations, [1]);
}

#[tokio::test]
async fn a_leader_from_before_a_recovery_records_no_announcement() {
    let (stack, lead) = started().await;
    stack
        .sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF current_setting('application_name') = 'lead-state' THEN PERFORM pg_advisory_xact_lock(7); END IF;
                 RETURN NULL;
             END $$;
             CREATE TRIGGER wait BEFORE UPDATE OF announced_sequence ON lead_state.checkpoints EXECUTE FUNCTION wait()",
        )
        .await;

    // The leader has announced a batch and waits to record that, when the recovery rewinds all announcements.
    let mut recovery = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT pg_advisory_lock(7)").execute(&mut *recovery).await.expect("a lock");
    stack.api.update(json!({"leadId": lead, "name": "later"})).await;
    wait_until_blocked(&stack).await;
    sqlx::query(REWIND).execute(&mut *recovery).await.expect(REWIND);
    sqlx::query("SELECT pg_advisory_unlock(7)").execute(&mut *recovery).await.expect("no lock");
    recovery.commit().await.expect("commit");

    wait_for_deliveries(&stack, 2).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn lost_deliveries_are_made_again_by_reannounce() {
    let (stack, _) = started().await;
    stack
        .sql("DELETE FROM webhooks.deliveries; DELETE FROM webhooks.attempts; DELETE FROM webhooks.delivery_counts")
        .await;

    stack.leadctl(&["recover", "reannounce", "--since", "1h", "--yes"]).await.assert_ok();

    stack.wait_for_count(DELIVERED, 3).await;
    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["callbacks"][0]["delivered"], 3, "{report}");
    let delivered = by_update(&stack.receiver.requests());
    assert_eq!(delivered.len(), 3);
    assert!(delivered.values().all(|bodies| bodies.len() == 2), "{delivered:?}");
}

/// Waits until the updates are delivered.
async fn wait_until_delivered(stack: &Stack, ids: &[String]) {
    eventually(TEST_TIMEOUT, "all is delivered", async || {
        let delivered = by_update(&stack.receiver.requests());
        let missing = ids.iter().filter(|id| !delivered.contains_key(*id)).count();
        if missing == 0 { Ok(()) } else { Err(missing) }
    })
    .await;
}

#[tokio::test]
async fn events_lost_beside_a_leader_are_announced_again() {
    let (mut stack, lead) = started().await;
    stack.wait_for_count("SELECT delivered_sequence FROM lead_state.checkpoints", 3).await;
    stack.notifier.kill9().await;
    let mut ids = update(&stack, &lead, 3).await;
    stack.js().delete_stream(LEAD_EVENTS).await.expect("deleted");

    // A standby creates the stream, and the leader continues to lead.
    let (mut standby, ready) = service("lead-state", &stack.nats, &stack.postgres, &[]);
    standby.wait_for_http(&ready, TEST_TIMEOUT).await;
    stack.notifier.restart().await;
    ids.extend(update(&stack, &lead, 1).await);

    wait_until_delivered(&stack, &ids).await;
    stack.wait_for_clean_audit().await;
}

/// Sends three updates, whose events the stream then loses, as in a power cut of a NATS that does not sync before it
/// acks. The leader keeps running, and webhook-notifier is stopped.
async fn events_lost_their_end() -> (Stack, String, Vec<String>) {
    let (mut stack, lead) = started().await;
    stack.wait_for_count("SELECT delivered_sequence FROM lead_state.checkpoints", 3).await;
    stack.notifier.kill9().await;
    let before = copy_nats(&mut stack).await;
    let lost = update(&stack, &lead, 3).await;
    stack.wait_for_count("SELECT announced_sequence FROM lead_state.checkpoints", 6).await;
    stack.nats.stop().await.expect("stopped");
    let events = Path::new("store/jetstream/LEADRELAY/streams").join(LEAD_EVENTS);
    copy(&before.path().join(&events), &stack.nats.dir().join(&events)).await;
    stack.nats.restart().await.expect("started");
    (stack, lead, lost)
}

#[tokio::test]
async fn a_lost_end_of_the_event_stream_is_detected_by_the_next_acks() {
    let (mut stack, lead, mut ids) = events_lost_their_end().await;
    // As many events follow as were lost, so the stream is as long as before.
    ids.extend(update(&stack, &lead, 3).await);
    stack.lead_state.wait_for_log("a leader saw that the stream lost its end or was created again", TEST_TIMEOUT).await;
    stack.notifier.restart().await;

    wait_until_delivered(&stack, &ids).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_lost_end_of_the_event_stream_is_detected_without_further_events() {
    let (mut stack, _, ids) = events_lost_their_end().await;
    stack.lead_state.wait_for_log("a leader saw that the stream lost its end or was created again", TEST_TIMEOUT).await;
    stack.notifier.restart().await;

    wait_until_delivered(&stack, &ids).await;
    stack.wait_for_clean_audit().await;
}

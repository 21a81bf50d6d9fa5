//! Set back to an older state, each without the other: noticed, said, and mended by one command; then the audit is clean.

use std::path::Path;

use contract::{ObjectId, headers, position::EventPosition, rpc::RecoveryStatus, streams::LEAD_EVENTS};
use serde_json::json;
use test_support::{NatsOptions, binary, eventually, nats_with};

use crate::{
    audit::settled,
    stack::{SOON, Stack, by_update, service},
};

/// Runs `leadctl recover`: whether it went well, and what it said.
pub(crate) async fn recover(stack: &Stack, args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    let output = command.arg("recover").args(args).env("NATS_URL", stack.nats.url()).output().await.expect("leadctl");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Waits until lead-state is halted for this reason.
pub(crate) async fn wait_for_halt(stack: &Stack, reason: &str) -> RecoveryStatus {
    eventually(SOON, reason, async || {
        let (_, text) = recover(stack, &["--json"]).await;
        let recovery: RecoveryStatus = serde_json::from_str(&text).map_err(|_| text.clone())?;
        match &recovery.halted {
            Some(halted) if halted.reason == reason => Ok(recovery),
            _ => Err(text),
        }
    })
    .await
}

/// Waits until the gauge beside this page shows that lead-state is halted for this reason alone, or not at all.
async fn wait_for_gauge(ready: &str, halted: Option<&str>) {
    let url = ready.replace("/readyz", "/metrics");
    eventually(SOON, "the gauge shows why it is halted", async || {
        let answer = test_support::http_client().get(&url).send().await.expect("an answer");
        let text = answer.text().await.expect("the metrics");
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
    assert_eq!(seen.applied.sequence, 3);
    wait_for_gauge(&stack.lead_state_ready, Some("database_restored")).await;
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
async fn what_was_held_is_replayed_to_the_same_end() {
    let (mut stack, _) = started().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "queueing", "duringCall": "queue",
        "states": [{"name": "new", "kind": "initial"}], "callbacks": [{"name": "crm", "url": stack.receiver.url("/queued")}],
    });
    let applied: contract::rpc::ProcessChangeResult = stack.call(contract::rpc::PROCESS_APPLY, &spec).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let call = format!("leads.cmd.{}.call", stack.api.project_id);
    stack.publish(format!("{call}.started"), json!({"leadId": lead}).to_string()).await;
    let update = async |stack: &Stack, n: u32| stack.api.update(json!({"leadId": lead, "metadata": {"n": n}})).await;
    let mut ids = vec![update(&stack, 1).await];
    stack.wait_until_applied().await;
    let data = stack.postgres.dir().join("data");
    let backup = tempfile::tempdir().expect("a directory");
    stack.postgres.stop().await.expect("stopped");
    copy(&data, &backup.path().join("data")).await;
    stack.postgres.restart().await.expect("started");
    ids.push(update(&stack, 2).await);
    stack.publish(format!("{call}.ended"), json!({"leadId": lead}).to_string()).await;
    ids.push(update(&stack, 3).await);
    settled(&stack).await;
    let mut told = Vec::new();
    for id in &ids {
        told.push(stack.api.outcome(id).await["version"].clone());
    }
    assert_eq!(told, [2, 3, 4]);

    stack.postgres.stop().await.expect("stopped");
    copy(&backup.path().join("data"), &data).await;
    stack.postgres.restart().await.expect("started");
    wait_for_halt(&stack, "database_restored").await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.queued_updates").await, 1);
    let (well, said) = recover(&stack, &["replay", "--yes"]).await;
    assert!(well, "{said}");
    settled(&stack).await;
    for (id, version) in ids.iter().zip(told) {
        assert_eq!(stack.api.outcome(id).await["version"], version);
    }
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
    wait_for_gauge(&stack.lead_state_ready, Some("log_lost_end")).await;
    // It goes on where it was set back to, and passes the checkpoint: that is noticed all the same.
    for number in 0..3 {
        stack.api.update_stubbornly(&json!({"leadId": lead, "metadata": {"late": number}})).await;
    }
    wait_for_halt(&stack, "log_replaced").await;
    wait_for_gauge(&stack.lead_state_ready, Some("log_replaced")).await;
    let (well, said) = recover(&stack, &["new-epoch", "--yes"]).await;
    assert!(well, "{said}");
    let found = settled(&stack).await;
    assert_eq!((&found["updates"]["succeeded"], &found["checkpoint"]["epoch"]), (&json!(8), &json!(2)), "{found}");
    wait_for_gauge(&stack.lead_state_ready, None).await;
    updates(&stack, &lead, 1).await;
    settled(&stack).await;
}

#[tokio::test]
async fn a_log_that_was_set_back_under_its_reader_is_not_read_on() {
    let (mut stack, lead) = started().await;
    let store = stack.nats.dir().join("store");
    let elsewhere = tempfile::tempdir().expect("a directory");
    stack.nats.stop().await.expect("stopped");
    copy(&store, &elsewhere.path().join("store")).await;
    stack.nats.restart().await.expect("started");
    updates(&stack, &lead, 2).await;
    settled(&stack).await;

    // The reader waits for it, and sees it again only when it has passed what was read.
    stack.nats.stop().await.expect("stopped");
    let mut other = nats_with(NatsOptions::durable(elsewhere.path())).await;
    let js = async_nats::jetstream::new(other.connect().await.expect("a client"));
    for number in 0..3 {
        let command = json!({"leadId": lead, "metadata": {"late": number}}).to_string();
        let subject = format!("leads.cmd.{}.update", stack.api.project_id);
        js.publish(subject, command.into()).await.expect("published").await.expect("an ack");
    }
    other.stop().await.expect("stopped");
    copy(&elsewhere.path().join("store"), &store).await;
    stack.nats.restart().await.expect("started");
    // Not only the query sees it: the leader stops.
    wait_for_gauge(&stack.lead_state_ready, Some("log_replaced")).await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 5);
}

#[tokio::test]
async fn an_instance_that_halted_and_stands_by_now_shows_no_halt() {
    let (stack, lead) = started().await;
    let (mut standby, ready) = service("lead-state", &stack.nats, &stack.postgres, &[]);
    standby.wait_for_http(&ready, SOON).await;
    sqlx::query("UPDATE lead_state.checkpoints SET last_sequence = last_sequence + 99, announced_sequence = announced_sequence + 99")
        .execute(&stack.pool)
        .await
        .expect("moved");
    let body = json!({"leadId": lead, "name": "n"}).to_string();
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), body).await;
    // They take turns in seeing it.
    for ready in [&stack.lead_state_ready, &ready] {
        wait_for_gauge(ready, Some("log_lost_end")).await;
    }
    let (well, said) = recover(&stack, &["new-epoch", "--yes"]).await;
    assert!(well, "{said}");
    // One leads, the other stands by, and neither is halted or waits for the log.
    for ready in [&stack.lead_state_ready, &ready] {
        wait_for_gauge(ready, None).await;
        assert_eq!(test_support::http_client().get(ready).send().await.expect("an answer").status(), 200);
    }
    updates(&stack, &lead, 1).await;
}

#[tokio::test]
async fn events_that_were_lost_are_announced_again_by_themselves() {
    let (mut stack, lead) = started().await;
    let noted = "SELECT delivered_sequence FROM lead_state.checkpoints";
    stack.wait_for_count(noted, 3, SOON).await;
    let before = by_update(&stack.receiver.requests());
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
    // What was noted as told is not told again.
    assert_eq!(before.len(), 3);
    assert!(before.iter().all(|(update, bodies)| told[update].len() == bodies.len()));
}

/// Waits until lead-state waits for a lock in Postgres.
async fn wait_until_blocked(stack: &Stack) {
    let waiting = "SELECT least(count(*), 1) FROM pg_stat_activity WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    stack.wait_for_count(waiting, 1, SOON).await;
}

#[tokio::test]
async fn a_leader_of_before_a_recovery_neither_writes_nor_notes() {
    let (stack, lead) = started().await;
    // What a recovery writes that takes all announcements back.
    let take_back = "UPDATE lead_state.checkpoints SET generation = generation + 1, announced_sequence = 0";
    let told_again = async |times: usize| {
        eventually(SOON, "all is told again", async || {
            let told = by_update(&stack.receiver.requests());
            if told.values().filter(|bodies| bodies.len() >= times).count() >= 3 { Ok(()) } else { Err(told.len()) }
        })
        .await;
    };

    // It comes to write a batch.
    let mut recovery = stack.pool.begin().await.expect("a transaction");
    sqlx::query(take_back).execute(&mut *recovery).await.expect("the checkpoint");
    let late = stack.api.update(json!({"leadId": lead, "name": "late"})).await;
    wait_until_blocked(&stack).await;
    recovery.commit().await.expect("commit");
    assert_eq!(stack.api.outcome(&late).await["status"], "succeeded");
    told_again(2).await;
    // The batch was written in the new generation only.
    let events = service_kit::nats::jetstream(&stack.client).get_stream(LEAD_EVENTS).await.expect("the events");
    let mut of_late = Vec::new();
    for sequence in 1..=events.cached_info().state.last_sequence {
        let event = events.get_raw_message(sequence).await.expect("an event");
        let position: EventPosition =
            event.headers.get(headers::POSITION).expect("a position").as_str().parse().expect("one");
        of_late.extend((position.log.sequence == 4).then_some(position.generation));
    }
    assert_eq!(of_late, [1]);

    // It comes to note what it announced.
    sqlx::raw_sql(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF current_setting('application_name') = 'lead-state' THEN PERFORM pg_advisory_xact_lock(7); END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER wait BEFORE UPDATE OF announced_sequence ON lead_state.checkpoints EXECUTE FUNCTION wait()",
    )
    .execute(&stack.pool)
    .await
    .expect("a trigger");
    let mut recovery = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT pg_advisory_lock(7)").execute(&mut *recovery).await.expect("a lock");
    stack.api.update(json!({"leadId": lead, "name": "later"})).await;
    wait_until_blocked(&stack).await;
    sqlx::query(take_back).execute(&mut *recovery).await.expect("the checkpoint");
    sqlx::query("SELECT pg_advisory_unlock(7)").execute(&mut *recovery).await.expect("no lock");
    recovery.commit().await.expect("commit");
    told_again(3).await;
    settled(&stack).await;
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

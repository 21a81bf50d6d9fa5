//! Backup and restore: Postgres and the streams are backed up while updates arrive. Then one of them is lost, or both,
//! and restored as the operations guide describes.
//!
//! Postgres is backed up with `pg_basebackup`, and the streams through the server API of `nats stream backup` and
//! `nats stream restore`.

use std::path::{Path, PathBuf};

use async_nats::Client;
use bytes::Bytes;
use contract::streams::{
    API_KEYS, IDEMPOTENCY, LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, PROCESSES, WEBHOOK_EVENTS,
};
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use tempfile::TempDir;
use test_support::{Authorization, LocalNats, LocalPostgres, NatsOptions, eventually, nats_with, postgres};
use tokio::{process::Command, time::timeout};

use crate::support::{Api, Load, Stack, TEST_TIMEOUT, UPDATE, assert_refused, by_update, operations_guide};

const PASSWORD: &str = "the-password";

/// A stream as `nats stream backup` keeps it in a directory.
struct Snapshot {
    stream: String,
    /// `backup.json`: its configuration and state.
    about: Value,
    /// `stream.tar.s2` in the chunks received: messages and consumers.
    chunks: Vec<Bytes>,
}

/// The block of a user in a configuration, up to its closing brace.
fn user(config: &str, name: &str) -> String {
    let (_, rest) = config.split_once(&format!("user: {name},")).expect("the user");
    let mut depth = 1;
    let end = rest.find(|c| {
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        depth == 0
    });
    format!("{{ user: {name},{} }}", &rest[..end.expect("its end")])
}

/// A NATS with three users: an owner without restrictions, the user for backups of the deployment, and the user for
/// restores of the operations guide.
async fn nats() -> LocalNats {
    let accounts = include_str!("../deploy/nats/accounts.conf");
    let users = [user(accounts, "backup"), user(&operations_guide(), "restore")].join("\n");
    let authorization = Authorization {
        config: format!("authorization {{ users: [\n{{ user: owner, password: owner-password }}\n{users}\n] }}"),
        environment: ["BACKUP", "RESTORE"].map(|user| (format!("NATS_{user}_PASSWORD"), PASSWORD.into())).into(),
        user: "owner".into(),
        password: "owner-password".into(),
    };
    nats_with(NatsOptions { authorization: Some(authorization), ..NatsOptions::throwaway() }).await
}

/// A client of a user, as the `nats` CLI is one.
async fn cli(nats: &LocalNats, user: &str) -> Client {
    let options = async_nats::ConnectOptions::with_user_and_password(user.into(), PASSWORD.into());
    options.connect(format!("nats://127.0.0.1:{}", nats.port())).await.expect("a client")
}

/// Sends a request to the JetStream API and returns the response, which must not be an error.
async fn ask(client: &Client, subject: String, request: impl Into<Bytes>) -> Value {
    let answer = client.request(subject.clone(), request.into()).await.expect("an answer").payload;
    let answer: Value = serde_json::from_slice(&answer).expect("JSON");
    assert!(answer["error"].is_null(), "{subject}: {answer}");
    answer
}

/// Backs up a stream as `nats stream backup --check` does.
async fn back_up(client: &Client, stream: &str) -> Snapshot {
    let inbox = client.new_inbox();
    let mut arriving = client.subscribe(inbox.clone()).await.expect("an inbox");
    let request = json!({"deliver_subject": inbox, "jsck": true, "chunk_size": 128 * 1024});
    let about = ask(client, format!("$JS.API.STREAM.SNAPSHOT.{stream}"), request.to_string()).await;
    let mut chunks = Vec::new();
    loop {
        let chunk = timeout(TEST_TIMEOUT, arriving.next()).await.expect("the next chunk").expect("a chunk");
        if chunk.payload.is_empty() {
            return Snapshot { stream: stream.into(), about, chunks };
        }
        chunks.push(chunk.payload);
        if let Some(reply) = chunk.reply {
            client.publish(reply, Bytes::new()).await.expect("sent");
        }
    }
}

/// Restores a stream as `nats stream restore` does.
async fn restore(client: &Client, snapshot: &Snapshot) {
    let request = json!({"config": snapshot.about["config"], "state": snapshot.about["state"]}).to_string();
    let answer = ask(client, format!("$JS.API.STREAM.RESTORE.{}", snapshot.stream), request).await;
    let to = answer["deliver_subject"].as_str().expect("a subject").to_owned();
    for chunk in &snapshot.chunks {
        client.request(to.clone(), chunk.clone()).await.expect("taken");
    }
    ask(client, to, Bytes::new()).await;
}

/// Backs up all streams, in the order that the operations guide gives.
async fn back_up_streams(nats: &LocalNats) -> Vec<Snapshot> {
    let client = cli(nats, "backup").await;
    let bucket = |name| format!("KV_{name}");
    let mut snapshots = Vec::new();
    for stream in [LEAD_EVENTS, LEAD_COMMANDS, LEAD_DEAD_LETTERS, WEBHOOK_EVENTS].map(str::to_owned) {
        snapshots.push(back_up(&client, &stream).await);
    }
    for stream in [IDEMPOTENCY, PROCESSES, API_KEYS].map(bucket) {
        snapshots.push(back_up(&client, &stream).await);
    }
    snapshots
}

/// Restores all streams to a NATS that has none.
async fn restore_streams(nats: &LocalNats, snapshots: &[Snapshot]) {
    let client = cli(nats, "restore").await;
    for snapshot in snapshots {
        restore(&client, snapshot).await;
    }
}

/// `pg_basebackup` into a directory.
async fn back_up_postgres(postgres: &LocalPostgres, to: &Path) {
    let mut command = Command::new(postgres.program("pg_basebackup"));
    command.args(["--checkpoint=fast", "--dbname"]).arg(postgres.url()).arg("--pgdata").arg(to);
    let mut verify = Command::new(postgres.program("pg_verifybackup"));
    verify.arg(to);
    for command in [&mut command, &mut verify] {
        let output = command.output().await.expect("a program of Postgres");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Kills Postgres and moves its data away. Returns the path where the data was.
async fn lose_postgres(stack: &mut Stack) -> PathBuf {
    let data = stack.postgres.dir().join("data");
    stack.postgres.kill9().await.expect("killed");
    // The lost data is kept, because the restored files get its owner.
    std::fs::rename(&data, data.with_extension("lost")).expect("moved away");
    data
}

/// Copies a backup to the place of the lost data, and starts Postgres on it.
async fn restore_postgres(stack: &mut Stack, backup: &Path) {
    let data = stack.postgres.dir().join("data");
    let copied = Command::new("cp").arg("-a").arg(backup).arg(&data).status().await.expect("cp");
    assert!(copied.success());
    let mut chown = Command::new("chown");
    chown.arg("-R").arg(format!("--reference={}", data.with_extension("lost").display())).arg(&data);
    assert!(chown.status().await.expect("chown").success());
    stack.postgres.restart().await.expect("started");
}

/// Kills NATS, deletes its data, and starts an empty NATS in its place.
async fn lose_nats(stack: &mut Stack) {
    stack.nats.kill9().await.expect("killed");
    std::fs::remove_dir_all(stack.nats.dir().join("store")).expect("removed");
    stack.nats.restart().await.expect("started");
}

async fn stop_services(stack: &mut Stack) {
    for service in [&mut stack.gateway, &mut stack.notifier, &mut stack.lead_state] {
        service.kill9().await;
    }
}

/// A stack with a process and leads.
async fn started() -> (Stack, Vec<String>) {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let operator = NatsConfig::at(nats.url());
    let stack = Stack::start_on(nats, postgres, &operator, |_| Vec::new()).await;
    let leads = stack.leads(&["crm"], 4).await;
    stack.backdate_processes().await;
    (stack, leads)
}

/// `pg_basebackup` into a new directory.
async fn base_backup(stack: &Stack) -> (TempDir, PathBuf) {
    let backup = tempfile::tempdir().expect("a directory");
    let base = backup.path().join("base");
    back_up_postgres(&stack.postgres, &base).await;
    (backup, base)
}

async fn restart_services(stack: &mut Stack) {
    for service in [&mut stack.lead_state, &mut stack.notifier, &mut stack.gateway] {
        service.restart().await;
    }
    stack.wait_until_ready().await;
}

async fn recover(stack: &Stack, how: &[&str]) {
    stack.leadctl(&[&["recover"], how, &["--yes"]].concat()).await.assert_ok();
}

/// Asserts that each of these was applied, once, and delivered.
async fn assert_applied_once(stack: &Stack, updates: &[String]) {
    let delivered = by_update(&stack.receiver.requests());
    for update in updates {
        assert_eq!(stack.api.outcome(update).await["status"], "succeeded", "{update}");
        assert!(delivered.contains_key(update), "{update} was not delivered");
    }
    let twice = "SELECT count(*) - count(DISTINCT update_id) FROM lead_state.lead_updates";
    assert_eq!(stack.count(twice).await, 0);
}

/// Asserts that none of these exists.
async fn assert_unknown(stack: &Stack, updates: &[String]) {
    for update in updates {
        assert_refused(stack.api.get(&format!("/api/v1/updates/{update}")).await, 404, "update_not_found");
    }
}

#[tokio::test]
async fn both_are_restored_to_the_backup_of_the_log() {
    let (mut stack, leads) = started().await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let once = json!({"leadId": leads[0], "metadata": {"once": true}});
    let keyed = [("idempotency-key", "one")];
    let (_, first) = stack.api.ask(Method::POST, UPDATE, &keyed, &once).await;
    let load = Load::start(&stack.api, leads.clone());
    load.wait_for_more_applied(&stack.api, 20).await;
    let (_backup, base) = base_backup(&stack).await;
    load.wait_for_more_applied(&stack.api, 20).await;
    let in_backup = load.accepted();
    let streams = back_up_streams(&stack.nats).await;
    // One update may have been in flight during the backup.
    load.wait_for_more_applied(&stack.api, 2).await;
    let behind_backup = load.accepted().len();
    load.wait_for_more_applied(&stack.api, 20).await;
    let accepted = load.end().await;

    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;
    lose_postgres(&mut stack).await;
    restore_postgres(&mut stack, &base).await;
    restore_streams(&stack.nats, &streams).await;
    stack.lead_state.restart().await;
    let halted = stack.wait_for_halt("database_restored").await;
    assert!(halted.applied.sequence < halted.log_last, "{halted:?}");
    stack.leadctl(&["recover"]).await.assert_ok().assert_prints(&["leadctl recover replay"]);
    recover(&stack, &["replay"]).await;
    stack.notifier.restart().await;
    stack.gateway.restart().await;
    stack.wait_until_ready().await;

    stack.wait_until_applied().await;
    stack.wait_for_clean_audit().await;
    assert_applied_once(&stack, &in_backup).await;
    assert_eq!(stack.dead_letters().await, 1);
    let (_, again) = stack.api.ask(Method::POST, UPDATE, &keyed, &once).await;
    assert_eq!(again["updateId"], first["updateId"]);
    // Updates from after the backup are lost. A client that kept an id can send its update again under that id.
    assert_unknown(&stack, &accepted[behind_backup..]).await;
    let lost = accepted.last().expect("an update");
    stack.publish_update(&json!({"leadId": leads[0], "updateId": lost, "metadata": {"late": true}})).await;
    stack.wait_for_clean_audit().await;
    assert_applied_once(&stack, std::slice::from_ref(lost)).await;
}

#[tokio::test]
async fn a_lost_postgres_is_restored_without_loss_while_updates_are_accepted() {
    let (mut stack, leads) = started().await;
    let load = Load::start(&stack.api, leads.clone());
    load.wait_for_more_applied(&stack.api, 20).await;
    // The position up to which everything is delivered is recorded every ten seconds.
    stack.wait_for_count("SELECT least(delivered_sequence, 1) FROM lead_state.checkpoints", 1).await;
    let (_backup, base) = base_backup(&stack).await;
    load.wait_for_more_applied(&stack.api, 20).await;
    let key_since_backup = Api::of_project(stack.api.url.clone(), &stack.client, stack.api.project_id).await;

    lose_postgres(&mut stack).await;
    load.wait_for_more(20).await;
    restore_postgres(&mut stack, &base).await;
    let halted = stack.wait_for_halt("database_restored").await;
    assert!(halted.delivered.sequence > 0, "{halted:?}");
    recover(&stack, &["replay"]).await;
    let accepted = load.end().await;
    stack.wait_until_applied().await;

    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["succeeded"], accepted.len(), "{report}");
    assert_applied_once(&stack, &accepted).await;
    // Only updates that are not recorded as delivered in the backup are delivered again.
    let recorded = "SELECT encode(update_id, 'hex') FROM lead_state.lead_updates WHERE log_sequence <= $1";
    let recorded: Vec<String> = sqlx::query_scalar(recorded)
        .bind(halted.delivered.sequence.cast_signed())
        .fetch_all(&stack.pool)
        .await
        .expect("updates");
    let delivered = by_update(&stack.receiver.requests());
    assert!(!recorded.is_empty() && recorded.iter().all(|update| delivered[update].len() == 1), "{halted:?}");
    assert!(delivered.values().any(|bodies| bodies.len() > 1));
    // A key that was created after the backup is rejected after the restore.
    eventually(TEST_TIMEOUT, "the key is refused", async || {
        let (status, body) = key_since_backup.get("/api/v1/leads/get").await;
        if status == 401 { Ok(()) } else { Err(format!("{status} {body}")) }
    })
    .await;
}

#[tokio::test]
async fn deliveries_missing_from_a_restored_postgres_are_named_by_the_audit_and_made_again() {
    let (mut stack, leads) = started().await;
    let first = stack.api.update(json!({"leadId": leads[0], "name": "first"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;
    // This update is announced before the backup and delivered after it.
    stack.notifier.kill9().await;
    let second = stack.api.update(json!({"leadId": leads[1], "name": "second"})).await;
    stack.wait_until_applied().await;
    let (_backup, base) = base_backup(&stack).await;
    stack.notifier.restart().await;
    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    stop_services(&mut stack).await;
    lose_postgres(&mut stack).await;
    restore_postgres(&mut stack, &base).await;
    restart_services(&mut stack).await;

    // Log, checkpoint and events are consistent, so lead-state cannot detect the missing delivery.
    let (_, report) = stack.audit(&[]).await;
    let invariants = report["invariants"].as_array().expect("invariants");
    let undelivered = invariants.iter().find(|one| one["invariant"] == "undelivered").expect("the invariant");
    assert_eq!(undelivered["count"], 1, "{report}");
    recover(&stack, &["reannounce", "--since", "1h"]).await;
    stack.wait_for_clean_audit().await;
    assert_applied_once(&stack, &[first, second]).await;
}

#[tokio::test]
async fn a_lost_nats_is_restored_from_an_older_backup_without_loss_of_applied_updates() {
    let (mut stack, leads) = started().await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let load = Load::start(&stack.api, leads.clone());
    load.wait_for_more_applied(&stack.api, 20).await;
    let streams = back_up_streams(&stack.nats).await;
    load.wait_for_more_applied(&stack.api, 20).await;
    let applied = load.end().await;
    stack.wait_for_clean_audit().await;
    stack
        .wait_for_count("SELECT count(*) FROM lead_state.checkpoints WHERE delivered_sequence = last_sequence", 1)
        .await;
    // This update is accepted, and not yet applied when the log is lost.
    stack.lead_state.kill9().await;
    let lost = stack.api.update(json!({"leadId": leads[0], "name": "lost"})).await;

    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;
    restore_streams(&stack.nats, &streams).await;
    stack.lead_state.restart().await;
    let halted = stack.wait_for_halt("log_lost_end").await;
    assert!(halted.log_last > 0, "{halted:?}");
    recover(&stack, &["new-epoch"]).await;
    restart_services(&mut stack).await;
    stack.wait_until_applied().await;

    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["succeeded"], applied.len(), "{report}");
    assert_applied_once(&stack, &applied).await;
    assert_unknown(&stack, std::slice::from_ref(&lost)).await;
    let delivered = by_update(&stack.receiver.requests());
    assert!(applied.iter().all(|update| delivered[update].len() == 1), "delivered again though recorded as delivered");
    // The unreadable command was read again from the restored log.
    assert_eq!(stack.dead_letters().await, 2);
}

#[tokio::test]
async fn a_lost_nats_without_a_backup_is_recreated_and_keeps_applied_updates() {
    let (mut stack, leads) = started().await;
    let before = stack.api.update(json!({"leadId": leads[0], "name": "before"})).await;
    stack.wait_for_clean_audit().await;

    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;
    restart_services(&mut stack).await;

    eventually(TEST_TIMEOUT, "the keys are in their bucket", async || {
        let (status, body) = stack.api.get("/api/v1/leads/get").await;
        if status == 401 { Err(body.to_string()) } else { Ok(()) }
    })
    .await;
    let after = stack.api.update(json!({"leadId": leads[0], "name": "after"})).await;
    stack.wait_for_clean_audit().await;
    assert_applied_once(&stack, &[before, after]).await;
    assert_eq!(stack.dead_letters().await, 0);
}

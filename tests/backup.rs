//! Backups of Postgres and of the streams, taken while updates come; then one of the two is lost, or both, and restored as
//! docs/operations/backup.md says.
//!
//! Postgres by `pg_basebackup`; streams over the server's API that `nats stream backup` and `nats stream restore` speak.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_nats::Client;
use bytes::Bytes;
use contract::streams::{
    API_KEYS, IDEMPOTENCY, LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, PROCESSES, WEBHOOK_EVENTS,
};
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use test_support::{Authorization, LocalNats, LocalPostgres, NatsOptions, eventually, nats_with, postgres};
use tokio::{process::Command, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    audit::{audit, settled},
    recover::{recover, wait_for_halt},
    stack::{Api, SOON, Stack, by_update},
};

const BACKUP_PASSWORD: &str = "backup-password";

/// A stream as `nats stream backup` keeps it in a directory.
struct Snapshot {
    stream: String,
    /// `backup.json`: its configuration and state.
    about: Value,
    /// `stream.tar.s2`, as it came: messages and consumers.
    chunks: Vec<Bytes>,
}

/// A NATS whose owner may do everything, and where the documentation's user for backups is let in.
async fn nats() -> LocalNats {
    let operations = include_str!("../docs/operations/backup.md");
    let (_, user) = operations.split_once("```\n{\n  user: backup,").expect("the user");
    let (user, _) = user.split_once("```").expect("its end");
    let authorization = Authorization {
        config: format!(
            "authorization {{ users: [ {{ user: owner, password: owner-password }}, {{ user: backup,{user} ] }}"
        ),
        environment: vec![("NATS_BACKUP_PASSWORD".into(), BACKUP_PASSWORD.into())],
        user: "owner".into(),
        password: "owner-password".into(),
    };
    nats_with(NatsOptions { authorization: Some(authorization), ..NatsOptions::throwaway() }).await
}

/// A client as the `nats` CLI is one, of the documentation's user.
async fn cli(nats: &LocalNats) -> Client {
    let options = async_nats::ConnectOptions::with_user_and_password("backup".into(), BACKUP_PASSWORD.into());
    options.connect(format!("nats://127.0.0.1:{}", nats.port())).await.expect("a client")
}

/// Asks JetStream's API; its answer, which is no error.
async fn ask(client: &Client, subject: String, request: impl Into<Bytes>) -> Value {
    let answer = client.request(subject.clone(), request.into()).await.expect("an answer").payload;
    let answer: Value = serde_json::from_slice(&answer).expect("JSON");
    assert!(answer["error"].is_null(), "{subject}: {answer}");
    answer
}

/// What `nats stream backup --check` does.
async fn back_up(client: &Client, stream: &str) -> Snapshot {
    let inbox = client.new_inbox();
    let mut arriving = client.subscribe(inbox.clone()).await.expect("an inbox");
    let request = json!({"deliver_subject": inbox, "jsck": true, "chunk_size": 128 * 1024});
    let about = ask(client, format!("$JS.API.STREAM.SNAPSHOT.{stream}"), request.to_string()).await;
    let mut chunks = Vec::new();
    loop {
        let chunk = timeout(SOON, arriving.next()).await.expect("the next chunk").expect("a chunk");
        if chunk.payload.is_empty() {
            return Snapshot { stream: stream.into(), about, chunks };
        }
        chunks.push(chunk.payload);
        if let Some(reply) = chunk.reply {
            client.publish(reply, Bytes::new()).await.expect("sent");
        }
    }
}

/// What `nats stream restore` does.
async fn restore(client: &Client, snapshot: &Snapshot) {
    let request = json!({"config": snapshot.about["config"], "state": snapshot.about["state"]}).to_string();
    let answer = ask(client, format!("$JS.API.STREAM.RESTORE.{}", snapshot.stream), request).await;
    let to = answer["deliver_subject"].as_str().expect("a subject").to_owned();
    for chunk in &snapshot.chunks {
        client.request(to.clone(), chunk.clone()).await.expect("taken");
    }
    ask(client, to, Bytes::new()).await;
}

/// Backs up all streams, in the order that the documentation says.
async fn back_up_streams(nats: &LocalNats) -> Vec<Snapshot> {
    let client = cli(nats).await;
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
    let client = cli(nats).await;
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

/// Loses Postgres with all that it held.
async fn lose_postgres(stack: &mut Stack) -> PathBuf {
    let data = stack.postgres.dir().join("data");
    stack.postgres.kill9().await.expect("killed");
    // Its owner must have what is restored as well.
    std::fs::rename(&data, data.with_extension("lost")).expect("moved away");
    data
}

/// Puts a backup where the data was, and starts Postgres on it.
async fn restore_postgres(stack: &mut Stack, backup: &Path) {
    let data = stack.postgres.dir().join("data");
    let copied = Command::new("cp").arg("-a").arg(backup).arg(&data).status().await.expect("cp");
    assert!(copied.success());
    let mut chown = Command::new("chown");
    chown.arg("-R").arg(format!("--reference={}", data.with_extension("lost").display())).arg(&data);
    assert!(chown.status().await.expect("chown").success());
    stack.postgres.restart().await.expect("started");
}

/// Loses NATS with all that it held, and starts another in its place.
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

/// Updates that come all the time, of one lead after the other: no more than a test can look at afterwards.
struct Load {
    stop: CancellationToken,
    accepted: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Load {
    fn start(api: &Api, leads: Vec<String>) -> Self {
        let (stop, accepted) = (CancellationToken::new(), Arc::<Mutex<Vec<String>>>::default());
        let (api, stopped, told) = (api.clone(), stop.clone(), accepted.clone());
        let task = tokio::spawn(async move {
            for (n, lead) in leads.iter().cycle().enumerate() {
                if stopped.is_cancelled() {
                    return;
                }
                let id = api.update_stubbornly(&json!({"leadId": lead, "metadata": {"n": n}})).await;
                told.lock().expect("a lock").push(id);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { stop, accepted, task }
    }

    /// What was accepted so far.
    fn accepted(&self) -> Vec<String> {
        self.accepted.lock().expect("a lock").clone()
    }

    /// Waits until so many more are accepted, and all that were have their outcome.
    async fn go_on(&self, api: &Api, more: usize) {
        let before = self.accepted().len();
        eventually(SOON, "more is accepted", async || {
            let accepted = self.accepted().len();
            if accepted >= before + more { Ok(()) } else { Err(accepted) }
        })
        .await;
        api.outcome(self.accepted().last().expect("one")).await;
    }

    /// Ends it; all that was accepted.
    async fn end(self) -> Vec<String> {
        self.stop.cancel();
        self.task.await.expect("the load");
        self.accepted.lock().expect("a lock").clone()
    }
}

/// A stack with a process and leads.
async fn started() -> (Stack, Vec<String>) {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let operator = NatsConfig::at(nats.url());
    let stack = Stack::start_on(nats, postgres, &operator, |_| Vec::new()).await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    // As if it had been so for long: of what follows a change at once the audit does not say who wanted it.
    let long_ago = "ALTER TABLE lead_state.processes DISABLE TRIGGER note_change;
        UPDATE lead_state.processes SET changed_at = now() - interval '1 hour'";
    sqlx::raw_sql(long_ago).execute(&stack.pool).await.expect("long ago");
    let mut leads = Vec::new();
    for _ in 0..4 {
        leads.push(stack.api.initiate(applied.process.process_id.expect("an id"), None).await);
    }
    (stack, leads)
}

/// Asserts that each of these was applied, once, and told.
async fn all_there(stack: &Stack, updates: &[String]) {
    let told = by_update(&stack.receiver.requests());
    for update in updates {
        assert_eq!(stack.api.outcome(update).await["status"], "succeeded", "{update}");
        assert!(told.contains_key(update), "{update} was not told");
    }
    let twice = "SELECT count(*) - count(DISTINCT update_id) FROM lead_state.lead_updates";
    assert_eq!(stack.count(twice).await, 0);
}

/// Asserts that nothing is known of these.
async fn none_there(stack: &Stack, updates: &[String]) {
    for update in updates {
        let (status, body) = stack.api.get(&format!("/api/v1/updates/{update}")).await;
        assert_eq!((status, &body["code"]), (404, &json!("update_not_found")), "{update}: {body}");
    }
}

#[tokio::test]
async fn both_are_lost_and_restored_while_updates_came() {
    let (mut stack, leads) = started().await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let once = json!({"leadId": leads[0], "metadata": {"once": true}});
    let keyed = [("idempotency-key", "one"), ("content-type", "application/json")];
    let (_, first) = stack.api.ask(Method::POST, "/api/v1/leads/update", &keyed, &once).await;
    let load = Load::start(&stack.api, leads.clone());
    load.go_on(&stack.api, 20).await;

    let backup = tempfile::tempdir().expect("a directory");
    let base = backup.path().join("base");
    back_up_postgres(&stack.postgres, &base).await;
    load.go_on(&stack.api, 20).await;
    let kept = load.accepted();
    let streams = back_up_streams(&stack.nats).await;
    // One may have been on its way.
    load.go_on(&stack.api, 2).await;
    let since = load.accepted().len();
    load.go_on(&stack.api, 20).await;
    let accepted = load.end().await;

    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;
    lose_postgres(&mut stack).await;

    restore_postgres(&mut stack, &base).await;
    restore_streams(&stack.nats, &streams).await;
    stack.lead_state.restart().await;
    let seen = wait_for_halt(&stack, "database_restored").await;
    assert!(seen.applied.sequence < seen.log_last, "{seen:?}");
    let (well, said) = recover(&stack, &[]).await;
    assert!(well && said.contains("leadctl recover replay"), "{said}");
    let (well, said) = recover(&stack, &["replay", "--yes"]).await;
    assert!(well, "{said}");
    stack.notifier.restart().await;
    stack.gateway.restart().await;
    stack.gateway.wait_for_http(&stack.gateway_ready, SOON).await;

    stack.wait_until_applied().await;
    settled(&stack).await;
    all_there(&stack, &kept).await;
    assert_eq!(stack.dead_letters().await, 1);
    let (_, again) = stack.api.ask(Method::POST, "/api/v1/leads/update", &keyed, &once).await;
    assert_eq!(again["updateId"], first["updateId"]);
    // What came after is lost; who has its id may send it again.
    none_there(&stack, &accepted[since..]).await;
    let lost = accepted.last().expect("one");
    let sent = json!({"leadId": leads[0], "updateId": lost, "metadata": {"late": true}}).to_string();
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), sent).await;
    settled(&stack).await;
    all_there(&stack, std::slice::from_ref(lost)).await;
}

#[tokio::test]
async fn a_postgres_that_is_lost_loses_nothing() {
    let (mut stack, leads) = started().await;
    let load = Load::start(&stack.api, leads.clone());
    load.go_on(&stack.api, 20).await;
    // Noted every ten seconds.
    stack.wait_for_count("SELECT least(delivered_sequence, 1) FROM lead_state.checkpoints", 1, SOON).await;
    let backup = tempfile::tempdir().expect("a directory");
    let base = backup.path().join("base");
    back_up_postgres(&stack.postgres, &base).await;
    load.go_on(&stack.api, 20).await;
    let late = Api::of_project(stack.api.url.clone(), &stack.client, stack.api.project_id).await;

    lose_postgres(&mut stack).await;
    // Nobody waits for it.
    let before = load.accepted().len();
    eventually(SOON, "updates are accepted without Postgres", async || {
        let accepted = load.accepted().len();
        if accepted >= before + 20 { Ok(()) } else { Err(accepted) }
    })
    .await;
    restore_postgres(&mut stack, &base).await;
    let seen = wait_for_halt(&stack, "database_restored").await;
    assert!(seen.delivered.sequence > 0, "{seen:?}");
    let (well, said) = recover(&stack, &["replay", "--yes"]).await;
    assert!(well, "{said}");
    let accepted = load.end().await;
    stack.wait_until_applied().await;
    let found = settled(&stack).await;
    assert_eq!(found["updates"]["succeeded"], accepted.len(), "{found}");
    all_there(&stack, &accepted).await;

    // Told again is what was not noted as told, and nothing else.
    let told_before = "SELECT encode(update_id, 'hex') FROM lead_state.lead_updates WHERE log_sequence <= $1";
    let told_before: Vec<String> = sqlx::query_scalar(told_before)
        .bind(seen.delivered.sequence.cast_signed())
        .fetch_all(&stack.pool)
        .await
        .expect("updates");
    let told = by_update(&stack.receiver.requests());
    assert!(!told_before.is_empty() && told_before.iter().all(|update| told[update].len() == 1), "{seen:?}");
    assert!(told.values().any(|bodies| bodies.len() > 1));

    // A key that was made since is none.
    eventually(SOON, "the key is not known", async || {
        let (status, body) = late.get("/api/v1/leads/get").await;
        if status == 401 { Ok(()) } else { Err(format!("{status} {body}")) }
    })
    .await;
}

#[tokio::test]
async fn deliveries_that_a_restored_postgres_does_not_know_are_named_and_told_again() {
    let (mut stack, leads) = started().await;
    let first = stack.api.update(json!({"leadId": leads[0], "name": "first"})).await;
    stack.receiver.wait_for_requests("/crm", 1, SOON).await;
    settled(&stack).await;
    // Announced when the backup is taken, and told after it.
    stack.notifier.kill9().await;
    let second = stack.api.update(json!({"leadId": leads[1], "name": "second"})).await;
    stack.wait_until_applied().await;
    let backup = tempfile::tempdir().expect("a directory");
    let base = backup.path().join("base");
    back_up_postgres(&stack.postgres, &base).await;
    stack.notifier.restart().await;
    stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    settled(&stack).await;
    stop_services(&mut stack).await;
    lose_postgres(&mut stack).await;
    restore_postgres(&mut stack, &base).await;
    for service in [&mut stack.lead_state, &mut stack.notifier, &mut stack.gateway] {
        service.restart().await;
    }
    // Log, checkpoint and events fit together: lead-state cannot know.
    stack.lead_state.wait_for_http(&stack.lead_state_ready, SOON).await;
    stack.gateway.wait_for_http(&stack.gateway_ready, SOON).await;
    let (_, found) = audit(&stack, &[]).await;
    let untold = found["invariants"]
        .as_array()
        .expect("laws")
        .iter()
        .find(|law| law["invariant"] == "undelivered")
        .expect("the law");
    assert_eq!(untold["count"], 1, "{found}");
    let (well, said) = recover(&stack, &["reannounce", "--since", "1h", "--yes"]).await;
    assert!(well, "{said}");
    settled(&stack).await;
    all_there(&stack, &[first, second]).await;
}

#[tokio::test]
async fn a_nats_that_is_lost_is_restored_or_made_anew() {
    let (mut stack, leads) = started().await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let load = Load::start(&stack.api, leads.clone());
    load.go_on(&stack.api, 20).await;
    let streams = back_up_streams(&stack.nats).await;
    load.go_on(&stack.api, 20).await;
    let applied = load.end().await;
    settled(&stack).await;
    let all_noted = "SELECT count(*) FROM lead_state.checkpoints WHERE delivered_sequence = last_sequence";
    stack.wait_for_count(all_noted, 1, SOON).await;
    // Accepted, and not applied when it is lost.
    stack.lead_state.kill9().await;
    let lost = stack.api.update(json!({"leadId": leads[0], "name": "lost"})).await;
    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;

    restore_streams(&stack.nats, &streams).await;
    stack.lead_state.restart().await;
    let seen = wait_for_halt(&stack, "log_lost_end").await;
    let (well, said) = recover(&stack, &["new-epoch", "--yes"]).await;
    assert!(well, "{said}");
    for service in [&mut stack.notifier, &mut stack.gateway] {
        service.restart().await;
    }
    stack.gateway.wait_for_http(&stack.gateway_ready, SOON).await;
    stack.wait_until_applied().await;
    let found = settled(&stack).await;
    assert_eq!(found["updates"]["succeeded"], applied.len(), "{found}");
    all_there(&stack, &applied).await;
    none_there(&stack, std::slice::from_ref(&lost)).await;
    let told = by_update(&stack.receiver.requests());
    assert!(applied.iter().all(|update| told[update].len() == 1), "told again though it was noted as told");
    // The bad one came again from the log, and is buried again.
    assert_eq!(stack.dead_letters().await, 2);
    let more = stack.api.update(json!({"leadId": leads[0], "name": "more"})).await;
    settled(&stack).await;

    // And without a backup.
    stop_services(&mut stack).await;
    lose_nats(&mut stack).await;
    for service in [&mut stack.lead_state, &mut stack.notifier, &mut stack.gateway] {
        service.restart().await;
    }
    stack.lead_state.wait_for_http(&stack.lead_state_ready, SOON).await;
    stack.gateway.wait_for_http(&stack.gateway_ready, SOON).await;
    eventually(SOON, "the keys are in their bucket", async || {
        let (status, body) = stack.api.get("/api/v1/leads/get").await;
        if status == 401 { Err(body.to_string()) } else { Ok(()) }
    })
    .await;
    let last = stack.api.update(json!({"leadId": leads[0], "name": "last"})).await;
    settled(&stack).await;
    let all: Vec<_> = applied.into_iter().chain([more, last]).collect();
    all_there(&stack, &all).await;
    assert_eq!(stack.dead_letters().await, 0);
    assert!(seen.log_last > 0 && all.iter().collect::<HashSet<_>>().len() == all.len());
}

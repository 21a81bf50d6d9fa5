//! Crashes: every accepted update has exactly one ledger row and at least one webhook, in order, whatever dies.

use std::{
    collections::HashSet,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use contract::ObjectId;
use serde_json::json;
use sqlx::PgPool;
use test_support::{Receiver, Service, binary, eventually};

use crate::stack::{Api, SOON, Stack, by_update, service};

/// What must hold of a project when everything has settled.
pub(crate) async fn assert_settled(
    pool: &PgPool,
    project: ObjectId,
    accepted: &[String],
    requests: &[test_support::Request],
) {
    let project = project.as_bytes();
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT encode(update_id, 'hex') FROM lead_state.lead_updates WHERE project_id = $1")
            .bind(project)
            .fetch_all(pool)
            .await
            .expect("the ledger");
    let ledger: HashSet<&String> = ids.iter().collect();
    assert_eq!(ids.len(), ledger.len(), "an update stands twice in the ledger");
    let lost: Vec<_> = accepted.iter().filter(|id| !ledger.contains(id)).collect();
    assert!(lost.is_empty(), "accepted and not in the ledger: {lost:?}");

    // Applied once each, in the order of the log: versions run without gap, and every lead stands at its last one.
    let out_of_order: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY lead_id ORDER BY log_epoch, log_sequence) AS place
                               FROM lead_state.lead_updates WHERE success AND project_id = $1) AS u
         WHERE version <> place + 1",
    )
    .bind(project)
    .fetch_one(pool)
    .await
    .expect("the order");
    assert_eq!(out_of_order, 0, "versions do not follow the log");
    let drifted: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM lead_state.leads l WHERE project_id = $1
         AND l.version <> 1 + (SELECT count(*) FROM lead_state.lead_updates u WHERE u.lead_id = l.lead_id AND u.success)",
    )
    .bind(project)
    .fetch_one(pool)
    .await
    .expect("the leads");
    assert_eq!(drifted, 0, "leads do not stand where the ledger says");

    let told = by_update(requests);
    let silent: Vec<_> = ids.iter().filter(|id| !told.contains_key(*id)).collect();
    assert!(silent.is_empty(), "in the ledger and not told: {silent:?}");
    assert_eq!(told.len(), ids.len(), "told and not in the ledger");
    for bodies in told.values() {
        assert!(bodies.iter().all(|body| body == &bodies[0]), "one update, two stories: {bodies:?}");
    }
}

/// Sends updates over a few connections until told to stop; the ids of those that were accepted.
pub(crate) async fn load(api: Api, leads: Vec<String>, count: usize) -> Vec<String> {
    let lanes = leads.into_iter().map(|lead| {
        let api = api.clone();
        async move {
            let mut accepted = Vec::new();
            for number in 0..count {
                let body = json!({"leadId": lead, "metadata": {"n": number}});
                accepted.push(api.update_stubbornly(&body).await);
            }
            accepted
        }
    });
    futures::future::join_all(lanes).await.concat()
}

#[tokio::test]
async fn a_standby_takes_over_within_five_seconds_of_a_kill_under_load() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..8 {
        leads.push(stack.api.initiate(process_id, Some(&format!("R-{number}"))).await);
    }
    let (mut standby, ready) = service("lead-state", &stack.nats, &stack.postgres, &[]);
    standby.wait_for_http(&ready, SOON).await;
    standby.wait_for_log("standing by", SOON).await;

    let loading = tokio::spawn(load(stack.api.clone(), leads.clone(), 250));
    eventually(SOON, "the load is under way", async || {
        stack.count("SELECT count(*) FROM lead_state.lead_updates").await > 300
    })
    .await;
    stack.lead_state.kill9().await;
    let killed = Instant::now();
    let probe = stack.api.update_stubbornly(&json!({"leadId": leads[0], "name": "probe"})).await;
    stack.api.outcome(&probe).await;
    assert!(killed.elapsed() < Duration::from_secs(5), "took {:?}; the standby:\n{}", killed.elapsed(), standby.log());

    // A leader that hangs is cut and succeeded as well, and does no harm when it wakes up.
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_log("standing by", SOON).await;
    standby.freeze();
    let frozen = Instant::now();
    let second = stack.api.update_stubbornly(&json!({"leadId": leads[1], "name": "probe"})).await;
    // Not asked of lead-state: the one that hangs would swallow some of the questions for a second each.
    eventually(SOON, "the update is applied", async || {
        let applied = "SELECT count(*) FROM lead_state.lead_updates WHERE encode(update_id, 'hex') = $1";
        let applied: i64 =
            sqlx::query_scalar(applied).bind(&second).fetch_one(&stack.pool).await.expect("the number of rows");
        applied == 1
    })
    .await;
    assert!(
        frozen.elapsed() < Duration::from_secs(8),
        "took {:?}; the standby:\n{}",
        frozen.elapsed(),
        stack.lead_state.log()
    );
    standby.thaw();

    let mut accepted = loading.await.expect("the load");
    accepted.extend([probe, second]);
    stack
        .wait_for_count(
            "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'",
            accepted.len() as i64,
            SOON,
        )
        .await;
    assert_settled(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn a_reader_whose_checkpoint_was_moved_writes_nothing() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.checkpoints", 1, SOON).await;

    // The leader has read the command and decided it, and comes to the checkpoint while somebody else moves it past.
    let mut other = stack.pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE lead_state.checkpoints SET last_sequence = 1, announced_sequence = 1")
        .execute(&mut *other)
        .await
        .expect("the checkpoint");
    stack.api.update(json!({"leadId": lead_id, "name": "too late"})).await;
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    stack.wait_for_count(waiting, 1, SOON).await;
    other.commit().await.expect("commit");

    let next = stack.api.update(json!({"leadId": lead_id, "name": "in time"})).await;
    assert_eq!(stack.api.outcome(&next).await["status"], "succeeded");
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 1);
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

#[tokio::test]
async fn what_was_decided_ahead_of_a_write_that_failed_is_decided_again() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.checkpoints", 1, SOON).await;

    // The first update cannot be written while somebody holds the checkpoint; the others are decided meanwhile.
    let mut other = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM lead_state.checkpoints FOR UPDATE").execute(&mut *other).await.expect("the checkpoint");
    let mut updates = vec![stack.api.update(json!({"leadId": lead_id, "metadata": {"n": 0}})).await];
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    stack.wait_for_count(waiting, 1, SOON).await;
    for number in 1..4 {
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await);
    }
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    assert_eq!(stack.count(cut).await, 1);
    other.rollback().await.expect("rollback");

    for (number, update) in updates.iter().enumerate() {
        let story = stack.api.outcome(update).await;
        assert_eq!((&story["status"], &story["version"]), (&json!("succeeded"), &json!(number + 2)));
    }
    let last = "SELECT count(*) FROM lead_state.leads WHERE version = 5 AND metadata->>'n' = '3'";
    assert_eq!(stack.count(last).await, 1);
}

#[tokio::test]
async fn rules_that_change_decide_what_comes_later() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let mut states = vec![json!({"name": "new", "kind": "initial"}), json!({"name": "interested"})];
    for (number, state) in ["interested", "visited", "won"].into_iter().enumerate() {
        let to = json!({"leadId": lead_id, "targetState": state});
        if number > 0 {
            let refused = stack.api.outcome(&stack.api.update(to.clone()).await).await;
            assert_eq!(refused["errorCode"], "unknown_state", "{refused}");
            // The leader knows the rules, and is told nothing.
            states.push(json!({"name": state}));
            let spec = json!({"projectId": stack.api.project_id, "name": "sales", "states": states});
            stack.apply(spec).await;
        }
        let story = stack.api.outcome(&stack.api.update(to).await).await;
        assert_eq!(story["status"], "succeeded", "{story}");
    }
}

#[tokio::test]
async fn a_log_that_was_made_anew_starts_a_new_epoch() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    for number in 0..3 {
        let update = stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
        assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
    }
    // Everything that NATS had is gone; who makes the streams is lead-state, at its next start.
    let js = service_kit::nats::jetstream(&stack.client);
    js.delete_stream(contract::streams::LEAD_COMMANDS).await.expect("deleted");
    stack.lead_state.terminate().await;
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_log("starting a new epoch", SOON).await;

    let update = stack.api.update_stubbornly(&json!({"leadId": lead_id, "metadata": {"n": 3}})).await;
    let story = stack.api.outcome(&update).await;
    assert_eq!((&story["status"], &story["version"]), (&json!("succeeded"), &json!(5)));
    assert_eq!(stack.count("SELECT epoch::bigint FROM lead_state.checkpoints").await, 2);
    stack.receiver.wait_for_requests("/crm", 4, SOON).await;
}

#[tokio::test]
async fn nats_and_postgres_may_die() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..4 {
        leads.push(stack.api.initiate(process_id, Some(&format!("R-{number}"))).await);
    }
    let loading = tokio::spawn(load(stack.api.clone(), leads, 150));
    let progress = |count: i64| {
        let pool = stack.pool.clone();
        async move {
            eventually(SOON, "progress", async || {
                let ledger = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM lead_state.lead_updates");
                ledger.fetch_one(&pool).await.is_ok_and(|rows| rows >= count)
            })
            .await;
        }
    };
    progress(50).await;
    stack.postgres.kill9().await.expect("kill");
    stack.postgres.restart().await.expect("restart");
    progress(150).await;
    stack.nats.kill9().await.expect("kill");
    stack.nats.restart().await.expect("restart");
    let accepted = loading.await.expect("the load");
    // An update whose ack was lost on the way may be there beside the one that was sent in its stead.
    eventually(SOON * 2, "all is told", async || {
        let told = by_update(&stack.receiver.requests());
        let missing: Vec<_> = accepted.iter().filter(|id| !told.contains_key(*id)).collect();
        let ledger = stack.count("SELECT count(*) FROM lead_state.lead_updates").await;
        if missing.is_empty() && ledger == told.len() as i64 {
            Ok(())
        } else {
            Err(format!("{ledger} in the ledger, untold: {missing:?}"))
        }
    })
    .await;
    assert_settled(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

/// `leadctl up --demo` on a data directory.
fn up(data: &Path) -> Service {
    let mut command = Command::new(binary("leadctl"));
    command.args(["up", "--demo", "--data-dir"]).arg(data).env_remove("NATS_URL").env_remove("DATABASE_URL");
    Service::spawn("leadctl", command)
}

/// What `up` says of itself once everything is ready.
async fn stack_env(data: &Path, started: std::time::SystemTime) -> std::collections::HashMap<String, String> {
    let file = data.join("stack.env");
    eventually(SOON * 3, "stack.env is written", async || {
        let written = std::fs::metadata(&file).and_then(|meta| meta.modified()).map_err(|e| e.to_string())?;
        if written < started {
            return Err("it is of the run before".to_owned());
        }
        let text = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
        Ok(text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    })
    .await
}

#[tokio::test]
async fn a_killed_up_goes_on_where_it_was() {
    let data = tempfile::tempdir().expect("a directory");
    // Postgres' user must get through.
    std::fs::set_permissions(data.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
    let receiver = Receiver::start().await;
    let started = std::time::SystemTime::now();
    let mut leadctl = up(data.path());
    let env = stack_env(data.path(), started).await;
    leadctl.wait_for_log("Ctrl-C", SOON).await;

    let nats = service_kit::config::NatsConfig::at(&env["NATS_URL"]);
    let client = service_kit::nats::connect(&nats, "test", &Default::default()).await.expect("NATS");
    let api = Api::create(env["LEADRELAY_GATEWAY_URL"].clone(), &client, "load").await;
    let spec = json!({
        "projectId": api.project_id, "name": "sales", "states": [{"name": "new"}],
        "callbacks": [{"name": "crm", "url": receiver.url("/crm")}],
    });
    let spec: contract::process::ProcessSpec = serde_json::from_value(spec).expect("a process");
    let applied: contract::rpc::ProcessChangeResult =
        crate::stack::call(&client, contract::rpc::PROCESS_APPLY, &spec).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..16 {
        leads.push(api.initiate(process_id, Some(&format!("R-{number}"))).await);
    }

    // Killed in the middle, started again: the gateway may come back on its port while the load still knocks.
    let loading = tokio::spawn(load(api.clone(), leads, 200));
    receiver.wait_for_requests("/crm", 500, SOON * 2).await;
    leadctl.kill9().await;
    let started = std::time::SystemTime::now();
    let mut leadctl = up(data.path());
    let again = stack_env(data.path(), started).await;
    for name in ["LEADRELAY_GATEWAY_URL", "LEADRELAY_API_KEY", "LEADRELAY_PROJECT_ID", "LEADRELAY_LEAD_ID"] {
        assert_eq!(env[name], again[name], "{name} was kept");
    }
    let accepted = loading.await.expect("the load");
    assert_eq!(accepted.len(), 16 * 200);

    let pool = PgPool::connect(&again["DATABASE_URL"]).await.expect("Postgres");
    eventually(SOON * 2, "all is told", async || {
        let told = by_update(&receiver.requests());
        let missing = accepted.iter().filter(|id| !told.contains_key(*id)).count();
        if missing == 0 { Ok(()) } else { Err(format!("{missing} of {}", accepted.len())) }
    })
    .await;
    assert_settled(&pool, api.project_id, &accepted, &receiver.requests()).await;
    pool.close().await;

    let stopping = Instant::now();
    assert!(leadctl.terminate().await.success());
    assert!(stopping.elapsed() < Duration::from_secs(15), "took {:?}", stopping.elapsed());
    // Nothing is left that was started for this directory.
    let ours = data.path().to_string_lossy().into_owned();
    eventually(SOON, "no process is left", async || {
        let left: Vec<_> = std::fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|line| line.contains(&ours))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_log_whose_configuration_changes_is_still_the_same_log() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.api.update(json!({"leadId": lead_id, "name": "a"})).await;
    stack.wait_until_applied().await;
    // What is changed after a restart and read back after another one: nats-server 2.9 gives the stream a new time of its
    // making on the way.
    stack.nats.restart().await.expect("nats-server");
    let js = service_kit::nats::jetstream(&stack.client);
    eventually(SOON, "the log is configured anew", async || {
        let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.map_err(|e| e.to_string())?;
        let mut config = log.cached_info().config.clone();
        config.max_bytes /= 2;
        js.update_stream(config).await.map_err(|e| e.to_string())
    })
    .await;
    stack.nats.restart().await.expect("nats-server");
    stack.api.update_stubbornly(&json!({"leadId": lead_id, "name": "b"})).await;
    stack.wait_for_count("SELECT version FROM lead_state.leads", 3, SOON).await;
    assert_eq!(stack.count("SELECT epoch::bigint FROM lead_state.checkpoints").await, 1, "a new epoch");
}

#[tokio::test]
async fn a_log_that_loses_what_nobody_applied_is_not_read_past_the_hole() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    // More than is read ahead while nothing can be applied.
    let mut holding = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT 1 FROM lead_state.checkpoints FOR UPDATE")
        .execute(&mut *holding)
        .await
        .expect("the checkpoint");
    let js = service_kit::nats::jetstream(&stack.client);
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);
    let body = bytes::Bytes::from(json!({"leadId": lead_id, "name": "x"}).to_string());
    for _ in 0..15 {
        let mut acks = Vec::new();
        for _ in 0..1000 {
            acks.push(js.publish(subject.clone(), body.clone()).await.expect("a publish"));
        }
        for ack in acks {
            ack.await.expect("an ack");
        }
    }
    let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    log.purge().sequence(14_001).await.expect("a purge");
    holding.rollback().await.expect("the end");
    stack.lead_state.wait_for_log("LEAD_COMMANDS begins at 14001", SOON * 2).await;
    let last = stack.count("SELECT max(log_sequence) FROM lead_state.lead_updates").await;
    assert!(last < 14_000, "{last} was applied, behind a hole in the log");
}

#[tokio::test]
async fn what_was_applied_and_not_announced_is_announced_by_the_next_leader() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    // Nobody takes events.
    let js = service_kit::nats::jetstream(&stack.client);
    let events = js.get_stream(contract::streams::LEAD_EVENTS).await.expect("the events").cached_info().config.clone();
    let deaf = async_nats::jetstream::stream::Config { subjects: vec!["elsewhere".into()], ..events.clone() };
    js.update_stream(deaf).await.expect("a deaf stream");
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", 1, SOON).await;
    stack.lead_state.kill9().await;
    js.update_stream(events).await.expect("a stream that listens");
    stack.lead_state.restart().await;
    let told = stack.receiver.wait_for_requests("/crm", 1, SOON).await;
    assert_eq!(told[0].json()["updateId"], json!(update_id));
}

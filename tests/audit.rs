//! `leadctl audit`: each law is broken by hand and seen; live load gives no false alarm.

use std::collections::{BTreeMap, BTreeSet};

use contract::{
    ObjectId,
    streams::{LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use serde_json::{Value, json};
use test_support::{binary, eventually};

use crate::stack::{SOON, Stack};

/// Laws, each with who breaks it.
type Offenders = Vec<(&'static str, Vec<String>)>;

/// Runs the audit: its exit code and what it found.
pub(crate) async fn audit(stack: &Stack, args: &[&str]) -> (i32, Value) {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    command.args(["audit", "--json"]).args(args);
    command.env("DATABASE_URL", stack.postgres.url()).env("NATS_URL", stack.nats.url());
    let output = command.output().await.expect("leadctl");
    let code = output.status.code().unwrap_or_else(|| panic!("{}", output.status));
    let text = String::from_utf8_lossy(&output.stdout);
    let found = serde_json::from_str(&text);
    let found = found.unwrap_or_else(|e| panic!("{e}: {code} {text} {}", String::from_utf8_lossy(&output.stderr)));
    (code, found)
}

/// The laws that are broken, each with who breaks it.
fn broken(found: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let laws = found["invariants"].as_array().expect("laws").iter().filter(|law| law["count"] != 0);
    laws.map(|law| {
        let offenders = law["violations"].as_array().expect("offenders");
        assert_eq!(law["count"], offenders.len(), "{law}");
        (text(&law["invariant"]), offenders.iter().map(|offender| text(&offender["id"])).collect())
    })
    .collect()
}

/// Audits until everything is applied and told, and nothing is wrong.
pub(crate) async fn settled(stack: &Stack) -> Value {
    eventually(SOON * 2, "a clean audit with nothing pending", async || {
        let (code, found) = audit(stack, &[]).await;
        let waiting = |told: &Value| told["pending"] != 0;
        let pending = found["updates"]["pending"] != 0
            || found["callbacks"].as_array().expect("callbacks").iter().any(waiting)
            || found["checkpoint"]["announcedSequence"] != found["checkpoint"]["lastSequence"];
        if code == 0 && !pending { Ok(found) } else { Err(found.to_string()) }
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
async fn each_law_is_seen_broken_and_the_offender_named() {
    let mut stack = Stack::start().await;
    let callbacks = json!([
        {"name": "crm", "url": stack.receiver.url("/crm")},
        {"name": "failures", "url": stack.receiver.url("/failures"), "events": ["update.failed"]},
    ]);
    let applied = stack.process(callbacks).await;
    let process = &applied.process;
    let (crm, failures) = (process.callbacks[0].callback_id, process.callbacks[1].callback_id);
    // As if it had been so for long: what follows a change at once cannot be judged.
    sql(
        &stack,
        "ALTER TABLE lead_state.processes DISABLE TRIGGER note_change;
         UPDATE lead_state.processes SET changed_at = now() - interval '1 hour'",
    )
    .await;
    let lead = stack.api.initiate(process.process_id.expect("an id"), None).await;
    let project = stack.api.project_id;
    let log = format!("leads.cmd.{project}.update");

    let first = stack.api.update(json!({"leadId": lead, "metadata": {"n": 1}})).await;
    let failed = stack.api.update(json!({"leadId": lead, "targetState": "nowhere"})).await;
    // A call event: entry 3.
    stack.publish(format!("leads.cmd.{project}.call.ended"), json!({"leadId": lead}).to_string()).await;
    let second = stack.api.update(json!({"leadId": lead, "targetState": "interested"})).await;
    // Without an id; twice under one; and what nobody can read.
    stack.publish(log.clone(), json!({"leadId": lead, "name": "anonymous"}).to_string()).await;
    let repeated = json!({"updateId": ObjectId::from_bytes([0x6b; 12]), "leadId": lead, "name": "again"}).to_string();
    stack.publish(log.clone(), repeated.clone()).await;
    stack.publish(log.clone(), repeated).await;
    stack.publish(log, "no JSON").await;
    let last = stack.api.update(json!({"leadId": lead, "metadata": {"n": 9}})).await;
    stack.api.outcome(&last).await;

    let found = settled(&stack).await;
    let expected = json!({"accepted": 6, "succeeded": 5, "failed": 1, "pending": 0, "queued": 0, "duplicates": 1, "deadLetters": 1});
    assert_eq!(found["updates"], expected, "{found}");
    assert_eq!(found["unchecked"], json!([]), "{found}");
    let told = |callback: &str| {
        let callbacks = found["callbacks"].as_array().expect("callbacks");
        let told = callbacks.iter().find(|told| told["name"] == callback).expect(callback);
        (told["announced"].clone(), told["delivered"].clone())
    };
    assert_eq!(told("crm"), (json!(6), json!(6)));
    assert_eq!(told("failures"), (json!(1), json!(1)));

    // A leader that begins a term meanwhile would mend some of what is broken here.
    stack.lead_state.terminate().await;
    // An attempt with a row of its own, as each had before.
    let apart = format!(
        "INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt WHERE update_id = '\\x{second}';
         UPDATE webhooks.deliveries SET first_started_at = NULL, first_duration_ms = NULL, first_status_code = NULL
         WHERE update_id = '\\x{second}'"
    );
    sql(&stack, &apart).await;
    assert_eq!(audit(&stack, &[]).await.0, 0);
    sql(
        &stack,
        "CREATE TABLE ledger AS TABLE lead_state.lead_updates;
         CREATE TABLE deliveries AS TABLE webhooks.deliveries;
         CREATE TABLE attempts AS TABLE webhooks.attempts",
    )
    .await;
    let restore = "
        DELETE FROM lead_state.queued_updates;
        DELETE FROM lead_state.lead_updates; INSERT INTO lead_state.lead_updates SELECT * FROM ledger;
        DELETE FROM webhooks.deliveries; INSERT INTO webhooks.deliveries SELECT * FROM deliveries;
        DELETE FROM webhooks.attempts; INSERT INTO webhooks.attempts SELECT * FROM attempts";
    let of = |update: &str, callback: ObjectId| format!("{update}/{callback}");
    let unknown = ObjectId::new(service_kit::clock::now(), [7; 8]).to_string();
    let cases: Vec<(&str, String, Offenders)> = vec![
        (
            "a ledger row is gone",
            format!("DELETE FROM lead_state.lead_updates WHERE update_id = '\\x{failed}'"),
            vec![("unaccounted", vec![failed.clone()]), ("unfounded", vec![of(&failed, crm), of(&failed, failures)])],
        ),
        (
            "a ledger row is made up",
            format!(
                "INSERT INTO lead_state.lead_updates SELECT l.* FROM ledger g, json_populate_record(
                     NULL::lead_state.lead_updates,
                     (to_jsonb(g) || jsonb_build_object('update_id', '\\x{unknown}', 'log_sequence', 3))::json) l
                 WHERE g.update_id = '\\x{failed}'"
            ),
            vec![
                ("unlogged", vec![unknown.clone()]),
                ("unannounced", vec![unknown.clone()]),
                ("undelivered", vec![of(&unknown, crm), of(&unknown, failures)]),
            ],
        ),
        (
            "a ledger row stands at another's place",
            format!("UPDATE lead_state.lead_updates SET log_sequence = 4 WHERE update_id = '\\x{failed}'"),
            vec![("unlogged", vec![failed.clone(), second.clone()])],
        ),
        (
            "what is in the ledger is held as well",
            format!(
                "INSERT INTO lead_state.queued_updates
                     (project_id, update_id, lead_id, log_epoch, log_sequence, logged_at, command)
                 SELECT project_id, update_id, lead_id, log_epoch, log_sequence, logged_at, command
                 FROM lead_state.lead_updates WHERE update_id = '\\x{first}'"
            ),
            vec![("queue_inconsistent", vec![first.clone()])],
        ),
        (
            "a version is another",
            format!("UPDATE lead_state.lead_updates SET version = 7 WHERE update_id = '\\x{first}'"),
            vec![("out_of_order", vec![first.clone(), second.clone()])],
        ),
        (
            "a state is another",
            format!("UPDATE lead_state.lead_updates SET from_state = 'lost' WHERE update_id = '\\x{second}'"),
            vec![("out_of_order", vec![second.clone()])],
        ),
        (
            "a lead moved by itself",
            "UPDATE lead_state.leads SET version = version + 1".into(),
            vec![("lead_differs", vec![lead.clone()])],
        ),
        (
            "the checkpoint is behind the ledger",
            "UPDATE lead_state.checkpoints SET last_sequence = last_sequence - 1, announced_sequence = announced_sequence - 1".into(),
            vec![("beyond_checkpoint", vec![last.clone()])],
        ),
        (
            "the log is another",
            "UPDATE lead_state.checkpoints SET stream_created_at = stream_created_at || '0'".into(),
            vec![("beyond_checkpoint", vec!["LEAD_COMMANDS".into()])],
        ),
        (
            "a delivery is gone",
            format!("DELETE FROM webhooks.deliveries WHERE update_id = '\\x{first}'"),
            vec![("undelivered", vec![of(&first, crm)])],
        ),
        (
            "a delivery is made up",
            format!(
                "INSERT INTO webhooks.deliveries SELECT d.* FROM deliveries g, jsonb_populate_record(
                     NULL::webhooks.deliveries, to_jsonb(g) || jsonb_build_object('update_id', '\\x{unknown}')) d
                 WHERE g.update_id = '\\x{first}'"
            ),
            vec![("unfounded", vec![of(&unknown, crm)])],
        ),
        (
            "attempts are gone",
            format!(
                "UPDATE webhooks.deliveries SET first_started_at = NULL WHERE update_id = '\\x{first}';
                 DELETE FROM webhooks.attempts WHERE update_id = '\\x{second}'"
            ),
            vec![("attempts", vec![of(&first, crm), of(&second, crm)])],
        ),
        (
            "what is delivered was refused",
            format!(
                "UPDATE webhooks.deliveries SET first_status_code = 500 WHERE update_id = '\\x{first}';
                 UPDATE webhooks.attempts SET status_code = 500 WHERE update_id = '\\x{second}'"
            ),
            vec![("attempts", vec![of(&first, crm), of(&second, crm)])],
        ),
        (
            "an attempt stands in both places",
            format!(
                "INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt WHERE update_id = '\\x{first}'"
            ),
            vec![("attempts", vec![of(&first, crm)])],
        ),
        (
            "an attempt belongs to nothing",
            format!("UPDATE webhooks.attempts SET update_id = '\\x{unknown}' WHERE update_id = '\\x{second}'"),
            vec![("attempts", vec![of(&second, crm), of(&unknown, crm)])],
        ),
    ];
    for (what, break_it, offenders) in cases {
        sql(
            &stack,
            "CREATE TABLE leads AS TABLE lead_state.leads; CREATE TABLE checkpoints AS TABLE lead_state.checkpoints",
        )
        .await;
        sql(&stack, &break_it).await;
        let (code, found) = audit(&stack, &[]).await;
        let expected: BTreeMap<String, BTreeSet<String>> =
            offenders.into_iter().map(|(law, ids)| (law.to_owned(), ids.into_iter().collect())).collect();
        assert_eq!((code, broken(&found)), (1, expected), "{what}: {found}");
        sql(&stack, restore).await;
        sql(
            &stack,
            "UPDATE lead_state.leads l SET version = b.version FROM leads b WHERE b.lead_id = l.lead_id;
             UPDATE lead_state.checkpoints c SET stream_created_at = b.stream_created_at, last_sequence = b.last_sequence,
                 announced_sequence = b.announced_sequence FROM checkpoints b;
             DROP TABLE leads; DROP TABLE checkpoints",
        )
        .await;
    }
    assert_eq!(broken(&audit(&stack, &[]).await.1), BTreeMap::new());

    // An event that never was: of a row that counts as announced, and of one that does not.
    let js = service_kit::nats::jetstream(&stack.client);
    let events = js.get_stream(LEAD_EVENTS).await.expect("events");
    let consumer = events.consumer_info(NOTIFIER_CONSUMER).await.expect("a consumer");
    assert_eq!(consumer.ack_floor.stream_sequence, 6);
    assert!(events.delete_message(6).await.expect("deleted"));
    let (code, found) = audit(&stack, &[]).await;
    let only = |law: &str, id: String| BTreeMap::from([(law.to_owned(), BTreeSet::from([id]))]);
    assert_eq!((code, broken(&found)), (1, only("unannounced", last.clone())), "{found}");
    sql(&stack, "UPDATE lead_state.checkpoints SET announced_sequence = announced_sequence - 1").await;
    let (code, found) = audit(&stack, &[]).await;
    assert_eq!((code, broken(&found)), (1, only("unfounded", of(&last, crm))), "{found}");
}

#[tokio::test]
async fn a_range_of_time_and_a_project_are_audited_alone() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    for number in 0..4 {
        let update = stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await;
        stack.api.outcome(&update).await;
    }
    let logged = |number: usize| {
        let pool = stack.pool.clone();
        async move {
            let times: Vec<String> = sqlx::query_scalar(
                r#"SELECT to_char(logged_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
                   FROM lead_state.lead_updates ORDER BY log_sequence"#,
            )
            .fetch_all(&pool)
            .await
            .expect("the ledger");
            times[number].clone()
        }
    };
    settled(&stack).await;
    let (from, to) = (logged(1).await, logged(3).await);
    let project = stack.api.project_id.to_string();
    for (args, accepted) in [
        (vec!["--from", from.as_str(), "--to", to.as_str()], 2),
        (vec!["--from", to.as_str()], 1),
        (vec!["--since", "1h", "--project", project.as_str()], 4),
        (vec!["--project", "ffffffffffffffffffffffff"], 0),
    ] {
        let (code, found) = audit(&stack, &args).await;
        assert_eq!((code, &found["updates"]["accepted"]), (0, &json!(accepted)), "{args:?} {found}");
    }
    // A fault outside of the range is none of its business.
    sql(&stack, "UPDATE lead_state.lead_updates SET from_state = 'lost' WHERE log_sequence = 4").await;
    assert_eq!(audit(&stack, &["--to", &from]).await.0, 0);
    assert_eq!(audit(&stack, &["--from", &to]).await.0, 1);
}

#[tokio::test]
async fn live_load_and_crashes_give_no_false_alarm() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms,100ms,100ms")]).await;
    stack.receiver.on("/flaky", [500, 200, 200]);
    let callbacks = json!([
        {"name": "crm", "url": stack.receiver.url("/crm")}, {"name": "flaky", "url": stack.receiver.url("/flaky")},
    ]);
    let applied = stack.process(callbacks).await;
    let mut lanes = Vec::new();
    for _ in 0..6 {
        let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
        let api = stack.api.clone();
        lanes.push(async move {
            for number in 0..150 {
                // Every tenth fails.
                let body = match number % 10 {
                    9 => json!({"leadId": lead, "targetState": "nowhere"}),
                    _ => json!({"leadId": lead, "metadata": {"n": number}}),
                };
                api.update_stubbornly(&body).await;
            }
        });
    }
    let load = tokio::spawn(futures::future::join_all(lanes));
    let mut audits = 0;
    while !load.is_finished() || audits < 4 {
        let (code, found) = audit(&stack, &[]).await;
        assert_eq!(code, 0, "{found}");
        audits += 1;
        match audits {
            1 => {
                stack.lead_state.kill9().await;
                stack.lead_state.restart().await;
            }
            2 => {
                stack.notifier.kill9().await;
                stack.notifier.restart().await;
            }
            _ => {}
        }
    }
    load.await.expect("the load");
    let found = settled(&stack).await;
    assert!(found["updates"]["accepted"].as_i64().expect("a number") >= 6 * 150, "{found}");
}

#[tokio::test]
async fn what_cannot_be_audited_is_not_called_clean() {
    let stack = Stack::start().await;
    for (variable, url) in [("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none"), ("NATS_URL", "nats://127.0.0.1:1")]
    {
        let mut command = tokio::process::Command::new(binary("leadctl"));
        command.arg("audit").env("DATABASE_URL", stack.postgres.url()).env("NATS_URL", stack.nats.url());
        let output = command.env(variable, url).output().await.expect("leadctl");
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("the audit could not run"));
        assert!(output.stdout.is_empty());
    }
}

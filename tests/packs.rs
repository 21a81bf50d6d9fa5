//! Packs: many commands in one message of the log have the same effect as separate messages.

use bytes::Bytes;
use contract::{
    ObjectId,
    pack::{self, PackedCommand},
    subject::PACKS,
};
use futures::future::join_all;
use serde_json::{Value, json};
use test_support::{Signal, eventually};

use crate::support::{Api, BLOCKED, LEDGER_ROWS, Stack, TEST_TIMEOUT, Tenant, assert_includes, letter_number};

fn command(project_id: ObjectId, kind: &str, body: impl ToString) -> PackedCommand {
    PackedCommand {
        subject: format!("leads.cmd.{project_id}.{kind}"),
        traceparent: None,
        payload: Bytes::from(body.to_string()),
    }
}

/// An update with an id that ends in this number.
fn numbered(lead_id: &str, number: u32) -> Value {
    json!({"updateId": format!("{:08x}{number:016x}", 0x6964_7edf), "leadId": lead_id, "metadata": {"n": number}})
}

async fn publish(stack: &Stack, commands: &[PackedCommand]) {
    stack.publish(PACKS.into(), pack::write(commands).expect("a pack")).await;
}

#[tokio::test]
async fn the_commands_of_a_pack_are_applied_once_and_in_order() {
    let stack = Stack::start().await;
    let ours = stack.lead(&["crm"]).await;
    let own = stack.api.project_id;
    let Tenant { api: other, lead_id: theirs, .. } = Tenant::new(&stack, "other", json!([])).await;

    let (third, last) = (numbered(&ours, 3), numbered(&theirs, 7));
    publish(
        &stack,
        &[
            command(own, "update", numbered(&ours, 1)),
            command(other.project_id, "update", numbered(&theirs, 2)),
            command(own, "call.started", json!({"leadId": ours, "callId": "c"})),
            command(own, "update", &third),
            command(own, "call.ended", json!({"leadId": ours, "callId": "c"})),
            command(own, "update", numbered(&ours, 6)),
            command(other.project_id, "update", &last),
            // Both commands have no id, and each gets its own.
            command(own, "update", json!({"leadId": ours, "name": "Eve"})),
            command(own, "update", json!({"leadId": ours, "name": "Ada"})),
        ],
    )
    .await;
    // The command is sent again, in a pack and as a separate message.
    publish(&stack, &[command(other.project_id, "update", &last), command(own, "update", &third)]).await;
    stack.publish_update(&numbered(&ours, 6)).await;

    let sequence = stack.wait_until_applied().await;
    assert_eq!(sequence, 3, "three messages");
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 9);
    assert_eq!(stack.count("SELECT count(DISTINCT log_index) FROM lead_state.lead_updates").await, 9);
    let refused = stack.api.outcome(third["updateId"].as_str().expect("an id")).await;
    assert_includes(&refused, json!({"status": "failed", "errorCode": "call_in_progress"}));
    let names = "SELECT count(*) FROM lead_state.leads WHERE name = 'Ada' AND version = 5 AND metadata->>'n' = '6'";
    assert_eq!(stack.count(names).await, 1);
    let report = stack.wait_for_clean_audit().await;
    assert_includes(&report["updates"], json!({"accepted": 9, "failed": 1, "duplicates": 3, "deadLetters": 0}));
    let (code, report) = stack.audit(&["--project", &other.project_id.to_string()]).await;
    assert_eq!(code, 0, "{report}");
    assert_includes(&report["updates"], json!({"accepted": 2, "succeeded": 2, "duplicates": 1}));
}

#[tokio::test]
async fn a_bad_command_of_a_pack_is_a_dead_letter_alone() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    let own = stack.api.project_id;
    // This constraint represents any fault of the data that validation does not detect.
    stack.sql("ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison')").await;

    let mut poison = numbered(&lead, 3);
    poison["userId"] = "poison".into();
    publish(
        &stack,
        &[
            command(own, "update", numbered(&lead, 1)),
            command(own, "update", r#"{"name":"\u0000"}"#),
            command(own, "update", &poison),
            command(own, "explode", "{}"),
            command(own, "update", numbered(&lead, 5)),
        ],
    )
    .await;

    let letters = stack.wait_for_letters(3).await;
    let mut reasons: Vec<_> = letters.iter().map(|letter| letter["reason"].as_str().expect("a reason")).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["invalid_json", "invalid_subject", "unapplicable"]);
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates WHERE success", 2).await;
    stack.wait_for_clean_audit().await;

    stack.sql("ALTER TABLE lead_state.lead_updates DROP CONSTRAINT odd").await;
    let letter = letters.iter().find(|letter| letter["reason"] == "unapplicable").expect("the letter");
    stack.dead_letters_json(&["replay", &letter_number(letter)]).await;
    assert_includes(
        &stack.api.outcome(poison["updateId"].as_str().expect("an id")).await,
        json!({"status": "succeeded", "version": 4}),
    );
    let report = stack.wait_for_clean_audit().await;
    assert_includes(&report["updates"], json!({"accepted": 3, "succeeded": 3, "deadLetters": 3}));
}

#[tokio::test]
async fn a_message_that_is_no_pack_is_a_dead_letter() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    for body in ["nonsense", r#"{"commands":[]}"#] {
        stack.publish(PACKS.into(), body).await;
    }

    assert_eq!(stack.api.update_and_wait(json!({"leadId": lead, "name": "Eve"})).await["status"], "succeeded");

    for letter in stack.wait_for_letters(2).await {
        assert_includes(&letter, json!({"reason": "invalid_command", "subject": PACKS}));
    }
    stack.wait_for_clean_audit().await;
}

/// A batch that Postgres rejects is split into separate transactions, and the leader may die between them.
#[tokio::test]
async fn a_leader_that_dies_inside_a_pack_is_followed_by_one_that_applies_the_rest() {
    let mut stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    let own = stack.api.project_id;
    // Rows of the user `waiting` cannot be written before the test releases its lock.
    stack
        .sql(
            "ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison');
             CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.user_id = 'waiting' THEN PERFORM pg_advisory_xact_lock_shared(7); END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER wait BEFORE INSERT ON lead_state.lead_updates FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        .await;
    let mut lock = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT pg_advisory_xact_lock(7)").execute(&mut *lock).await.expect("the lock");
    let of_user = |number, user: &str| {
        let mut body = numbered(&lead, number);
        body["userId"] = user.into();
        command(own, "update", body)
    };
    let users = ["", "poison", "", "waiting", ""];
    let commands: Vec<_> = (0..).zip(users).map(|(number, user)| of_user(number, user)).collect();

    publish(&stack, &commands).await;
    stack.wait_for_count("SELECT last_index::bigint FROM lead_state.checkpoints", 1).await;
    stack.wait_for_count(BLOCKED, 1).await;
    stack.lead_state.kill9().await;
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    assert_eq!(stack.count(cut).await, 1);
    lock.rollback().await.expect("rollback");
    assert_eq!(stack.count(LEDGER_ROWS).await, 1, "the first command, and the second is a dead letter");
    stack.lead_state.restart().await;

    stack.wait_for_count_within(TEST_TIMEOUT, LEDGER_ROWS, 4).await;
    stack.wait_until_applied().await;
    let in_order = "SELECT count(*) FROM lead_state.lead_updates WHERE version = 2 + log_index - (log_index > 1)::int";
    assert_eq!(stack.count(in_order).await, 4);
    let report = stack.wait_for_clean_audit().await;
    assert_includes(&report["updates"], json!({"accepted": 4, "succeeded": 4, "duplicates": 0, "deadLetters": 1}));
    assert_eq!(report["callbacks"][0]["delivered"], 4, "{report}");
}

#[tokio::test]
async fn updates_that_wait_for_the_log_share_a_message_by_turns() {
    const MANY: usize = 60;
    const FEW: usize = 3;
    let stack = Stack::start().await;
    let ours = stack.lead(&["crm"]).await;
    let Tenant { api: other, lead_id: theirs, .. } = Tenant::new(&stack, "other", json!([])).await;
    // Waits for an acknowledgement of the log, so that the gateway is connected to it.
    stack.api.update_and_wait(json!({"leadId": ours, "name": "first"})).await;

    stack.nats.signal(Signal::Stop).expect("a signal");
    let post = |api: &Api, lead: &str, n: usize| {
        let (api, body) = (api.clone(), json!({"leadId": lead, "metadata": {"n": n}}));
        tokio::spawn(async move { api.update(body).await })
    };
    let mut updates: Vec<_> = (0..MANY).map(|n| post(&stack.api, &ours, n)).collect();
    wait_for_requests(&stack, MANY).await;
    updates.extend((0..FEW).map(|n| post(&other, &theirs, n)));
    wait_for_requests(&stack, MANY + FEW).await;
    stack.nats.signal(Signal::Cont).expect("a signal");
    let ids: Vec<String> = join_all(updates).await.into_iter().map(|id| id.expect("an update")).collect();

    let entries = stack.log_entries().await;
    assert_eq!(entries.len(), 1 + MANY + FEW);
    assert!(entries.last().expect("entries").sequence <= 4, "few messages");
    let pack = entries.iter().filter(|entry| entry.sequence == 3);
    let first: Vec<_> =
        pack.take(2 * FEW).filter(|entry| entry.subject.contains(&other.project_id.to_string())).collect();
    assert_eq!(first.len(), FEW, "the projects take turns");
    for id in &ids[..MANY] {
        assert_eq!(stack.api.outcome(id).await["status"], "succeeded");
    }
    assert_eq!(stack.count("SELECT max(version) FROM lead_state.leads").await, 2 + MANY as i64);
    let report = stack.wait_for_clean_audit().await;
    assert_includes(
        &report["updates"],
        json!({"accepted": 1 + MANY + FEW, "succeeded": 1 + MANY + FEW, "duplicates": 0}),
    );
}

/// Waits until this many requests are in progress.
async fn wait_for_requests(stack: &Stack, count: usize) {
    let metrics = stack.gateway_ready.replace("/readyz", "/metrics");
    let expected = format!("leadrelay_gateway_requests_in_flight {count}\n");
    eventually(TEST_TIMEOUT, "the requests wait", async || {
        let text = reqwest::get(&metrics).await.expect("metrics").text().await.expect("metrics");
        if text.contains(&expected) { Ok(()) } else { Err(text) }
    })
    .await;
}

//! `leadctl audit`: each invariant is violated by hand and reported; live load causes no false alarm.

use std::collections::{BTreeMap, BTreeSet};

use async_nats::HeaderMap;
use contract::{
    ObjectId, headers,
    streams::{LEAD_DEAD_LETTERS, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use serde_json::{Value, json};

use crate::support::{Stack, assert_includes, process_id, update_each};

/// The violated invariants, each with the ids that violate it.
type Violations = BTreeMap<String, BTreeSet<String>>;

/// Invariants, each with the ids that violate it.
type Breached = Vec<(&'static str, Vec<String>)>;

fn violations(report: &Value) -> Violations {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let invariants = report["invariants"].as_array().expect("invariants").iter();
    let violated = invariants.filter(|invariant| invariant["count"] != 0);
    violated
        .map(|invariant| {
            let violations = invariant["violations"].as_array().expect("violations");
            assert_eq!(invariant["count"], violations.len(), "{invariant}");
            (text(&invariant["invariant"]), violations.iter().map(|violation| text(&violation["id"])).collect())
        })
        .collect()
}

/// The number of rows that were not checked, by invariant.
fn unchecked(report: &Value) -> BTreeMap<&str, i64> {
    let unchecked = report["unchecked"].as_array().expect("unchecked").iter();
    unchecked.map(|of| (of["invariant"].as_str().expect("text"), of["count"].as_i64().expect("a number"))).collect()
}

async fn assert_violations(stack: &Stack, what: &str, expected: &[(&str, &[&str])]) {
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
    let expected: Violations = expected.iter().map(|(invariant, of)| ((*invariant).to_owned(), ids(of))).collect();
    let (code, report) = stack.audit(&[]).await;
    assert_eq!((code, violations(&report)), (i32::from(!expected.is_empty()), expected), "{what}: {report}");
}

/// A system at rest with a log of nine entries, and the ids of its objects.
struct Audited {
    stack: Stack,
    lead: String,
    /// Updates at the entries 1, 2 (which failed), 4 and 9. Entry 3 ends a call, and entry 8 cannot be parsed.
    first: String,
    failed: String,
    second: String,
    last: String,
    /// Callbacks for all events, and for failures.
    crm: ObjectId,
    failures: ObjectId,
    /// The ids under which miscounts are reported: `project/process` and `project/crm`.
    process_counts: String,
    crm_counts: String,
}

impl Audited {
    async fn start() -> Self {
        let stack = Stack::start().await;
        let callbacks = json!([
            {"name": "crm", "url": stack.receiver.url("/crm")},
            {"name": "failures", "url": stack.receiver.url("/failures"), "events": ["update.failed"]},
        ]);
        let applied = stack.process(callbacks).await;
        let [crm, failures] = [0, 1].map(|place: usize| applied.process.callbacks[place].callback_id);
        stack.backdate_processes().await;
        let lead = stack.api.initiate(process_id(&applied), None).await;

        let first = stack.api.update(json!({"leadId": lead, "metadata": {"n": 1}})).await;
        let failed = stack.api.update(json!({"leadId": lead, "targetState": "nowhere"})).await;
        stack.publish_call("ended", &json!({"leadId": lead})).await;
        let second = stack.api.update(json!({"leadId": lead, "targetState": "interested"})).await;
        // An update without an id; one sent twice; and a command that cannot be parsed.
        stack.publish_update(&json!({"leadId": lead, "name": "anonymous"})).await;
        for _ in 0..2 {
            let repeated = json!({"updateId": ObjectId::from_bytes([0x6b; 12]), "leadId": lead, "name": "again"});
            stack.publish_update(&repeated).await;
        }
        stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "no JSON").await;
        let last = stack.api.update(json!({"leadId": lead, "metadata": {"n": 9}})).await;
        stack.api.outcome(&last).await;
        let process_counts = format!("{}/{}", stack.api.project_id, process_id(&applied));
        let crm_counts = format!("{}/{crm}", stack.api.project_id);
        Self { stack, lead, first, failed, second, last, crm, failures, process_counts, crm_counts }
    }

    /// Each breach of an invariant: its name, the SQL that causes it, and the violations that must be reported.
    fn breaches(&self, unknown: &str) -> Vec<(&'static str, String, Breached)> {
        let Self { lead, first, failed, second, last, crm, failures, process_counts, crm_counts, .. } = self;
        let of = |update: &str, callback: &ObjectId| format!("{update}/{callback}");
        let own = |id: &String| vec![id.clone()];
        let miscounted_updates = ("updates_miscounted", own(process_counts));
        let miscounted_deliveries = ("deliveries_miscounted", own(crm_counts));
        let without_attempts = vec![("attempts", vec![of(first, crm), of(second, crm)])];
        vec![
            (
                "a ledger row is missing",
                format!("DELETE FROM lead_state.lead_updates WHERE update_id = '\\x{failed}'"),
                vec![
                    ("unaccounted", own(failed)),
                    ("unfounded", vec![of(failed, crm), of(failed, failures)]),
                    miscounted_updates.clone(),
                ],
            ),
            (
                "a ledger row is invented",
                format!(
                    "INSERT INTO lead_state.lead_updates SELECT l.* FROM ledger g, json_populate_record(
                         NULL::lead_state.lead_updates,
                         (to_jsonb(g) || jsonb_build_object('update_id', '\\x{unknown}', 'log_sequence', 8))::json) l
                     WHERE g.update_id = '\\x{failed}'"
                ),
                vec![
                    ("unlogged", vec![unknown.to_owned()]),
                    ("unannounced", vec![unknown.to_owned()]),
                    ("undelivered", vec![of(unknown, crm), of(unknown, failures)]),
                    miscounted_updates.clone(),
                ],
            ),
            (
                "a ledger row has the position of another",
                format!("UPDATE lead_state.lead_updates SET log_sequence = 4 WHERE update_id = '\\x{failed}'"),
                vec![("unlogged", vec![failed.clone(), second.clone()])],
            ),
            (
                "an update is in the ledger and queued",
                format!(
                    "INSERT INTO lead_state.queued_updates
                         (project_id, update_id, lead_id, log_epoch, log_sequence, log_index, logged_at, command)
                     SELECT project_id, update_id, lead_id, log_epoch, log_sequence, log_index, logged_at, command
                     FROM lead_state.lead_updates WHERE update_id = '\\x{first}'"
                ),
                vec![("queue_inconsistent", own(first))],
            ),
            (
                "a version is wrong",
                format!("UPDATE lead_state.lead_updates SET version = 7 WHERE update_id = '\\x{first}'"),
                vec![("out_of_order", vec![first.clone(), second.clone()])],
            ),
            (
                "a state is wrong",
                format!("UPDATE lead_state.lead_updates SET from_state = 'lost' WHERE update_id = '\\x{second}'"),
                vec![("out_of_order", own(second))],
            ),
            (
                "a lead changed without an update",
                "UPDATE lead_state.leads SET version = version + 1".into(),
                vec![("lead_differs", own(lead))],
            ),
            (
                "the checkpoint is behind the ledger",
                "UPDATE lead_state.checkpoints SET last_sequence = last_sequence - 1, announced_sequence = announced_sequence - 1".into(),
                vec![("beyond_checkpoint", own(last))],
            ),
            (
                "the log is another one",
                "UPDATE lead_state.checkpoints SET stream_created_at = stream_created_at || '0'".into(),
                vec![("beyond_checkpoint", vec!["LEAD_COMMANDS".into()])],
            ),
            (
                "a delivery is missing",
                format!("DELETE FROM webhooks.deliveries WHERE update_id = '\\x{first}'"),
                vec![("undelivered", vec![of(first, crm)]), miscounted_deliveries.clone()],
            ),
            (
                "a delivery is invented",
                format!(
                    "INSERT INTO webhooks.deliveries SELECT d.* FROM deliveries g, jsonb_populate_record(
                         NULL::webhooks.deliveries, to_jsonb(g) || jsonb_build_object('update_id', '\\x{unknown}')) d
                     WHERE g.update_id = '\\x{first}'"
                ),
                vec![("unfounded", vec![of(unknown, crm)]), miscounted_deliveries.clone()],
            ),
            (
                "attempts are missing",
                format!(
                    "UPDATE webhooks.deliveries SET first_started_at = NULL WHERE update_id = '\\x{first}';
                     DELETE FROM webhooks.attempts WHERE update_id = '\\x{second}'"
                ),
                [without_attempts.clone(), vec![miscounted_deliveries.clone()]].concat(),
            ),
            (
                "a delivered delivery has only failed attempts",
                format!(
                    "UPDATE webhooks.deliveries SET first_status_code = 500 WHERE update_id = '\\x{first}';
                     UPDATE webhooks.attempts SET status_code = 500 WHERE update_id = '\\x{second}'"
                ),
                without_attempts,
            ),
            (
                "an attempt is recorded in both places",
                format!(
                    "INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt WHERE update_id = '\\x{first}'"
                ),
                vec![("attempts", vec![of(first, crm)]), miscounted_deliveries.clone()],
            ),
            (
                "an attempt has no delivery",
                format!("UPDATE webhooks.attempts SET update_id = '\\x{unknown}' WHERE update_id = '\\x{second}'"),
                vec![("attempts", vec![of(second, crm), of(unknown, crm)]), miscounted_deliveries.clone()],
            ),
            (
                "updates are counted twice",
                "UPDATE lead_state.update_counts SET updates = 2 * updates WHERE code <> ''".into(),
                vec![miscounted_updates],
            ),
            (
                "deliveries are not counted",
                format!("DELETE FROM webhooks.delivery_counts WHERE callback_id = '\\x{crm}'"),
                vec![miscounted_deliveries],
            ),
        ]
    }
}

#[tokio::test]
async fn the_report_counts_updates_and_deliveries() {
    let audited = Audited::start().await;

    let report = audited.stack.wait_for_clean_audit().await;

    let expected = json!({"accepted": 7, "succeeded": 6, "failed": 1, "pending": 0, "queued": 0, "duplicates": 1, "deadLetters": 1});
    assert_eq!((&report["updates"], &report["unchecked"]), (&expected, &json!([])), "{report}");
    for (name, count) in [("crm", 6), ("failures", 1)] {
        let callbacks = report["callbacks"].as_array().expect("callbacks");
        let callback = callbacks.iter().find(|callback| callback["name"] == name).expect(name);
        assert_includes(callback, json!({"announced": count, "delivered": count}));
    }
}

#[tokio::test]
async fn each_violated_invariant_is_reported_with_the_violating_ids() {
    let mut audited = Audited::start().await;
    audited.stack.wait_for_clean_audit().await;
    // A leader that starts a term during the test would repair some of the breaches.
    audited.stack.lead_state.terminate().await;
    let (stack, second) = (&audited.stack, &audited.second);
    // A first attempt may also be recorded in a separate row.
    let own_row = format!(
        "INSERT INTO webhooks.attempts SELECT * FROM webhooks.every_attempt WHERE update_id = '\\x{second}';
         UPDATE webhooks.deliveries SET first_started_at = NULL, first_duration_ms = NULL, first_status_code = NULL
         WHERE update_id = '\\x{second}'"
    );
    stack.sql(&own_row).await;
    assert_violations(stack, "an attempt in a row of its own", &[]).await;
    stack
        .sql(
            "CREATE TABLE ledger AS TABLE lead_state.lead_updates; CREATE TABLE deliveries AS TABLE webhooks.deliveries;
             CREATE TABLE attempts AS TABLE webhooks.attempts; CREATE TABLE leads AS TABLE lead_state.leads;
             CREATE TABLE checkpoints AS TABLE lead_state.checkpoints;
             CREATE TABLE update_counts AS TABLE lead_state.update_counts;
             CREATE TABLE delivery_counts AS TABLE webhooks.delivery_counts",
        )
        .await;
    let restore = "
        DELETE FROM lead_state.queued_updates;
        DELETE FROM lead_state.lead_updates; INSERT INTO lead_state.lead_updates SELECT * FROM ledger;
        DELETE FROM webhooks.deliveries; INSERT INTO webhooks.deliveries SELECT * FROM deliveries;
        DELETE FROM webhooks.attempts; INSERT INTO webhooks.attempts SELECT * FROM attempts;
        DELETE FROM lead_state.update_counts; INSERT INTO lead_state.update_counts SELECT * FROM update_counts;
        DELETE FROM webhooks.delivery_counts; INSERT INTO webhooks.delivery_counts SELECT * FROM delivery_counts;
        UPDATE lead_state.leads l SET version = b.version FROM leads b WHERE b.lead_id = l.lead_id;
        UPDATE lead_state.checkpoints c SET stream_created_at = b.stream_created_at, last_sequence = b.last_sequence,
            announced_sequence = b.announced_sequence FROM checkpoints b";

    let unknown = ObjectId::new(service_kit::clock::now(), [7; 8]).to_string();
    for (what, breach, expected) in audited.breaches(&unknown) {
        stack.sql(&breach).await;
        let expected: Vec<_> =
            expected.iter().map(|(law, ids)| (*law, ids.iter().map(String::as_str).collect::<Vec<_>>())).collect();
        let expected: Vec<_> = expected.iter().map(|(law, ids)| (*law, ids.as_slice())).collect();
        assert_violations(stack, what, &expected).await;
        stack.sql(restore).await;
    }
    assert_violations(stack, "everything is restored", &[]).await;
}

#[tokio::test]
async fn a_missing_event_is_reported_by_whether_it_counts_as_announced() {
    let mut audited = Audited::start().await;
    audited.stack.wait_for_clean_audit().await;
    audited.stack.lead_state.terminate().await;
    let Audited { stack, last, crm, .. } = &audited;
    let events = stack.js().get_stream(LEAD_EVENTS).await.expect("events");
    let consumer = events.consumer_info(NOTIFIER_CONSUMER).await.expect("a consumer");
    assert_eq!(consumer.ack_floor.stream_sequence, 7);

    assert!(events.delete_message(7).await.expect("deleted"));
    assert_violations(stack, "a row counts as announced", &[("unannounced", &[last])]).await;

    stack.sql("UPDATE lead_state.checkpoints SET announced_sequence = announced_sequence - 1").await;
    assert_violations(stack, "a row does not count as announced", &[("unfounded", &[&format!("{last}/{crm}")])]).await;
}

#[tokio::test]
async fn an_event_that_became_a_dead_letter_is_undelivered() {
    let audited = Audited::start().await;
    audited.stack.wait_for_clean_audit().await;
    let Audited { stack, first, crm, .. } = &audited;
    let mut origin = HeaderMap::new();
    origin.insert(headers::ORIGIN_SUBJECT, format!("leads.evt.{}._.update.succeeded", stack.api.project_id));
    origin.insert(headers::ORIGIN_SEQUENCE, "1");

    let letter = stack.js().publish_with_headers("leads.dead.invalid_event", origin, "".into()).await;
    letter.expect("published").await.expect("stored");
    stack.sql(&format!("DELETE FROM webhooks.deliveries WHERE update_id = '\\x{first}'")).await;

    let (_, report) = stack.audit(&[]).await;
    assert_eq!(violations(&report).get("undelivered"), Some(&BTreeSet::from([format!("{first}/{crm}")])), "{report}");
}

#[tokio::test]
async fn an_entry_may_lack_a_ledger_row_only_if_a_dead_letter_was_removed_since() {
    let mut audited = Audited::start().await;
    audited.stack.wait_for_clean_audit().await;
    let later = audited.stack.api.update(json!({"leadId": audited.lead, "metadata": {"n": 10}})).await;
    audited.stack.wait_for_clean_audit().await;
    audited.stack.lead_state.terminate().await;
    let Audited { stack, failed, .. } = &audited;

    let letters = stack.js().get_stream(LEAD_DEAD_LETTERS).await.expect("dead letters");
    assert!(letters.delete_message(1).await.expect("deleted"));
    stack.sql(&format!("DELETE FROM lead_state.lead_updates WHERE update_id IN ('\\x{failed}', '\\x{later}')")).await;

    let (_, report) = stack.audit(&[]).await;
    assert_eq!(violations(&report).get("unaccounted"), Some(&BTreeSet::from([later])), "{report}");
    assert_eq!(unchecked(&report).get("unaccounted"), Some(&2), "the removed letter, and the failed update: {report}");
}

#[tokio::test]
async fn leads_are_compared_with_their_updates_unless_a_month_may_have_been_dropped() {
    let mut audited = Audited::start().await;
    audited.stack.wait_for_clean_audit().await;
    audited.stack.lead_state.terminate().await;
    let Audited { stack, first, .. } = &audited;
    // The first update of one lead and all updates of another one are missing. The months are complete from July 2025
    // on, so that rows logged before September may be missing.
    let other = "ab".repeat(12);
    let missing = format!(
        "SELECT lead_state.ensure_partitions('2025-01-01', now()::date);
         DROP TABLE lead_state.lead_updates_2025_06;
         UPDATE lead_state.leads SET version = version + 1;
         UPDATE lead_state.lead_updates SET version = version + 1 WHERE success;
         INSERT INTO lead_state.leads
         SELECT n.* FROM lead_state.leads l, json_populate_record(l, json_build_object('lead_id', '\\x{other}')) n"
    );
    stack.sql(&missing).await;

    stack.sql("UPDATE lead_state.leads SET created_at = '2025-08-15Z'").await;
    let (code, report) = stack.audit(&[]).await;
    let counts = BTreeMap::from([("lead_differs", 1), ("out_of_order", 1)]);
    assert_eq!((code, unchecked(&report)), (0, counts), "{report}");

    stack.sql("UPDATE lead_state.leads SET created_at = '2025-09-15Z'").await;
    let violated: [(&str, &[&str]); 2] = [("lead_differs", &[&other]), ("out_of_order", &[first])];
    assert_violations(stack, "all rows are kept", &violated).await;
}

#[tokio::test]
async fn a_range_of_time_or_a_project_is_audited_alone() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    for number in 0..4 {
        stack.api.update_and_wait(json!({"leadId": lead, "metadata": {"n": number}})).await;
    }
    stack.wait_for_clean_audit().await;
    let logged: Vec<String> = sqlx::query_scalar(
        r#"SELECT to_char(logged_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
           FROM lead_state.lead_updates ORDER BY log_sequence"#,
    )
    .fetch_all(&stack.pool)
    .await
    .expect("the ledger");
    let (from, to) = (logged[1].as_str(), logged[3].as_str());
    let project = stack.api.project_id.to_string();

    for (args, accepted) in [
        (vec!["--from", from, "--to", to], 2),
        (vec!["--from", to], 1),
        (vec!["--since", "1h", "--project", project.as_str()], 4),
        (vec!["--project", "ffffffffffffffffffffffff"], 0),
    ] {
        let (code, report) = stack.audit(&args).await;
        assert_eq!((code, &report["updates"]["accepted"]), (0, &json!(accepted)), "{args:?} {report}");
    }
    stack.sql("UPDATE lead_state.lead_updates SET from_state = 'lost' WHERE log_sequence = 4").await;
    assert_eq!(stack.audit(&["--to", from]).await.0, 0, "the breach is outside of the range");
    assert_eq!(stack.audit(&["--from", to]).await.0, 1);
}

#[tokio::test]
async fn live_load_and_crashes_cause_no_false_alarm() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms,100ms,100ms")]).await;
    stack.receiver.on("/flaky", [500, 200, 200]);
    let leads = stack.leads(&["crm", "flaky"], 6).await;
    let failing = json!({"leadId": leads[0], "targetState": "nowhere"});
    let load = tokio::spawn(update_each(stack.api.clone(), leads, 150));

    let mut audits = 0;
    while !load.is_finished() || audits < 4 {
        let (code, report) = stack.audit(&[]).await;
        assert_eq!(code, 0, "{report}");
        audits += 1;
        stack.api.update_until_accepted(&failing).await;
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
    let report = stack.wait_for_clean_audit().await;
    assert!(report["updates"]["succeeded"].as_i64().expect("a number") >= 6 * 150, "{report}");
    assert!(report["updates"]["failed"].as_i64().expect("a number") >= 4, "{report}");
}

#[tokio::test]
async fn an_audit_without_postgres_or_nats_is_an_error() {
    let stack = Stack::start().await;
    for (variable, url) in [("DATABASE_URL", "postgres://user@127.0.0.1:1/none"), ("NATS_URL", "nats://127.0.0.1:1")] {
        let mut command = stack.leadctl_command(&["audit"]);
        command.env(variable, url);
        let run = crate::support::LeadctlRun::of(command).await.assert_code(2);
        assert!(run.stdout.is_empty() && run.stderr.contains("the audit could not run"), "{run:?}");
    }
}

//! `leadctl dead-letters`: dead letters are listed, shown safely on a terminal, and replayed once.

use std::path::PathBuf;

use contract::{
    ObjectId, headers,
    replay::Replay,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS},
    subject,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{LeadctlRun, Stack, TEST_TIMEOUT, assert_includes, letter_number};

/// The exit code of leadctl for an object that does not exist.
const NOT_FOUND: i32 = 3;

impl Stack {
    /// Runs `leadctl dead-letters`.
    async fn dead_letters_run(&self, args: &[&str]) -> LeadctlRun {
        self.leadctl(&[&["dead-letters"], args].concat()).await
    }

    /// The number of commands that the log holds.
    async fn logged(&self) -> u64 {
        self.stream_state(LEAD_COMMANDS).await.messages
    }
}

/// Writes a file with this body, and returns its path.
fn file(dir: &TempDir, body: &[u8]) -> String {
    let path: PathBuf = dir.path().join(ObjectId::from_bytes(rand::random()).to_string());
    std::fs::write(&path, body).expect("a file");
    path.to_str().expect("a path").to_owned()
}

/// A stack with a lead.
async fn started() -> (Stack, String) {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    (stack, lead)
}

/// Another project than the stack's.
fn other_project() -> ObjectId {
    ObjectId::from_bytes([0xcd; 12])
}

/// A stack with four dead letters, and their numbers, the newest first. One letter has control characters, one is not
/// UTF-8, one has an unknown subject, and one has 10 001 bytes.
async fn with_four_letters() -> (Stack, Vec<Value>) {
    let stack = Stack::start().await;
    let (project, other) = (stack.api.project_id, other_project());
    stack.leadctl(&["dead-letters", "list"]).await.assert_ok().assert_prints(&["no dead letters\n"]);
    stack.publish(format!("leads.cmd.{project}.update"), "\u{1b}[2Jfirst\u{9b}31m\u{202e}\r\n").await;
    stack.publish(format!("leads.cmd.{other}.update"), b"\xff\x00".to_vec()).await;
    stack.publish(format!("leads.cmd.{project}.explode"), "{}").await;
    stack.publish(format!("leads.cmd.{project}.update"), format!("{{{}", "x".repeat(10_000))).await;
    let letters = stack.wait_for_letters(4).await;
    (stack, letters)
}

#[tokio::test]
async fn letters_are_listed_by_each_filter_and_counted_by_reason() {
    let (stack, letters) = with_four_letters().await;
    let reasons: Vec<_> = letters.iter().map(|letter| letter["reason"].as_str().expect("a reason")).collect();
    assert_eq!(reasons, ["invalid_json", "invalid_subject", "invalid_json", "invalid_json"]);
    let all: Vec<_> = letters.iter().map(letter_number).collect();

    for (filter, expected) in [
        (vec!["--reason", "invalid_subject"], &all[1..2]),
        (vec!["--project", &other_project().to_string()], &all[2..3]),
        (vec!["--since", "1h"], &all[..]),
        (vec!["--since", "0s"], &[]),
    ] {
        let found = stack.dead_letters_json(&[vec!["list"], filter].concat()).await;
        let numbers: Vec<_> = found["letters"].as_array().expect("letters").iter().map(letter_number).collect();
        assert_eq!(numbers, expected);
    }
    // The counts include all letters that match the filter, even beyond the limit.
    let found = stack.dead_letters_json(&["list", "--limit", "1"]).await;
    assert_eq!(found["counts"], json!({"invalid_json": 3, "invalid_subject": 1}));
    assert_eq!(found["letters"].as_array().map(Vec::len), Some(1));
    let printed = stack.dead_letters_run(&["list"]).await.text();
    assert!(printed.starts_with("         3 invalid_json\n         1 invalid_subject\n"), "{printed}");
    assert!(printed.contains(&format!("leads.cmd.{}.explode: ", stack.api.project_id)), "{printed}");
    stack.dead_letters_run(&["list", "--reason", "replayed"]).await.assert_fails("invalid_subject");
}

#[tokio::test]
async fn a_letter_is_shown_on_a_terminal_without_control_characters() {
    let (stack, letters) = with_four_letters().await;
    let [long, _, not_text, control] = [0, 1, 2, 3].map(|place: usize| letter_number(&letters[place]));

    let shown = stack.dead_letters_run(&["show", &control]).await.assert_ok().text();
    let shown_long = stack.dead_letters_run(&["show", &long]).await.text();

    assert!(!shown.chars().any(|c| c.is_control() && c != '\n') && !shown.contains('\u{202e}'), "{shown:?}");
    assert!(shown.contains("\\u{1b}[2Jfirst\\u{9b}31m\\u{202e}\\u{d}\n"), "{shown}");
    for header in [headers::DEAD_LETTER_ERROR, headers::ORIGIN_TIME, headers::POSITION] {
        assert!(shown.contains(&format!("  {header}: ")), "{shown}");
    }
    let origin = format!("  {}: leads.cmd.{}.update\n", headers::ORIGIN_SUBJECT, stack.api.project_id);
    assert!(shown.contains(&origin), "{shown}");
    assert!(shown_long.contains("the first 4096 of 10001 bytes") && shown_long.len() < 6000, "{shown_long}");
    // With --json the letter is shown completely.
    let body = format!("{{{}", "x".repeat(10_000));
    assert_eq!(stack.dead_letters_json(&["show", &long]).await["body"], json!(body));
    let shown = stack.dead_letters_json(&["show", &not_text]).await;
    assert_includes(&shown, json!({"bodyBase64": "/wA=", "body": null, "bytes": 2}));
    for command in ["show", "replay"] {
        let missing = stack.dead_letters_run(&[command, "999"]).await;
        missing.assert_code(NOT_FOUND).assert_fails("there is no dead letter 999");
    }
}

/// A stack with a lead and two dead letters, and their numbers. One letter is a valid update on a wrong subject, the
/// other has a truncated body.
async fn with_misled_and_broken_letter() -> (Stack, String, String, String) {
    let (stack, lead) = started().await;
    let update = json!({"leadId": lead, "metadata": {"n": 1}}).to_string();
    stack.publish("leads.cmd.typo.update".into(), update).await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{\"leadId\":").await;
    let letters = stack.wait_for_letters(2).await;
    let (broken, misled) = (letter_number(&letters[0]), letter_number(&letters[1]));
    (stack, lead, misled, broken)
}

#[tokio::test]
async fn a_replay_that_would_fail_again_is_not_sent() {
    let (stack, _, misled, broken) = with_misled_and_broken_letter().await;
    let dir = tempfile::tempdir().expect("a directory");
    let nonsense = file(&dir, b"nonsense");
    let logged = stack.logged().await;

    for (args, why) in [
        (vec![misled.as_str()], "--project"),
        (vec![broken.as_str()], "would become a dead letter again"),
        (vec![broken.as_str(), "--body", &nonsense], "would become a dead letter again"),
        (vec![broken.as_str(), "--body", "/nowhere"], "cannot read /nowhere"),
        (vec!["--all", "--reason", "invalid_json"], "0 replayed, 1 skipped"),
        (vec!["--all"], "--reason"),
    ] {
        stack.dead_letters_run(&[vec!["replay"], args].concat()).await.assert_fails(why);
    }

    assert_eq!(stack.logged().await, logged);
}

#[tokio::test]
async fn a_letter_is_replayed_corrected_or_to_another_project_and_twice_only_with_again() {
    let (stack, lead, misled, broken) = with_misled_and_broken_letter().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (project, logged) = (stack.api.project_id.to_string(), stack.logged().await);

    let sent = stack.dead_letters_json(&["replay", &misled, "--project", &project]).await;
    assert_eq!(sent["replayed"][0]["sequence"], logged + 1);
    let mended = file(&dir, json!({"leadId": lead, "metadata": {"n": 2}}).to_string().as_bytes());
    stack.dead_letters_json(&["replay", &broken, "--body", &mended]).await;

    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let numbers: Vec<_> = requests.iter().map(|request| request.json()["data"]["n"].clone()).collect();
    assert_eq!(numbers, [1, 2]);
    let letters = stack.wait_for_letters(2).await;
    assert_includes(&letters[1]["replay"], json!({"state": "sent", "sequence": logged + 1}));
    let again = stack.dead_letters_run(&["replay", &misled, "--project", &project]).await;
    again.assert_fails("already replayed").assert_prints(&["--again"]);
    let all = stack.dead_letters_run(&["replay", "--all", "--reason", "invalid_json"]).await;
    all.assert_ok().assert_prints(&["no dead letters to replay\n"]);
    assert_eq!(stack.logged().await, logged + 2);
    stack.dead_letters_json(&["replay", &misled, "--project", &project, "--again"]).await;
    stack.receiver.wait_for_requests("/crm", 3, TEST_TIMEOUT).await;
    // The record of a replay is in the same stream, but it is not a letter.
    let notes = stack.stream_state(LEAD_DEAD_LETTERS).await.messages;
    stack.dead_letters_run(&["show", &notes.to_string()]).await.assert_fails("there is no dead letter");
    let report = stack.wait_for_clean_audit().await;
    assert_includes(&report["updates"], json!({"succeeded": 3, "deadLetters": 2}));
}

#[tokio::test]
async fn a_failed_replay_is_a_new_letter_that_names_the_first() {
    let (stack, lead) = started().await;
    // The dead letters are an update that the database rejects, and the expiry of a call with an unknown lead.
    stack.sql("ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison')").await;
    let refused = stack.api.update(json!({"leadId": lead, "name": "Ada L.", "userId": "poison"})).await;
    stack.publish_call("expired", &json!({"leadId": "ffffffffffffffffffffffff"})).await;
    // Within one batch, an update that the database rejects becomes a dead letter last.
    let letters = stack.wait_for_letters(2).await;
    let of = |reason: &str| letters.iter().find(|letter| letter["reason"] == reason).expect("a letter");
    let (unknown, unapplicable) = (of("unknown_lead"), of("unapplicable"));

    // The expiry can be parsed, so it is sent, and becomes a dead letter again.
    let replayed = stack.dead_letters_json(&["replay", "--all", "--reason", "unknown_lead"]).await;

    assert_eq!((&replayed["replayed"][0]["number"], &replayed["skipped"]), (&unknown["number"], &json!([])));
    let again = stack.wait_for_letters(3).await.remove(0);
    assert_eq!((&again["replayOf"], &again["replay"]), (&unknown["number"], &Value::Null));
    let listed = stack.dead_letters_run(&["list"]).await.text();
    assert!(listed.contains(&format!("(replay of dead letter {})", letter_number(unknown))), "{listed}");
    assert_eq!(listed.matches("(replayed as entry ").count(), 1, "{listed}");
    // An update that the database now accepts succeeds under its own id.
    stack.sql("ALTER TABLE lead_state.lead_updates DROP CONSTRAINT odd").await;
    stack.dead_letters_json(&["replay", &letter_number(unapplicable)]).await;
    assert_eq!(stack.api.outcome(&refused).await["status"], "succeeded");
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_truncated_letter_is_replayed_only_with_a_body() {
    let (stack, lead) = started().await;
    let dir = tempfile::tempdir().expect("a directory");
    // A message of the maximum size of NATS leaves no room for the headers of a dead letter.
    let max_payload = stack.client.server_info().max_payload;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{".repeat(max_payload)).await;
    let letters = stack.wait_for_letters(1).await;
    assert_eq!(letters[0]["truncatedFrom"], max_payload);
    let cut = letter_number(&letters[0]);
    stack.dead_letters_run(&["list"]).await.assert_prints(&[&format!("(truncated from {max_payload} bytes)")]);

    stack.dead_letters_run(&["replay", &cut]).await.assert_fails("truncated").assert_prints(&["--body"]);
    stack.dead_letters_run(&["replay", "--all", "--reason", "invalid_json"]).await.assert_fails("truncated");
    // A body that leaves no room for the headers of a replay is rejected, and the letter can still be replayed.
    let large = file(&dir, format!("{{\"name\":\"{}\"}}", "x".repeat(max_payload - 22)).as_bytes());
    let refused = stack.dead_letters_run(&["replay", &cut, "--body", &large]).await;
    refused.assert_fails("was not replayed").assert_prints(&["max_payload"]);
    let mended = file(&dir, json!({"leadId": lead, "name": "n"}).to_string().as_bytes());
    stack.dead_letters_json(&["replay", &cut, "--body", &mended]).await;

    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
}

#[tokio::test]
async fn concurrent_replays_send_once_and_an_interrupted_one_waits_for_a_decision() {
    let (stack, _) = started().await;
    for id in ["c1", "c2"] {
        stack.publish_call("expired", &json!({"leadId": "f".repeat(24), "callId": id})).await;
    }
    let letters = stack.wait_for_letters(2).await;
    let (doubtful, raced) = (letter_number(&letters[0]), letter_number(&letters[1]));
    // The state after leadctl died between the record `begun` and the command.
    let mut note = async_nats::HeaderMap::new();
    note.insert(headers::REPLAY, Replay::Begun.to_string());
    let js = stack.js();
    let note = js.publish_with_headers(subject::replayed(doubtful.parse().expect("a number")), note, "".into());
    note.await.expect("a publish").await.expect("an ack");
    let logged = stack.logged().await;

    let replay = ["replay", raced.as_str()];
    let runs = futures::future::join_all((0..8).map(|_| stack.dead_letters_run(&replay))).await;

    assert_eq!(runs.iter().filter(|run| run.code == 0).count(), 1, "{runs:?}");
    assert_eq!(stack.logged().await, logged + 1);
    let interrupted = stack.dead_letters_run(&["replay", &doubtful]).await;
    interrupted.assert_fails("its result is unknown");
    stack.dead_letters_run(&["list"]).await.assert_prints(&["(maybe replayed)"]);
    // The concurrently replayed letter is a dead letter again, and is sent. The interrupted one is not sent.
    stack.wait_for_letters(3).await;
    let all = stack.dead_letters_run(&["replay", "--all", "--reason", "unknown_lead"]).await;
    all.assert_fails("1 replayed, 1 skipped");
    stack.dead_letters_json(&["replay", &doubtful, "--again"]).await;
    assert_eq!(stack.logged().await, logged + 3);
}

//! `leadctl dead-letters`: what could not be applied is listed, shown without harm, and sent again once.

use std::path::PathBuf;

use contract::{
    ObjectId, headers,
    replay::Replay,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS},
    subject,
};
use serde_json::{Value, json};
use test_support::{binary, eventually};

use crate::{
    audit::settled,
    stack::{SOON, Stack},
};

/// Runs `leadctl dead-letters`: whether it went well, and what it said.
pub(crate) async fn dead_letters(url: &str, args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    let output = command.arg("dead-letters").args(args).env("NATS_URL", url).output().await.expect("leadctl");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("UTF-8"))
}

/// Runs it for programs; it must go well.
pub(crate) async fn read(url: &str, args: &[&str]) -> Value {
    let (well, said) = dead_letters(url, &[args, &["--json"]].concat()).await;
    assert!(well, "{args:?}: {said}");
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// Waits until there are so many dead letters; the newest first.
pub(crate) async fn wait_for_letters(url: &str, count: usize) -> Vec<Value> {
    eventually(SOON, "the dead letters", async || {
        let letters = read(url, &["list", "--limit", "1000"]).await["letters"].as_array().expect("letters").clone();
        if letters.len() == count { Ok(letters) } else { Err(format!("{letters:?}")) }
    })
    .await
}

pub(crate) fn number(letter: &Value) -> String {
    letter["number"].to_string()
}

/// A file of its own, removed with the directory.
fn file(dir: &tempfile::TempDir, body: &[u8]) -> PathBuf {
    let path = dir.path().join(ObjectId::from_bytes(rand::random()).to_string());
    std::fs::write(&path, body).expect("a file");
    path
}

/// A stack with a lead.
async fn started() -> (Stack, String, String) {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let url = stack.nats.url();
    (stack, lead, url)
}

/// How many messages a stream holds.
async fn held(stack: &Stack, stream: &str) -> u64 {
    let js = service_kit::nats::jetstream(&stack.client);
    js.get_stream(stream).await.expect("a stream").cached_info().state.messages
}

#[tokio::test]
async fn they_are_counted_listed_and_shown_without_harm() {
    let (stack, _, url) = started().await;
    let project = stack.api.project_id;
    let other = ObjectId::from_bytes([0xcd; 12]);
    assert_eq!(dead_letters(&url, &["list"]).await, (true, "no dead letters\n".into()));
    stack.publish(format!("leads.cmd.{project}.update"), "\u{1b}[2Jfirst\u{9b}31m\u{202e}\r\n").await;
    stack.publish(format!("leads.cmd.{other}.update"), b"\xff\x00".to_vec()).await;
    stack.publish(format!("leads.cmd.{project}.explode"), "{}").await;
    let long = format!("{{{}", "x".repeat(10_000));
    stack.publish(format!("leads.cmd.{project}.update"), long.clone()).await;
    let letters = wait_for_letters(&url, 4).await;
    let reasons: Vec<_> = letters.iter().map(|letter| letter["reason"].as_str().expect("a reason")).collect();
    assert_eq!(reasons, ["invalid_json", "invalid_subject", "invalid_json", "invalid_json"]);

    // Filters; the counts are of all that pass, however many are listed.
    let numbers = async |args: &[&str]| -> Vec<String> {
        let found = read(&url, &[&["list"], args].concat()).await;
        found["letters"].as_array().expect("letters").iter().map(number).collect()
    };
    let all: Vec<_> = letters.iter().map(number).collect();
    assert_eq!(numbers(&["--reason", "invalid_subject"]).await, all[1..2]);
    assert_eq!(numbers(&["--project", &other.to_string()]).await, all[2..3]);
    assert_eq!(numbers(&["--since", "1h"]).await, all);
    assert!(numbers(&["--since", "0s"]).await.is_empty());
    let found = read(&url, &["list", "--limit", "1"]).await;
    assert_eq!(found["counts"], json!({"invalid_json": 3, "invalid_subject": 1}));
    assert_eq!(found["letters"].as_array().map(Vec::len), Some(1));
    let (_, said) = dead_letters(&url, &["list"]).await;
    assert!(said.starts_with("         3 invalid_json\n         1 invalid_subject\n"), "{said}");
    assert!(said.contains(&format!("leads.cmd.{project}.explode: ")), "{said}");
    let (well, said) = dead_letters(&url, &["list", "--reason", "replayed"]).await;
    assert!(!well && said.contains("invalid_subject"), "{said}");

    // On a terminal: headers, and of the body what does no harm.
    let (well, said) = dead_letters(&url, &["show", &all[3]]).await;
    assert!(well && !said.chars().any(|c| c.is_control() && c != '\n') && !said.contains('\u{202e}'), "{said:?}");
    assert!(said.contains("\\u{1b}[2Jfirst\\u{9b}31m\\u{202e}\\u{d}\n"), "{said}");
    for header in [headers::DEAD_LETTER_ERROR, headers::ORIGIN_TIME, headers::POSITION] {
        assert!(said.contains(&format!("  {header}: ")), "{said}");
    }
    assert!(said.contains(&format!("  {}: leads.cmd.{project}.update\n", headers::ORIGIN_SUBJECT)), "{said}");
    let (_, said) = dead_letters(&url, &["show", &all[0]]).await;
    assert!(said.contains("the first 4096 of 10001 bytes") && said.len() < 6000, "{said}");
    // For programs: all of it.
    assert_eq!(read(&url, &["show", &all[0]]).await["body"], json!(long));
    let shown = read(&url, &["show", &all[2]]).await;
    assert_eq!((&shown["bodyBase64"], &shown["body"], &shown["bytes"]), (&json!("/wA="), &Value::Null, &json!(2)));
    let (well, said) = dead_letters(&url, &["show", "999"]).await;
    assert!(!well && said.contains("there is no dead letter 999"), "{said}");
}

#[tokio::test]
async fn a_letter_is_sent_again_once_where_it_belongs() {
    let (stack, lead, url) = started().await;
    let project = stack.api.project_id;
    let dir = tempfile::tempdir().expect("a directory");
    let update = |n: u32| json!({"leadId": lead, "metadata": {"n": n}}).to_string();
    // To the wrong place; and with a body that must be mended.
    stack.publish("leads.cmd.typo.update".into(), update(1)).await;
    stack.publish(format!("leads.cmd.{project}.update"), "{\"leadId\":").await;
    let letters = wait_for_letters(&url, 2).await;
    let (broken, misled) = (number(&letters[0]), number(&letters[1]));

    // What would only be a dead letter again is not sent.
    let logged = held(&stack, LEAD_COMMANDS).await;
    let nonsense = file(&dir, b"nonsense");
    for (args, why) in [
        (vec![misled.as_str()], "--project"),
        (vec![broken.as_str()], "would become a dead letter again"),
        (vec![broken.as_str(), "--body", nonsense.to_str().expect("a path")], "would become a dead letter again"),
        (vec![broken.as_str(), "--body", "/nowhere"], "cannot read /nowhere"),
        (vec!["--all", "--reason", "invalid_json"], "0 replayed, 1 skipped"),
        (vec!["--all"], "--reason"),
    ] {
        let (well, said) = dead_letters(&url, &[&["replay"], args.as_slice()].concat()).await;
        assert!(!well && said.contains(why), "{args:?}: {said}");
    }
    assert_eq!(held(&stack, LEAD_COMMANDS).await, logged);

    let project_arg = project.to_string();
    let sent = read(&url, &["replay", &misled, "--project", &project_arg]).await;
    assert_eq!(sent["replayed"][0]["sequence"], logged + 1);
    let mended = file(&dir, update(2).as_bytes());
    read(&url, &["replay", &broken, "--body", mended.to_str().expect("a path")]).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    let told: Vec<_> = requests.iter().map(|request| request.json()["data"]["n"].clone()).collect();
    assert_eq!(told, [1, 2]);

    // It is noted: a second time must be asked for.
    let letters = wait_for_letters(&url, 2).await;
    assert_eq!(letters[1]["replay"]["state"], "sent");
    assert_eq!(letters[1]["replay"]["sequence"], logged + 1);
    let (well, said) = dead_letters(&url, &["replay", &misled, "--project", &project_arg]).await;
    assert!(!well && said.contains("already replayed") && said.contains("--again"), "{said}");
    let said = dead_letters(&url, &["replay", "--all", "--reason", "invalid_json"]).await;
    assert_eq!(said, (true, "no dead letters to replay\n".into()));
    assert_eq!(held(&stack, LEAD_COMMANDS).await, logged + 2);
    read(&url, &["replay", &misled, "--project", &project_arg, "--again"]).await;
    stack.receiver.wait_for_requests("/crm", 3, SOON).await;
    // A note is no letter.
    let notes = held(&stack, LEAD_DEAD_LETTERS).await;
    let (well, said) = dead_letters(&url, &["show", &notes.to_string()]).await;
    assert!(!well && said.contains("there is no dead letter"), "{said}");
    let found = settled(&stack).await;
    assert_eq!((&found["updates"]["succeeded"], &found["updates"]["deadLetters"]), (&json!(3), &json!(2)), "{found}");
}

#[tokio::test]
async fn a_replay_that_fails_again_is_another_letter_that_names_the_first() {
    let (stack, lead, url) = started().await;
    let project = stack.api.project_id;
    // For a lead that is nobody's, then for another one; and an update that the database refuses.
    sqlx::query("ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison')")
        .execute(&stack.pool)
        .await
        .expect("a constraint");
    let refused = stack.api.update(json!({"leadId": lead, "name": "Ada L.", "userId": "poison"})).await;
    let call = format!("leads.cmd.{project}.call.started");
    stack.publish(call.clone(), r#"{"leadId":"ffffffffffffffffffffffff","callId":"c1"}"#).await;
    // In one batch, what the database refuses is buried after the others.
    let letters = wait_for_letters(&url, 2).await;
    let of = |reason: &str| letters.iter().find(|letter| letter["reason"] == reason).expect("a letter");
    let (unknown, unapplicable) = (of("unknown_lead"), of("unapplicable"));

    // It can be read, so it is sent; and is buried once more.
    let first = number(unknown);
    let replayed = read(&url, &["replay", "--all", "--reason", "unknown_lead"]).await;
    assert_eq!((&replayed["replayed"][0]["number"], &replayed["skipped"]), (&unknown["number"], &json!([])));
    let again = wait_for_letters(&url, 3).await.remove(0);
    assert_eq!((&again["replayOf"], &again["replay"]), (&unknown["number"], &Value::Null));
    let (_, said) = dead_letters(&url, &["list"]).await;
    assert!(said.contains(&format!("(replay of dead letter {first})")), "{said}");
    assert_eq!(said.matches("(replayed as entry ").count(), 1, "{said}");

    // What the database takes by now succeeds under its own id.
    sqlx::query("ALTER TABLE lead_state.lead_updates DROP CONSTRAINT odd").execute(&stack.pool).await.expect("dropped");
    read(&url, &["replay", &number(unapplicable)]).await;
    assert_eq!(stack.api.outcome(&refused).await["status"], "succeeded");
    settled(&stack).await;
}

#[tokio::test]
async fn what_was_cut_is_not_sent_without_a_body() {
    let (stack, lead, url) = started().await;
    let dir = tempfile::tempdir().expect("a directory");
    // As large as NATS takes: with the headers that say why it is a dead letter, it does not fit.
    let room = stack.client.server_info().max_payload;
    let update = format!("leads.cmd.{}.update", stack.api.project_id);
    stack.publish(update.clone(), "{".repeat(room)).await;
    let letters = wait_for_letters(&url, 1).await;
    assert_eq!(letters[0]["truncatedFrom"], room);
    let cut = number(&letters[0]);
    let (well, said) = dead_letters(&url, &["replay", &cut]).await;
    assert!(!well && said.contains("truncated") && said.contains("--body"), "{said}");
    let (_, said) = dead_letters(&url, &["list"]).await;
    assert!(said.contains(&format!("(truncated from {room} bytes)")), "{said}");
    let (well, said) = dead_letters(&url, &["replay", "--all", "--reason", "invalid_json"]).await;
    assert!(!well && said.contains("truncated"), "{said}");
    // Too large for NATS with what a replay adds: refused, and free to be sent again.
    let pad = room - 12;
    let large = file(&dir, format!("{{\"name\":\"{}\"}}", "x".repeat(pad - 10)).as_bytes());
    let (well, said) = dead_letters(&url, &["replay", &cut, "--body", large.to_str().expect("a path")]).await;
    assert!(!well && said.contains("was not replayed") && said.contains("max_payload"), "{said}");
    let mended = file(&dir, json!({"leadId": lead, "name": "n"}).to_string().as_bytes());
    read(&url, &["replay", &cut, "--body", mended.to_str().expect("a path")]).await;
    stack.receiver.wait_for_requests("/crm", 1, SOON).await;
}

#[tokio::test]
async fn two_who_send_it_at_once_send_it_once_and_what_is_in_doubt_waits_for_a_word() {
    let (stack, _, url) = started().await;
    let call = format!("leads.cmd.{}.call.started", stack.api.project_id);
    for id in ["c1", "c2"] {
        stack.publish(call.clone(), json!({"leadId": "f".repeat(24), "callId": id}).to_string()).await;
    }
    let letters = wait_for_letters(&url, 2).await;
    let (doubtful, raced) = (number(&letters[0]), number(&letters[1]));
    // leadctl died, or lost NATS, between the note and the command.
    let mut note = async_nats::HeaderMap::new();
    note.insert(headers::REPLAY, Replay::Begun.to_string());
    let js = service_kit::nats::jetstream(&stack.client);
    let note = js.publish_with_headers(subject::replayed(doubtful.parse().expect("a number")), note, "".into());
    note.await.expect("a publish").await.expect("an ack");

    let logged = held(&stack, LEAD_COMMANDS).await;
    let replay = ["replay", raced.as_str()];
    let racing = (0..8).map(|_| dead_letters(&url, &replay));
    let said = futures::future::join_all(racing).await;
    assert_eq!(said.iter().filter(|(well, _)| *well).count(), 1, "{said:?}");
    assert_eq!(held(&stack, LEAD_COMMANDS).await, logged + 1);

    let (well, said) = dead_letters(&url, &["replay", &doubtful]).await;
    assert!(!well && said.contains("its result is unknown"), "{said}");
    let (_, said) = dead_letters(&url, &["list"]).await;
    assert!(said.contains("(maybe replayed)"), "{said}");
    // The raced one is a dead letter again, and sent; the doubtful one is left.
    wait_for_letters(&url, 3).await;
    let (well, said) = dead_letters(&url, &["replay", "--all", "--reason", "unknown_lead"]).await;
    assert!(!well && said.contains("1 replayed, 1 skipped"), "{said}");
    read(&url, &["replay", &doubtful, "--again"]).await;
    assert_eq!(held(&stack, LEAD_COMMANDS).await, logged + 3);
}

//! Invalid input gets a clear error, and nothing is accepted or lost. A command that cannot be parsed or applied delays
//! no other.

use std::collections::BTreeMap;

use async_nats::jetstream::message::StreamMessage;
use contract::{
    headers,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS},
};
use secrets::api_key;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{LEDGER_ROWS, Stack, TEST_TIMEOUT, UPDATE, assert_refused, health_page, letter_number};

/// Messages that must become dead letters: subject, body and reason.
fn poison(stack: &Stack, lead_id: &str) -> Vec<(String, Vec<u8>, &'static str)> {
    let project = stack.api.project_id;
    let update = format!("leads.cmd.{project}.update");
    let large = format!(r#"{{"leadId":"{lead_id}","x":"{}"#, "y".repeat(1 << 20));
    vec![
        (update.clone(), b"\xff\xfe not json".to_vec(), "invalid_json"),
        (update.clone(), br#"{"name":"a\u0000b"}"#.to_vec(), "invalid_json"),
        (update.clone(), br#"{"metadata":{"a":1,"a":2}}"#.to_vec(), "invalid_json"),
        (update.clone(), br#"{"metadata":{"a":1e999}}"#.to_vec(), "invalid_json"),
        (update.clone(), large.into_bytes(), "invalid_json"),
        (update.clone(), br#"{"leadId":17}"#.to_vec(), "invalid_command"),
        (update.clone(), br#"{"metadata":"text"}"#.to_vec(), "invalid_command"),
        (format!("leads.cmd.{project}.call.ended"), br#"{"leadId":{}}"#.to_vec(), "invalid_command"),
        (update.clone(), b"[1,2]".to_vec(), "invalid_command"),
        (format!("leads.cmd.{project}.explode"), b"{}".to_vec(), "invalid_subject"),
        ("leads.cmd.~odd~.update".into(), b"{}".to_vec(), "invalid_subject"),
        ("leads.cmd.\u{e9}\u{202e}.update".into(), b"{}".to_vec(), "invalid_subject"),
        (format!("{update}.update"), b"{}".to_vec(), "invalid_subject"),
        (
            format!("leads.cmd.{project}.call.expired"),
            br#"{"leadId":"ffffffffffffffffffffffff"}"#.to_vec(),
            "unknown_lead",
        ),
    ]
}

/// The first dead letters, in the order of their commands.
async fn letters(stack: &Stack, count: usize) -> Vec<StreamMessage> {
    let stream = stack.js().get_stream(LEAD_DEAD_LETTERS).await.expect("dead letters");
    let mut letters = Vec::new();
    for sequence in 1..=count as u64 {
        letters.push(stream.get_raw_message(sequence).await.expect("a letter"));
    }
    letters.sort_by_key(|letter| {
        letter.headers.get(headers::ORIGIN_SEQUENCE).expect("a sequence").as_str().parse::<u64>().expect("a number")
    });
    letters
}

#[tokio::test]
async fn poison_messages_become_whole_dead_letters_and_delay_no_update() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    let poison = poison(&stack, &lead_id);

    for (subject, body, _) in &poison {
        stack.publish(subject.clone(), body.clone()).await;
    }
    stack.publish_update(&json!({"leadId": lead_id, "metadata": {"after": true}})).await;

    let requests = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    assert_eq!(requests[0].json()["data"]["after"], true);
    let listed = stack.wait_for_letters(poison.len()).await;
    for (letter, (subject, body, reason)) in letters(&stack, poison.len()).await.iter().zip(&poison) {
        assert_eq!(letter.subject.as_str(), format!("leads.dead.{reason}"), "{subject}");
        assert_eq!(letter.headers.get(headers::ORIGIN_SUBJECT).expect("origin").as_str(), subject);
        assert!(!letter.headers.get(headers::DEAD_LETTER_ERROR).expect("an error").as_str().is_empty());
        assert!(letter.payload == *body, "{subject}: not whole");
    }
    // The metrics and leadctl count the dead letters by reason.
    let mut counts = BTreeMap::new();
    for (_, _, reason) in &poison {
        *counts.entry(*reason).or_insert(0) += 1;
    }
    let (_, metrics) = health_page(&stack.lead_state_ready, "/metrics").await.expect("metrics");
    for (reason, count) in &counts {
        let line = format!("leadrelay_lead_state_dead_letters_total{{reason=\"{reason}\"}} {count}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    assert_eq!(stack.dead_letters_json(&["list"]).await["counts"], json!(counts));

    // Each dead letter can be replayed with another body, and on another subject.
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), json!({"leadId": lead_id}).to_string()).expect("a file");
    let (body, project) = (file.path().to_str().expect("a path"), stack.api.project_id.to_string());
    for letter in &listed {
        let replay = ["replay", &letter_number(letter), "--body", body, "--project", &project];
        stack.dead_letters_json(&replay).await;
    }
    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["deadLetters"], poison.len(), "{report}");
    let recorded = poison.iter().filter(|(subject, _, _)| !subject.ends_with(".call.expired")).count();
    assert_eq!(report["updates"]["accepted"], 1 + recorded, "{report}");
}

#[tokio::test]
async fn the_deepest_body_that_is_accepted_is_applied_and_delivered() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    // The body has 64 levels. As metadata the field is one level deeper.
    let nested = (0..63).fold(json!(1), |inner, _| json!([inner]));

    let answer = stack.api.update_and_wait(json!({"leadId": lead, "deep": nested.clone()})).await;

    assert_eq!(answer["status"], "succeeded", "{answer}");
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let lead = stack.api.get(&format!("/api/v1/leads/get?leadId={lead}")).await.1;
    assert_eq!(lead["data"]["metadata"]["deep"], nested, "{lead}");
}

#[tokio::test]
async fn valid_commands_that_cannot_succeed_have_a_failed_outcome() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let huge = "y".repeat(1 << 20);

    stack.publish_update(&json!({"name": "without an address"})).await;
    stack.publish_update(&json!({"leadId": lead_id, "name": huge})).await;
    stack.publish_update(&json!({"leadId": lead_id, "metadata": {"a": huge}})).await;
    let stolen = json!({"leadId": lead_id, "name": "stolen"}).to_string();
    stack.publish("leads.cmd.ffffffffffffffffffffffff.update".into(), stolen).await;
    stack.wait_until_applied().await;

    let codes: Vec<String> =
        sqlx::query_scalar("SELECT error_code FROM lead_state.lead_updates WHERE NOT success ORDER BY log_sequence")
            .fetch_all(&stack.pool)
            .await
            .expect("the ledger");
    assert_eq!(codes, ["address_missing", "text_too_long", "metadata_too_large", "lead_not_found"]);
}

#[tokio::test]
async fn an_update_that_the_database_refuses_delays_no_other() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    // This constraint represents any fault of the data that validation does not detect.
    stack.sql("ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison')").await;

    let mut updates = Vec::new();
    for number in 0..20 {
        let user = if number == 11 { "poison" } else { "u" };
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}, "userId": user})).await);
    }

    assert_eq!(stack.api.outcome(&updates[19]).await["status"], "succeeded");
    assert_eq!(stack.count(LEDGER_ROWS).await, 19);
    let stream = stack.js().get_stream(LEAD_DEAD_LETTERS).await.expect("dead letters");
    let letter = stream.get_last_raw_message_by_subject("leads.dead.unapplicable").await.expect("a letter");
    assert!(String::from_utf8_lossy(&letter.payload).contains("poison"));
}

/// A proxy that uses the other length would forward the rest as the request of another client.
#[tokio::test]
async fn a_request_with_two_lengths_is_the_last_one_of_its_connection() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let body = json!({"leadId": lead_id, "name": "Ada"}).to_string();
    let address = stack.api.url.strip_prefix("http://").expect("http");
    for lengths in
        ["content-length: 5\r\ntransfer-encoding: chunked\r\n", "transfer-encoding: chunked\r\ncontent-length: 5\r\n"]
    {
        let head = format!("POST {UPDATE} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {}\r\n", stack.api.key);
        let smuggled = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        let request = format!("{head}{lengths}\r\n{:x}\r\n{body}\r\n0\r\n\r\n{smuggled}", body.len());
        let mut connection = TcpStream::connect(address).await.expect("a connection");
        connection.write_all(request.as_bytes()).await.expect("sent");
        let mut answers = Vec::new();
        // The connection may end with a reset, because the server has unread bytes.
        let _ = timeout(TEST_TIMEOUT, connection.read_to_end(&mut answers)).await.expect("the connection is closed");
        let answers = String::from_utf8_lossy(&answers);
        assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{lengths}: {answers}");
    }
    stack.wait_until_applied().await;
    assert_eq!(stack.count(LEDGER_ROWS).await, 2);
}

#[tokio::test]
async fn a_refused_request_is_not_in_the_log() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;

    for (body, status) in [
        (json!({}), 400),
        (json!({"leadId": lead_id}), 400),
        (json!({"leadId": "x", "name": "y"}), 400),
        (json!({"referenceId": "R", "name": "y"}), 400),
        (json!({"leadId": lead_id, "projectId": "ffffffffffffffffffffffff", "name": "y"}), 403),
        (json!({"leadId": lead_id, "metadata": "y"}), 400),
        (json!({"leadId": lead_id, "name": "a\u{0}b"}), 400),
    ] {
        let (got, answer) = stack.api.post(UPDATE, &body).await;
        assert_eq!((got, &answer["success"]), (status, &json!(false)), "{body}: {answer}");
    }
    let mut stranger = stack.api.clone();
    stranger.key = api_key::generate([1; 32]);
    let update = json!({"leadId": lead_id, "name": "y"});
    assert_refused(stranger.post(UPDATE, &update).await, 401, "invalid_api_key");

    assert_eq!(stack.stream_state(LEAD_COMMANDS).await.messages, 0);
}

#[tokio::test]
async fn a_full_log_answers_503_and_loses_nothing() {
    let stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let lead_id = stack.lead(&[]).await;
    // Freezes lead-state, because the log is purged only as it is applied.
    stack.lead_state.freeze();
    let blob = "x".repeat(60_000);

    let mut accepted = Vec::new();
    let refused = loop {
        let (status, answer) =
            stack.api.post(UPDATE, &json!({"leadId": lead_id, "metadata": {"n": accepted.len(), "blob": blob}})).await;
        if status != 200 {
            break (status, answer);
        }
        accepted.push(answer["updateId"].as_str().expect("an id").to_owned());
        assert!(accepted.len() < 100, "the log never fills");
    };

    assert_refused(refused, 503, "log_full");
    stack.lead_state.thaw();
    for update in &accepted {
        assert_eq!(stack.api.outcome(update).await["status"], "succeeded");
    }
    assert_eq!(stack.count(LEDGER_ROWS).await, accepted.len() as i64);
    // As the log is purged, updates are accepted again.
    let update = stack.api.update_until_accepted(&json!({"leadId": lead_id, "name": "y"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
}

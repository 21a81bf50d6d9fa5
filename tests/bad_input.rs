//! Bad input: a clear error, nothing accepted, nothing lost; and what cannot be parsed never stops the reader.

use std::collections::BTreeMap;

use contract::{
    headers,
    rpc::{self, CreateKey, RpcError},
    streams::LEAD_DEAD_LETTERS,
};
use futures::StreamExt;
use serde_json::json;

use crate::{
    audit::settled,
    dead_letters::{number, read, wait_for_letters},
    stack::{SOON, Stack},
};

#[tokio::test]
async fn poison_goes_whole_to_the_dead_letters_and_stops_nobody() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let project = stack.api.project_id;
    let update = format!("leads.cmd.{project}.update");
    let large = format!(r#"{{"leadId":"{lead_id}","x":"{}"#, "y".repeat(1 << 20));
    let poison: Vec<(String, Vec<u8>, &str)> = vec![
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
            format!("leads.cmd.{project}.call.started"),
            br#"{"leadId":"ffffffffffffffffffffffff"}"#.to_vec(),
            "unknown_lead",
        ),
    ];
    for (subject, payload, _) in &poison {
        stack.publish(subject.clone(), payload.clone()).await;
    }
    // Well-formed commands that ask for the impossible have an outcome instead.
    let huge = "y".repeat(1 << 20);
    for (subject, body) in [
        (update.clone(), json!({"name": "nobody"})),
        (update.clone(), json!({"leadId": lead_id, "name": huge})),
        (update.clone(), json!({"leadId": lead_id, "metadata": {"a": huge}})),
        ("leads.cmd.ffffffffffffffffffffffff.update".into(), json!({"leadId": lead_id, "name": "stolen"})),
    ] {
        stack.publish(subject, body.to_string()).await;
    }
    stack.publish(update, json!({"leadId": lead_id, "metadata": {"after": true}}).to_string()).await;
    // Told of this lead: the two that failed, and what came after them.
    let requests = stack.receiver.wait_for_requests("/crm", 3, SOON).await;
    assert!(requests.iter().any(|request| request.json()["data"]["after"] == true));

    let url = stack.nats.url();
    let listed = wait_for_letters(&url, poison.len()).await;
    let js = service_kit::nats::jetstream(&stack.client);
    let stream = js.get_stream(LEAD_DEAD_LETTERS).await.expect("dead letters");
    let consumer = stream
        .create_consumer(async_nats::jetstream::consumer::pull::OrderedConfig::default())
        .await
        .expect("a consumer");
    let letters: Vec<_> = consumer.messages().await.expect("messages").take(poison.len()).collect().await;
    let mut letters: Vec<_> = letters.into_iter().map(|letter| letter.expect("a letter")).collect();
    letters.sort_by_key(|letter| {
        let map = letter.headers.as_ref().expect("headers");
        map.get(headers::ORIGIN_SEQUENCE).expect("a sequence").as_str().parse::<u64>().expect("a number")
    });
    for (letter, (subject, payload, reason)) in letters.iter().zip(&poison) {
        let map = letter.headers.as_ref().expect("headers");
        assert_eq!(letter.subject.as_str(), format!("leads.dead.{reason}"), "{subject}");
        assert_eq!(map.get(headers::ORIGIN_SUBJECT).expect("origin").as_str(), subject);
        assert!(!map.get(headers::DEAD_LETTER_ERROR).expect("an error").as_str().is_empty());
        assert!(letter.payload == *payload, "{subject}: not whole");
    }
    let failed: Vec<(String,)> =
        sqlx::query_as("SELECT error_code FROM lead_state.lead_updates WHERE NOT success ORDER BY log_sequence")
            .fetch_all(&stack.pool)
            .await
            .expect("the ledger");
    let failed: Vec<_> = failed.iter().map(|(code,)| code.as_str()).collect();
    assert_eq!(failed, ["address_missing", "text_too_long", "metadata_too_large", "lead_not_found"]);

    // Counted, on the health port and by leadctl.
    let mut counts = BTreeMap::new();
    for (_, _, reason) in &poison {
        *counts.entry(*reason).or_insert(0) += 1;
    }
    let metrics = stack.lead_state_ready.replace("/readyz", "/metrics");
    let metrics = test_support::http_client().get(metrics).send().await.expect("an answer").text().await.expect("text");
    for (reason, count) in &counts {
        let line = format!("leadrelay_lead_state_dead_letters_total{{reason=\"{reason}\"}} {count}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    assert_eq!(read(&url, &["list"]).await["counts"], json!(counts));

    // Each of them can be sent again, mended: under another body, or in another place.
    let dir = tempfile::tempdir().expect("a directory");
    let (body, project) = (dir.path().join("mended"), project.to_string());
    std::fs::write(&body, json!({"leadId": lead_id}).to_string()).expect("a file");
    let body = body.to_str().expect("a path");
    for letter in &listed {
        read(&url, &["replay", &number(letter), "--body", body, "--project", &project]).await;
    }
    let found = settled(&stack).await;
    assert_eq!(found["updates"]["deadLetters"], poison.len(), "{found}");
    let updates = poison.iter().filter(|(subject, _, _)| !subject.contains(".call.")).count();
    assert_eq!(found["updates"]["accepted"], 5 + updates, "{found}");
}

#[tokio::test]
async fn a_key_with_the_hash_of_another_is_a_conflict() {
    let stack = Stack::start().await;
    let create = CreateKey {
        project_id: stack.api.project_id,
        name: "twin".into(),
        // That of the key in use.
        sha256: secrets::api_key::hash(&stack.api.key),
        scopes: contract::key::Scope::ALL.into(),
        expires_at: None,
    };
    let answer: Result<contract::key::ApiKey, RpcError> =
        service_kit::rpc::call(&stack.client, rpc::KEY_CREATE, &create).await;
    let refused = answer.expect_err("a conflict");
    assert_eq!((refused.status, refused.code.as_str()), (409, "key_exists"), "{refused}");
}

#[tokio::test]
async fn one_command_that_the_database_refuses_holds_up_no_other() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    // Stands for whatever nobody thought of.
    sqlx::query("ALTER TABLE lead_state.lead_updates ADD CONSTRAINT odd CHECK (user_id IS DISTINCT FROM 'poison')")
        .execute(&stack.pool)
        .await
        .expect("a constraint");
    let mut updates = Vec::new();
    for number in 0..20 {
        let user = if number == 11 { "poison" } else { "u" };
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}, "userId": user})).await);
    }
    assert_eq!(stack.api.outcome(&updates[19]).await["status"], "succeeded");
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 19);
    let js = service_kit::nats::jetstream(&stack.client);
    let stream = js.get_stream(LEAD_DEAD_LETTERS).await.expect("dead letters");
    let letter = stream.get_last_raw_message_by_subject("leads.dead.unapplicable").await.expect("a letter");
    assert!(String::from_utf8_lossy(&letter.payload).contains("poison"));
}

#[tokio::test]
async fn refused_at_the_door_is_not_in_the_log() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    for (body, status) in [
        (json!({}), 400),
        (json!({"leadId": lead_id}), 400),
        (json!({"leadId": "x", "name": "y"}), 400),
        (json!({"referenceId": "R", "name": "y"}), 400),
        (json!({"leadId": lead_id, "projectId": "ffffffffffffffffffffffff", "name": "y"}), 403),
        (json!({"leadId": lead_id, "metadata": "y"}), 400),
        (json!({"leadId": lead_id, "name": "a\u{0}b"}), 400),
    ] {
        let (got, answer) = stack.api.post("/api/v1/leads/update", &body).await;
        assert_eq!(got, status, "{body}: {answer}");
        assert_eq!(answer["success"], false);
    }
    let mut stranger = stack.api.clone();
    stranger.key = secrets::api_key::generate([1; 32]);
    assert_eq!(stranger.post("/api/v1/leads/update", &json!({"leadId": lead_id, "name": "y"})).await.0, 401);
    let js = service_kit::nats::jetstream(&stack.client);
    let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    assert_eq!(log.cached_info().state.messages, 0);
}

#[tokio::test]
async fn a_full_log_answers_503_and_loses_nothing() {
    let stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    // While nobody reads, nothing is purged.
    stack.lead_state.freeze();
    let mut accepted = Vec::new();
    let blob = "x".repeat(60_000);
    let refused = loop {
        let body = json!({"leadId": lead_id, "metadata": {"n": accepted.len(), "blob": blob}});
        let (status, answer) = stack.api.post("/api/v1/leads/update", &body).await;
        if status != 200 {
            break (status, answer);
        }
        accepted.push(answer["updateId"].as_str().expect("an id").to_owned());
        assert!(accepted.len() < 100, "the log never fills");
    };
    assert_eq!((refused.0, &refused.1["code"]), (503, &json!("log_full")));
    stack.lead_state.thaw();
    for update in &accepted {
        assert_eq!(stack.api.outcome(update).await["status"], "succeeded");
    }
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, accepted.len() as i64);
    // Room comes back by itself.
    let update = stack.api.update_stubbornly(&json!({"leadId": lead_id, "name": "y"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
}

//! Bad input: a clear error, nothing accepted, nothing lost; and what cannot be parsed never stops the reader.

use contract::{headers, streams::LEAD_DEAD_LETTERS};
use futures::StreamExt;
use serde_json::json;

use crate::stack::{SOON, Stack};

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
        (update.clone(), b"[1,2]".to_vec(), "invalid_command"),
        (format!("leads.cmd.{project}.explode"), b"{}".to_vec(), "invalid_subject"),
        ("leads.cmd.~odd~.update".into(), b"{}".to_vec(), "invalid_subject"),
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
    stack.publish(update.clone(), r#"{"name":"nobody"}"#).await;
    stack.publish(update, json!({"leadId": lead_id, "metadata": {"after": true}}).to_string()).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    assert_eq!(request.json()["data"]["after"], true);

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
    assert_eq!(
        stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE error_code = 'address_missing'").await,
        1
    );
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
    stranger.key = contract::key::new_secret([1; 32]);
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

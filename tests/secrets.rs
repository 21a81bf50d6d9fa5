//! Secrets at rest are sealed in Postgres and NATS, opened only for an attempt, and never shown. Their keys can be
//! rotated.

use std::{path::Path, process::Command};

use base64::{Engine, prelude::BASE64_STANDARD};
use contract::{
    process::{Callback, ProcessSpec},
    rpc::{self, ProcessChangeResult, Query, RotateSecrets, RotationResult, RpcError},
    streams::PROCESSES,
};
use futures::TryStreamExt;
use serde_json::{Value, json};
use test_support::{Receiver, Reply, Service, eventually, nats, postgres};

use crate::support::{
    LeadctlRun, Load, SECRETS_KEY, Stack, TEST_TIMEOUT, by_update, health_page, process_id, secret, service, verify,
};

const NEXT_KEY: &str = "VGhlIG5leHQga2V5IG9mIHRoZSB0ZXN0cywgMzIgYnk=";

fn signing_secret(byte: u8) -> String {
    format!("whsec_{}", BASE64_STANDARD.encode([byte; 32]))
}

/// All messages of all streams and buckets, with subjects and headers, as one text.
async fn streams(stack: &Stack) -> String {
    let js = stack.js();
    let mut text = String::new();
    let mut streams = js.streams();
    while let Some(info) = streams.try_next().await.expect("a stream") {
        let stream = js.get_stream(&info.config.name).await.expect("a stream");
        for sequence in info.state.first_sequence..=info.state.last_sequence {
            // The message may have been purged.
            let Ok(message) = stream.get_raw_message(sequence).await else { continue };
            let payload = String::from_utf8_lossy(&message.payload);
            text += &format!("{} {} {:?} {payload}\n", info.config.name, message.subject, message.headers);
        }
    }
    text
}

/// The whole database, as text.
fn dump(stack: &Stack) -> String {
    let found = std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let dirs = found.chain(versions.map(|version| version.path().join("bin")));
    let pg_dump =
        dirs.map(|dir| dir.join("pg_dump")).find(|path| path.exists()).expect("pg_dump, which comes with Postgres");
    let output = Command::new(pg_dump).arg(stack.postgres.url()).output().expect("pg_dump");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Secrets of the first test, in addition to generated ones.
const HEADER_VALUE: &str = "header-value-of-the-test-77";
const BEARER: &str = "bearer-of-the-test-77";
const NEXT_BEARER: &str = "bearer-of-the-test-88";
const IN_REFUSED_SPEC: &str = "refused-secret-of-the-test";

/// Applies specifications that are rejected for different reasons, over NATS and with leadctl. No response contains the
/// secrets.
async fn assert_refusals_hide_secrets(stack: &Stack, wrong: &str) {
    let spec = |change: fn(&mut Value), text: &str| {
        let mut spec = json!({"projectId": stack.api.project_id, "name": "sales", "states": [{"name": "new"}],
            "callbacks": [{"name": "echo", "url": "http://x", "secrets": [text],
                           "auth": {"type": "bearer", "token": text}}]});
        change(&mut spec);
        spec
    };
    let text = IN_REFUSED_SPEC;
    let refused = [
        spec(|_| (), &format!("{text}\n")),
        spec(|spec| spec["callbacks"][0]["secrets"] = spec["callbacks"][0]["secrets"][0].take(), text),
        spec(|spec| spec["callbacks"][0]["auth"] = spec["callbacks"][0]["auth"]["token"].take(), text),
        spec(|spec| spec["callbacks"][0]["auth"]["type"] = spec["callbacks"][0]["auth"]["token"].take(), text),
        spec(|spec| spec["states"] = json!([]), wrong),
    ];
    let file = tempfile::NamedTempFile::new().expect("a file");
    for spec in &refused {
        let answer = service_kit::rpc::exchange::<_, ProcessChangeResult>(
            &stack.client,
            ProcessSpec::SUBJECT,
            spec,
            rpc::DEFAULT_TIMEOUT,
        );
        let answer = answer.await;
        let answer = answer.expect_err("refused").to_string();
        std::fs::write(file.path(), spec.to_string()).expect("a file");
        let run = stack.leadctl(&["process", "apply", file.path().to_str().expect("a path")]).await;
        assert_ne!(run.code, 0);
        let printed = format!("{answer} {}", run.text());
        assert!(!printed.contains(text) && !printed.contains(wrong), "{printed}");
    }
}

#[tokio::test]
async fn secrets_are_nowhere_in_clear() {
    let stack = Stack::start_with(&[("RUST_LOG", "debug"), ("RETRY_SCHEDULE", "0s,100ms")]).await;
    let (given, wrong) = (signing_secret(0xc1), signing_secret(0xc2));
    // There is an endpoint that echoes its request, one that closes the connection, and one that works.
    stack.receiver.on("/echo", [Reply::status(500).body(format!("the endpoint read {NEXT_BEARER}"))]);
    stack.receiver.on("/silent", [Reply::drop_connection()]);
    let mut callbacks = json!([
        {"name": "fine", "url": stack.receiver.url("/fine"), "secrets": [given],
         "auth": {"type": "header", "name": "X-Api-Key", "value": HEADER_VALUE}},
        {"name": "echo", "url": stack.receiver.url("/echo"), "auth": {"type": "bearer", "token": BEARER}},
        {"name": "silent", "url": stack.receiver.url("/silent")},
    ]);
    let applied = stack.process(callbacks.clone()).await;
    assert_eq!(applied.process.callbacks[0].secrets.len(), 0, "a given secret is not shown again");
    let generated = ["echo", "silent"].map(|name| secret(&applied.process, name));
    let lead_id = stack.api.initiate(process_id(&applied), Some("R")).await;
    assert!(!stack.process(callbacks.clone()).await.changed, "a sealed secret is compared with the given one");
    callbacks[1]["auth"]["token"] = json!(NEXT_BEARER);
    assert_eq!(stack.process(callbacks).await.changes, ["callback echo: auth changed"]);
    assert_refusals_hide_secrets(&stack, &wrong).await;
    let mut updates = Vec::new();
    for state in ["interested", "nowhere", "lost"] {
        updates.push(stack.api.update(json!({"leadId": lead_id, "targetState": state})).await);
    }
    let done = "SELECT count(*) FROM webhooks.deliveries WHERE status <> 'pending'";
    stack.wait_for_count_within(TEST_TIMEOUT * 2, done, 9).await;

    let timelines = updates.iter().map(async |update| stack.api.outcome(update).await.to_string());
    let timelines = futures::future::join_all(timelines).await.join("\n");
    let (database, streams) = (dump(&stack), streams(&stack).await);
    let logs = [&stack.gateway, &stack.lead_state, &stack.notifier].map(Service::log);
    let file = |dir: &Path, name: &str| std::fs::read_to_string(dir.join(name)).expect(name);
    let servers = [file(stack.nats.dir(), "nats.log"), file(stack.postgres.dir(), "postgres.log")];

    // Checks that the dumps are complete, so that the search below would find a secret.
    assert!(timelines.contains("the endpoint read ***"), "an echoed secret is masked: {timelines}");
    assert!(database.contains("sealed:v1:") && database.contains(&lead_id), "an incomplete dump");
    assert!(streams.contains("sealed:v1:") && streams.contains(&lead_id), "incomplete streams");
    assert!(logs.iter().all(|log| log.contains("connected to NATS")));
    let constants = [HEADER_VALUE, BEARER, NEXT_BEARER, IN_REFUSED_SPEC, SECRETS_KEY].map(str::to_owned);
    let secrets = constants.into_iter().chain([given, wrong, stack.api.key.clone()]).chain(generated);
    let places = [("the database", &database), ("the streams", &streams), ("the timelines", &timelines)];
    for secret in secrets {
        let secret = secret.trim_start_matches("whsec_").trim_start_matches("lr_");
        for (place, text) in places.into_iter().chain(logs.iter().chain(&servers).map(|log| ("a log", log))) {
            // The message does not contain the text, because that would put the secret into the log of a failed test.
            assert!(!text.contains(secret), "{secret} is in {place}");
        }
    }
}

#[tokio::test]
async fn without_a_key_the_services_do_not_start_and_print_how_to_create_one() {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    for name in ["lead-state", "webhook-notifier"] {
        for (key, expected) in [("", "SECRETS_KEY is not set"), ("dG9vIHNob3J0", "is not a key")] {
            let (mut service, _) = service(name, &nats, &postgres, &[("SECRETS_KEY", key)]);
            let status = tokio::time::timeout(TEST_TIMEOUT, service.exited()).await.expect("it does not start");
            assert!(!status.success());
            let log = service.log();
            assert!(log.contains(expected) && log.contains("leadctl secrets new-key"), "{log}");
            assert!(key.is_empty() || !log.contains(key), "{log}");
        }
    }
    let mut command = tokio::process::Command::new(test_support::binary("leadctl"));
    command.args(["secrets", "new-key"]);
    let created = LeadctlRun::of(command).await.assert_ok().stdout;
    assert_eq!(BASE64_STANDARD.decode(created.trim_end()).expect("base64").len(), 32);
}

/// A stack with a process, its callback `crm` with a secret, and a lead.
async fn started() -> (Stack, ProcessChangeResult, Callback, String) {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let callback = applied.process.callbacks[0].clone();
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    (stack, applied, callback, lead_id)
}

/// The key of a process in its bucket.
fn bucket_key(stack: &Stack, applied: &ProcessChangeResult) -> String {
    contract::subject::process_key(stack.api.project_id, applied.process.process_id).as_str().to_owned()
}

/// The settings of the services while keys are rotated.
const BOTH_KEYS: [(&str, &str); 2] = [("SECRETS_KEY", NEXT_KEY), ("SECRETS_KEYS_OLD", SECRETS_KEY)];

impl Stack {
    /// Replaces the notifier with one that has these settings.
    async fn replace_notifier(&mut self, extra: &[(&str, &str)]) {
        let (mut next, ready) = service("webhook-notifier", &self.nats, &self.postgres, extra);
        assert!(self.notifier.terminate().await.success());
        next.wait_for_http(&ready, TEST_TIMEOUT).await;
        self.notifier = next;
    }

    /// Replaces lead-state with one that has these settings.
    async fn replace_lead_state(&mut self, extra: &[(&str, &str)]) {
        let (mut next, ready) = service("lead-state", &self.nats, &self.postgres, extra);
        assert!(self.lead_state.terminate().await.success());
        next.wait_for_http(&ready, TEST_TIMEOUT).await;
        self.lead_state = next;
    }

    async fn rotate(&self) -> RotationResult {
        self.call(&RotateSecrets::default()).await
    }
}

#[tokio::test]
async fn a_secret_stored_in_clear_is_sealed_at_the_next_start() {
    let (mut stack, applied, callback, lead_id) = started().await;
    let secret = callback.secrets[0].expose();
    let bucket = stack.js().get_key_value(PROCESSES).await.expect("the bucket");
    let key = bucket_key(&stack, &applied);
    let config: String = sqlx::query_scalar("SELECT config::text FROM lead_state.processes")
        .fetch_one(&stack.pool)
        .await
        .expect("a row");
    let mut clear: Value = serde_json::from_str(&config).expect("JSON");
    clear["callbacks"][0]["secrets"] = json!([secret]);

    stack.lead_state.terminate().await;
    let update = "UPDATE lead_state.processes SET config = $1::json";
    sqlx::query(update).bind(clear.to_string()).execute(&stack.pool).await.expect(update);
    bucket.put(key.as_str(), clear.to_string().into()).await.expect("a put");
    stack.lead_state.restart().await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;

    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    verify(request, secret);
    assert_eq!(request.json()["updateId"], update_id);
    eventually(TEST_TIMEOUT, "the secret is sealed in both places", async || {
        let entry = bucket.get(key.as_str()).await.expect("a get").expect("an entry");
        let places = [dump(&stack), String::from_utf8_lossy(&entry).into_owned()];
        places.iter().all(|text| text.contains("sealed:v1:") && !text.contains(secret))
    })
    .await;
}

#[tokio::test]
async fn keys_rotate_under_load_and_every_webhook_verifies() {
    let (mut stack, applied, callback, lead_id) = started().await;
    let load = Load::start(&stack.api, vec![lead_id]);

    // The service that opens secrets gets both keys before the service that seals them.
    stack.replace_notifier(&BOTH_KEYS).await;
    stack.replace_lead_state(&BOTH_KEYS).await;
    let first = stack.rotate().await;
    let again = stack.rotate().await;

    assert_eq!((first.resealed, first.remaining, first.locked.len()), (1, 0, 0));
    assert_eq!((again.resealed, again.unchanged, again.key_id), (0, 1, first.key_id));
    let bucket = stack.js().get_key_value(PROCESSES).await.expect("the bucket");
    let entry = bucket.get(bucket_key(&stack, &applied)).await.expect("a get").expect("an entry");
    let entry = String::from_utf8_lossy(&entry).into_owned();
    assert!(entry.contains(&format!("sealed:v1:{}:", first.key_id)), "the rotation is projected");
    stack.leadctl(&["secrets", "rotate"]).await.assert_ok().assert_prints(&["needed only to restore"]);

    // Now the notifier runs without the old key.
    stack.replace_notifier(&[("SECRETS_KEY", NEXT_KEY)]).await;
    let seen = stack.receiver.requests().len();
    stack.receiver.wait_for_requests("/crm", seen + 10, TEST_TIMEOUT).await;
    let sent = load.end().await;
    let requests = stack.receiver.wait_for_requests("/crm", sent.len(), TEST_TIMEOUT * 2).await;
    for request in &requests {
        verify(request, callback.secrets[0].expose());
    }
    assert_eq!(by_update(&requests).len(), sent.len());
}

#[tokio::test]
async fn deliveries_wait_while_the_key_of_their_secret_is_missing() {
    let (mut stack, _, callback, lead_id) = started().await;
    assert!(stack.notifier.terminate().await.success());
    let (mut locked, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &[("SECRETS_KEY", NEXT_KEY)]);
    // Even before there is a delivery, the notifier reports the callback and the key, and is not ready.
    let line = locked.wait_for_log("cannot be opened", TEST_TIMEOUT).await;
    let old = secrets::SealingKeys::parse(SECRETS_KEY, []).expect("a key").present().to_string();
    assert!(
        line.contains(&callback.callback_id.to_string()) && line.contains(&old) && line.contains("ERROR"),
        "{line}"
    );
    eventually(TEST_TIMEOUT, "it is not ready", async || {
        let (status, body) = health_page(&ready, "/readyz").await?;
        if status == 503 && body.contains("secrets") && body.contains(&old) { Ok(()) } else { Err(body) }
    })
    .await;

    let update_id = stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;
    let waiting = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 0";
    stack.wait_for_count(waiting, 1).await;
    // Deliveries whose secrets have another key are sent in the meantime.
    stack.replace_lead_state(&BOTH_KEYS).await;
    let other = Receiver::start().await;
    stack.fallback_of(stack.api.project_id, json!([{"name": "f", "url": other.url("/f")}])).await;
    stack.api.update(json!({"leadId": "0123456789abcdef01234567", "name": "x"})).await;
    other.wait_for_requests("/f", 1, TEST_TIMEOUT).await;
    assert!(stack.receiver.requests().is_empty());
    assert_eq!(locked.log().matches("cannot be opened").count(), 1, "reported once: {}", locked.log());

    // With the key, the first attempt of the waiting delivery is made.
    assert!(locked.terminate().await.success());
    let (mut notifier, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &BOTH_KEYS);
    notifier.wait_for_http(&ready, TEST_TIMEOUT).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    assert_eq!(request.json()["updateId"], update_id);
    verify(request, callback.secrets[0].expose());
}

#[tokio::test]
async fn lead_state_keeps_secrets_whose_key_is_missing() {
    let (mut stack, applied, callback, lead_id) = started().await;
    let old = secrets::SealingKeys::parse(SECRETS_KEY, []).expect("a key").present().to_string();

    stack.replace_lead_state(&[("SECRETS_KEY", NEXT_KEY)]).await;
    let rotated = stack.rotate().await;
    let spec = json!({"projectId": stack.api.project_id, "name": "sales", "states": applied.process.rules.states,
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/moved")}]});
    let spec: ProcessSpec = serde_json::from_value(spec).expect("a process");
    let changed = service_kit::rpc::request(&stack.client, &spec).await.map_err(RpcError::from);

    assert_eq!((rotated.resealed, rotated.locked.len()), (0, 1));
    assert!(rotated.locked[0].error.contains(&old), "{rotated:?}");
    assert_eq!(changed.expect_err("refused").code, "secrets_locked");
    stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    verify(request, callback.secrets[0].expose());
}

#[tokio::test]
async fn a_process_that_cannot_be_read_stops_no_rotation() {
    let (mut stack, _, _, _) = started().await;
    let insert = format!(
        r#"INSERT INTO lead_state.processes (project_id, name, process_id, config, revision)
           VALUES ('\x{}', 'broken', decode(repeat('0b', 12), 'hex'), '{{"name": 5}}', 0)"#,
        stack.api.project_id
    );
    stack.sql(&insert).await;
    stack.replace_notifier(&BOTH_KEYS).await;
    stack.replace_lead_state(&BOTH_KEYS).await;

    let rotated = stack.rotate().await;

    assert_eq!((rotated.resealed, rotated.remaining, rotated.locked.len()), (1, 0, 1), "{rotated:?}");
    assert_eq!((rotated.locked[0].process.as_str(), rotated.locked[0].callback_id), ("broken", None));
    stack.leadctl(&["secrets", "rotate"]).await.assert_fails("all callbacks and sources of \"broken\"");
}

//! Secrets at rest: sealed in Postgres and NATS, opened for the attempt alone, told by nobody; their keys can be rotated.

use std::{process::Command, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use contract::{
    process::ProcessSpec,
    rpc::{self, ProcessChangeResult, RotateSecrets, RotationResult},
    streams::PROCESSES,
};
use futures::TryStreamExt;
use serde_json::{Value, json};
use test_support::{Receiver, Reply, Service, binary, eventually, nats, postgres};

use crate::stack::{SECRETS_KEY, SOON, Stack, service, verify};

const NEXT_KEY: &str = "VGhlIG5leHQga2V5IG9mIHRoZSB0ZXN0cywgMzIgYnk=";

fn signing_secret(byte: u8) -> String {
    format!("whsec_{}", BASE64_STANDARD.encode([byte; 32]))
}

/// Every message of every stream and bucket, with its subject and headers, as one text.
async fn streams(stack: &Stack) -> String {
    let js = service_kit::nats::jetstream(&stack.client);
    let mut text = String::new();
    let mut streams = js.streams();
    while let Some(info) = streams.try_next().await.expect("a stream") {
        let stream = js.get_stream(&info.config.name).await.expect("a stream");
        for sequence in info.state.first_sequence..=info.state.last_sequence {
            // Purged ones are gone.
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

#[tokio::test]
async fn secrets_are_told_by_nobody() {
    let stack = Stack::start_with(&[("RUST_LOG", "debug"), ("RETRY_SCHEDULE", "0s,100ms")]).await;
    let (given, wrong) = (signing_secret(0xc1), signing_secret(0xc2));
    // An endpoint that echoes what it was sent, one that refuses to talk, one that is fine.
    let told = "the endpoint read bearer-of-the-test-88";
    stack.receiver.on("/echo", [Reply::status(500).body(told)]);
    stack.receiver.on("/silent", [Reply::drop_connection()]);
    let callbacks = json!([
        {"name": "fine", "url": stack.receiver.url("/fine"), "secrets": [given],
         "auth": {"type": "header", "name": "X-Api-Key", "value": "header-value-of-the-test-77"}},
        {"name": "echo", "url": stack.receiver.url("/echo"), "auth": {"type": "bearer", "token": "bearer-of-the-test-77"}},
        {"name": "silent", "url": stack.receiver.url("/silent")},
    ]);
    let applied = stack.process(callbacks.clone()).await;
    let made: Vec<_> = applied.process.callbacks[1..].iter().map(|one| one.secrets[0].expose().to_owned()).collect();
    assert_eq!((made.len(), applied.process.callbacks[0].secrets.len()), (2, 0), "what was given is not shown again");
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, Some("R")).await;

    // Applied again, changed, refused for each reason that there is.
    assert!(!stack.process(callbacks.clone()).await.changed, "the same is recognised through the seal");
    let mut other = callbacks.clone();
    other[1]["auth"]["token"] = json!("bearer-of-the-test-88");
    let changed = stack.process(other).await;
    assert_eq!(changed.changes, ["callback echo: auth changed"]);
    let spec = |change: fn(&mut Value), text: &str| {
        let mut spec = json!({"projectId": stack.api.project_id, "name": "sales", "states": [{"name": "new"}],
            "callbacks": [{"name": "echo", "url": "http://x", "secrets": [text],
                           "auth": {"type": "bearer", "token": text}}]});
        change(&mut spec);
        spec
    };
    let text = "refused-secret-of-the-test";
    let refused = [
        spec(|_| (), &format!("{text}\n")),
        spec(|spec| spec["callbacks"][0]["secrets"] = spec["callbacks"][0]["secrets"][0].take(), text),
        spec(|spec| spec["callbacks"][0]["auth"] = spec["callbacks"][0]["auth"]["token"].take(), text),
        spec(|spec| spec["callbacks"][0]["auth"]["type"] = spec["callbacks"][0]["auth"]["token"].take(), text),
        spec(|spec| spec["states"] = json!([]), &wrong),
    ];
    let directory = tempfile::tempdir().expect("a directory");
    for spec in &refused {
        let answer = service_kit::rpc::call::<_, ProcessChangeResult>(&stack.client, rpc::PROCESS_APPLY, spec).await;
        let answer = answer.expect_err("refused").to_string();
        let file = directory.path().join("process.json");
        std::fs::write(&file, spec.to_string()).expect("a file");
        let output = Command::new(binary("leadctl")).args(["process", "apply"]).arg(&file).output().expect("leadctl");
        assert!(!output.status.success());
        let said =
            format!("{answer} {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!said.contains(text) && !said.contains(&wrong), "{said}");
    }

    let mut updates = Vec::new();
    for state in ["interested", "nowhere", "lost"] {
        updates.push(stack.api.update(json!({"leadId": lead_id, "targetState": state})).await);
    }
    // Two attempts of each to those that fail, recorded.
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status <> 'pending'", 9, SOON * 2).await;
    let stories = updates.iter().map(async |update| stack.api.outcome(update).await.to_string());
    let stories = futures::future::join_all(stories).await.join("\n");
    assert!(stories.contains("the endpoint read ***"), "what an endpoint echoes is shown without it: {stories}");

    let (database, streams) = (dump(&stack), streams(&stack).await);
    // What is looked for could be found.
    assert!(
        database.contains("sealed:v1:") && database.contains(&lead_id) || database.contains("R-"),
        "a strange dump"
    );
    assert!(streams.contains("sealed:v1:") && streams.contains(&lead_id), "strange streams");
    let logs = [&stack.gateway, &stack.lead_state, &stack.notifier].map(Service::log);
    assert!(logs.iter().all(|log| log.contains("connected to NATS")));
    let file = |dir: &std::path::Path, name: &str| std::fs::read_to_string(dir.join(name)).expect(name);
    let servers = [file(stack.nats.dir(), "nats.log"), file(stack.postgres.dir(), "postgres.log")];
    let mut secrets = vec![
        given,
        wrong,
        text.to_owned(),
        "header-value-of-the-test-77".into(),
        "bearer-of-the-test-77".into(),
        "bearer-of-the-test-88".into(),
        SECRETS_KEY.into(),
        stack.api.key.clone(),
    ];
    secrets.extend(made);
    for secret in secrets.iter().map(|secret| secret.trim_start_matches("whsec_").trim_start_matches("lr_")) {
        for (place, text) in [("the database", &database), ("the streams", &streams), ("the stories", &stories)]
            .into_iter()
            .chain(logs.iter().chain(&servers).map(|log| ("a log", log)))
        {
            // Not with the text: a red test would tell as well.
            assert!(!text.contains(secret), "{secret} stands in {place}");
        }
    }
}

#[tokio::test]
async fn without_a_key_the_services_say_how_to_make_one() {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    for name in ["lead-state", "webhook-notifier"] {
        for (key, expected) in [("", "SECRETS_KEY is not set"), ("dG9vIHNob3J0", "is not a key")] {
            let (mut service, _) = service(name, &nats, &postgres, &[("SECRETS_KEY", key)]);
            let status = tokio::time::timeout(SOON, service.exited()).await.expect("it does not start");
            assert!(!status.success());
            let log = service.log();
            assert!(log.contains(expected) && log.contains("leadctl secrets new-key"), "{log}");
            assert!(key.is_empty() || !log.contains(key), "{log}");
        }
    }
    let made = Command::new(binary("leadctl")).args(["secrets", "new-key"]).output().expect("leadctl").stdout;
    assert_eq!(BASE64_STANDARD.decode(made.trim_ascii_end()).expect("base64").len(), 32);
}

#[tokio::test]
async fn what_an_older_version_stored_in_clear_is_sealed() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let secret = applied.process.callbacks[0].secrets[0].expose().to_owned();
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;

    // As an older version leaves it: in clear in both places, projected.
    let sealed: String = sqlx::query_scalar("SELECT config::text FROM lead_state.processes")
        .fetch_one(&stack.pool)
        .await
        .expect("a row");
    let mut clear: Value = serde_json::from_str(&sealed).expect("JSON");
    clear["callbacks"][0]["secrets"] = json!([secret]);
    let bucket = service_kit::nats::jetstream(&stack.client).get_key_value(PROCESSES).await.expect("the bucket");
    let key = contract::subject::process_key(stack.api.project_id, Some(process_id));
    stack.lead_state.terminate().await;
    sqlx::query("UPDATE lead_state.processes SET config = $1::json")
        .bind(clear.to_string())
        .execute(&stack.pool)
        .await
        .expect("an update");
    bucket.put(key.as_str(), clear.to_string().into()).await.expect("a put");
    stack.lead_state.restart().await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    verify(request, &secret);
    assert_eq!(request.json()["updateId"], update_id);
    eventually(SOON, "the secret is sealed in both places", async || {
        let entry = bucket.get(key.as_str()).await.expect("a get").expect("an entry");
        let places = [dump(&stack), String::from_utf8_lossy(&entry).into_owned()];
        places.iter().all(|text| text.contains("sealed:v1:") && !text.contains(&secret))
    })
    .await;
}

#[tokio::test]
async fn keys_rotate_under_load_and_every_webhook_verifies() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let secret = applied.process.callbacks[0].secrets[0].expose().to_owned();
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;
    let load = {
        let (api, lead_id) = (stack.api.clone(), lead_id.clone());
        let stop = tokio_util::sync::CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut sent = 0;
            while !stopped.is_cancelled() {
                api.update_stubbornly(&json!({"leadId": lead_id, "metadata": {"n": sent}})).await;
                sent += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            sent
        });
        (task, stop)
    };
    let both = [("SECRETS_KEY", NEXT_KEY), ("SECRETS_KEYS_OLD", SECRETS_KEY)];
    // The order that docs/operations/configuration.md gives: who opens before who seals.
    for (name, extra) in [("webhook-notifier", both), ("lead-state", both)] {
        let (mut next, ready) = service(name, &stack.nats, &stack.postgres, &extra);
        let before = if name == "lead-state" { &mut stack.lead_state } else { &mut stack.notifier };
        assert!(before.terminate().await.success());
        next.wait_for_http(&ready, SOON).await;
        *before = next;
    }
    let rotate = async || -> RotationResult { stack.call(rpc::SECRETS_ROTATE, &RotateSecrets {}).await };
    let first = rotate().await;
    assert_eq!((first.resealed, first.remaining, first.locked.len()), (1, 0, 0));
    // Whoever reads the bucket needs the old key no longer, either.
    let bucket = service_kit::nats::jetstream(&stack.client).get_key_value(PROCESSES).await.expect("the bucket");
    let key = contract::subject::process_key(stack.api.project_id, Some(process_id));
    let entry = bucket.get(key.as_str()).await.expect("a get").expect("an entry");
    let text = String::from_utf8_lossy(&entry);
    assert!(text.contains(&format!("sealed:v1:{}:", first.key_id)), "the rotation is projected");
    let again = rotate().await;
    assert_eq!((again.resealed, again.unchanged, again.key_id), (0, 1, first.key_id));
    let output = Command::new(binary("leadctl"))
        .args(["secrets", "rotate"])
        .env("NATS_URL", stack.nats.url())
        .output()
        .expect("leadctl");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("needed only to restore"), "{said}");

    // Now the old key can go.
    let (mut next, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &[("SECRETS_KEY", NEXT_KEY)]);
    assert!(stack.notifier.terminate().await.success());
    next.wait_for_http(&ready, SOON).await;
    stack.notifier = next;
    let seen = stack.receiver.requests().len();
    stack.receiver.wait_for_requests("/crm", seen + 10, SOON).await;
    load.1.cancel();
    let sent = load.0.await.expect("the load");
    let requests = stack.receiver.wait_for_requests("/crm", sent, SOON * 2).await;
    for request in &requests {
        verify(request, &secret);
    }
    assert_eq!(crate::stack::by_update(&requests).len(), sent);
}

#[tokio::test]
async fn deliveries_wait_for_a_key_that_is_not_there() {
    let mut stack = Stack::start().await;
    let other = Receiver::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let callback = &applied.process.callbacks[0];
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;
    assert!(stack.notifier.terminate().await.success());
    let (mut locked, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &[("SECRETS_KEY", NEXT_KEY)]);
    // It says so before anything is to be delivered, names callback and key, and is not ready.
    let line = locked.wait_for_log("cannot be opened", SOON).await;
    let old = secrets::SealingKeys::parse(SECRETS_KEY, []).expect("a key").present().to_string();
    assert!(
        line.contains(&callback.callback_id.to_string()) && line.contains(&old) && line.contains("ERROR"),
        "{line}"
    );
    eventually(SOON, "readiness shows it", async || {
        let answer = test_support::http_client().get(&ready).send().await.expect("an answer");
        let (status, body) = (answer.status().as_u16(), answer.text().await.expect("a body"));
        if status == 503 && body.contains("secrets") && body.contains(&old) { Ok(()) } else { Err(body) }
    })
    .await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;
    let waiting = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 0";
    stack.wait_for_count(waiting, 1, SOON).await;
    // Others are told meanwhile, and a lead-state without the key keeps what it cannot read.
    let (mut lead_state, lead_state_ready) =
        service("lead-state", &stack.nats, &stack.postgres, &[("SECRETS_KEY", NEXT_KEY)]);
    assert!(stack.lead_state.terminate().await.success());
    lead_state.wait_for_http(&lead_state_ready, SOON).await;
    stack.lead_state = lead_state;
    let rotated: RotationResult = stack.call(rpc::SECRETS_ROTATE, &RotateSecrets {}).await;
    assert_eq!((rotated.resealed, rotated.locked.len()), (0, 1));
    assert!(rotated.locked[0].error.contains(&old), "{rotated:?}");
    let fallback = stack.fallback_of(stack.api.project_id, json!([{"name": "f", "url": other.url("/f")}])).await;
    assert!(fallback.changed);
    let spec = json!({"projectId": stack.api.project_id, "name": "sales", "states": applied.process.rules.states,
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/moved")}]});
    let spec: ProcessSpec = serde_json::from_value(spec).expect("a process");
    let refused = service_kit::rpc::call::<_, ProcessChangeResult>(&stack.client, rpc::PROCESS_APPLY, &spec).await;
    assert_eq!(refused.expect_err("refused").code, "secrets_locked");
    stack.api.update(json!({"leadId": "0123456789abcdef01234567", "name": "x"})).await;
    other.wait_for_requests("/f", 1, SOON).await;
    assert!(stack.receiver.requests().is_empty());
    assert_eq!(locked.log().matches("cannot be opened").count(), 1, "said once: {}", locked.log());

    // The key comes back: what waited goes out, as its first attempt.
    assert!(locked.terminate().await.success());
    let both = [("SECRETS_KEY", NEXT_KEY), ("SECRETS_KEYS_OLD", SECRETS_KEY)];
    let (mut notifier, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &both);
    notifier.wait_for_http(&ready, SOON).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    assert_eq!(request.json()["updateId"], update_id);
    verify(request, callback.secrets[0].expose());
}

//! What the services say on NATS and to callbacks is what the schemas in `proto-schemas/` say: the protobuf, and the JSON Schemas.
//! And whoever verifies webhooks with the reference library of Standard Webhooks trusts them, also during a rotation.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::LazyLock,
};

use async_nats::HeaderMap;
use contract::{
    event::WebhookEvent,
    headers,
    key::{ApiKey, Scope},
    rpc::{self, CreateKey, GetRecovery, ListCallbacks, ListKeys, Recover, RecoveryKind, RecoveryStatus, RevokeKey},
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, WEBHOOK_EVENTS},
};
use futures::StreamExt;
use jsonschema::Validator;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage};
use reqwest::Method;
use serde_json::{Map, Value, json};
use test_support::eventually;

use crate::stack::{Api, SOON, Stack};

/// The schemas, as other languages would read them.
struct Schemas {
    protobuf: DescriptorPool,
    json: BTreeMap<String, Validator>,
    /// Of each query, by its subject, the messages of request and reply, as the AsyncAPI document has them.
    queries: BTreeMap<String, [String; 2]>,
    /// How many messages of each kind were checked.
    seen: BTreeMap<String, usize>,
}

impl Schemas {
    fn load() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto-schemas");
        let files = ["commands", "events", "config", "rpc"].map(|file| format!("leadrelay/v1/{file}.proto"));
        let files = protox::compile(files, [&dir]);
        let protobuf = DescriptorPool::from_file_descriptor_set(files.expect("protobuf")).expect("descriptors");
        let read = |path: &Path| -> Value {
            let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let validator = |schema: &Value| jsonschema::validator_for(schema).expect("a schema");
        let mut json = BTreeMap::new();
        for file in std::fs::read_dir(dir.join("json-schema")).expect("the schemas") {
            let path = file.expect("a file").path();
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            json.insert(name, validator(&read(&path)));
        }
        // Headers are described in the AsyncAPI document alone.
        let asyncapi = read(&dir.join("asyncapi.json"));
        for (name, schema) in asyncapi["components"]["schemas"].as_object().expect("schemas") {
            json.insert(name.clone(), validator(schema));
        }
        let mut queries = BTreeMap::new();
        for (name, operation) in asyncapi["operations"].as_object().expect("operations") {
            let message = |reference: &Value| reference["$ref"].as_str()?.rsplit('/').next().map(str::to_owned);
            let Some(reply) = message(&operation["reply"]["messages"][0]) else { continue };
            let subject = asyncapi["channels"][name]["address"].as_str().expect("a subject").to_owned();
            queries.insert(subject, [message(&operation["messages"][0]).expect("a request"), reply]);
        }
        Self { protobuf, json, queries, seen: BTreeMap::new() }
    }

    /// Reads it by its JSON Schema, which must know everything in it.
    fn check_json(&mut self, name: &str, value: &Value) {
        let validator = self.json.get(name).unwrap_or_else(|| panic!("no schema of {name}"));
        let faults: Vec<_> =
            validator.iter_errors(value).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
        assert!(faults.is_empty(), "{name} {value}: {faults:?}");
        *self.seen.entry(name.to_owned()).or_default() += 1;
    }

    /// Reads it by both schemas; the protobuf knows each of its fields.
    fn check(&mut self, name: &str, body: &[u8]) {
        let value: Value = serde_json::from_slice(body).expect("JSON");
        self.check_json(name, &value);
        let schema = self.protobuf.get_message_by_name(&format!("leadrelay.v1.{name}")).expect(name);
        let mut json = serde_json::Deserializer::from_slice(body);
        let options = DeserializeOptions::new().deny_unknown_fields(true);
        DynamicMessage::deserialize_with_options(schema, &mut json, &options)
            .unwrap_or_else(|e| panic!("{name} {value}: {e}"));
    }

    /// What a query was answered: a message, a list of them, or an error.
    fn check_reply(&mut self, subject: &str, map: &HeaderMap, body: &[u8]) {
        if map.get("Nats-Service-Error").is_some() {
            assert!(body.is_empty(), "{subject}");
            return self.check_json("ErrorHeaders", &object(map));
        }
        let [_, reply] = self.queries[subject].clone();
        match reply.strip_prefix("ListOf") {
            None => self.check(&reply, body),
            Some(item) => {
                let items: Vec<Box<serde_json::value::RawValue>> = serde_json::from_slice(body).expect("a list");
                items.iter().for_each(|one| self.check(item, one.get().as_bytes()));
            }
        }
        *self.seen.entry(subject.to_owned()).or_default() += 1;
    }

    /// All that was asked and answered, and all that was put into buckets.
    fn check_traffic(&mut self, traffic: &[async_nats::Message]) {
        let mut asked = BTreeMap::new();
        for message in traffic {
            let (subject, body) = (message.subject.as_str(), &message.payload);
            let none = HeaderMap::new();
            let headers = message.headers.as_ref().unwrap_or(&none);
            let tokens: Vec<_> = subject.split('.').collect();
            match tokens[..] {
                [_, "rpc", ..] => {
                    let [request, _] =
                        self.queries.get(subject).unwrap_or_else(|| panic!("no query {subject}")).clone();
                    self.check(&request, body);
                    asked.insert(message.reply.clone().expect("an inbox"), subject);
                }
                // What is removed has no value.
                ["$KV", ..] if body.is_empty() => {}
                ["$KV", "api_keys", _] => self.check("ApiKey", body),
                ["$KV", "processes", ..] => self.check("Process", body),
                ["$KV", "idempotency", ..] => self.check("IdempotencyRecord", body),
                ["$KV", ..] => panic!("an entry {subject}, of a bucket that nobody knows"),
                _ => {
                    if let Some(subject) = asked.remove(&message.subject) {
                        self.check_reply(subject, headers, body);
                    }
                }
            }
        }
        assert!(asked.is_empty(), "not answered: {asked:?}");
    }

    /// A message of a stream, by its subject: the grammar of `contract::subject`.
    fn check_message(&mut self, subject: &str, map: &HeaderMap, body: &[u8]) {
        let headers = object(map);
        let tokens: Vec<_> = subject.split('.').collect();
        match tokens[..] {
            ["leads", "cmd", _, "update"] => self.check("UpdateCommand", body),
            ["leads", "cmd", _, "call", "started"] => self.check("CallStarted", body),
            ["leads", "cmd", _, "call", "ended"] => self.check("CallEnded", body),
            ["leads", "cmd", _, "call", "expired"] => self.check("CallExpired", body),
            ["leads", "evt", _, _, "update", outcome] => {
                self.check("CompletionEvent", body);
                self.check_json("EventHeaders", &headers);
                *self.seen.entry(outcome.to_owned()).or_default() += 1;
            }
            ["webhooks", "evt", ..] => {
                self.check("WebhookEvent", body);
                let kind = match serde_json::from_slice(body).expect("an event") {
                    WebhookEvent::Exhausted { .. } => "exhausted",
                    WebhookEvent::CallbackDisabled { .. } => "callback disabled",
                };
                *self.seen.entry(kind.to_owned()).or_default() += 1;
            }
            ["leads", "dead", "replayed", _] => self.check_json("ReplayNoteHeaders", &headers),
            ["leads", "dead", _] => self.check_json("DeadLetterHeaders", &headers),
            _ => panic!("a message on {subject}, which the grammar does not know"),
        }
    }
}

/// Headers, as their schemas see them.
fn object(map: &HeaderMap) -> Value {
    let headers: Map<_, _> =
        map.iter().filter_map(|(name, values)| Some((name.to_string(), json!(values.first()?.as_str())))).collect();
    Value::Object(headers)
}

/// Asks every query that there is, through the gateway where it asks it, and answers that are refused among them.
async fn ask_everything(stack: &Stack, process_id: &str, lead: &str, first: &str, exhausted: &str) {
    let api = &stack.api;
    let ok = |(status, answer): (u16, Value)| {
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let project_id = api.project_id;
    let other = Api::create(api.url.clone(), &stack.client, "other").await;
    ok(api.get(&format!("/api/v1/leads/get?leadId={lead}")).await);
    ok(api.get("/api/v1/leads?limit=1").await);
    ok(api.get(&format!("/api/v1/leads/{lead}/updates?limit=2")).await);
    assert_eq!(other.get(&format!("/api/v1/leads/get?leadId={lead}")).await.0, 404);
    ok(api.post("/api/v1/leads/update", &json!({"leadId": lead, "name": "Eve", "dryRun": true})).await);
    let once = [("idempotency-key", "once")];
    ok(api.ask(Method::POST, "/api/v1/leads/update", &once, &json!({"leadId": lead, "name": "Eve"})).await);

    let listed = ok(api.get("/api/v1/deliveries?limit=2").await);
    let delivery = listed["data"][0]["deliveryId"].as_str().expect("an id");
    ok(api.get(&format!("/api/v1/deliveries/{delivery}")).await);
    ok(api.post(&format!("/api/v1/deliveries/{exhausted}/redeliver"), &json!({})).await);
    let all = json!({"since": "2026-01-01T00:00:00Z", "status": "delivered", "perSecond": 100});
    ok(api.post("/api/v1/deliveries/recover", &all).await);

    let process = format!("/api/v1/processes/{process_id}");
    ok(api.get("/api/v1/processes?limit=1").await);
    let mut spec = ok(api.get(&process).await)["data"].clone();
    spec["transitions"] = json!({"new": ["interested", "lost"], "interested": []});
    spec["states"][1]["takesDisposition"] = json!(true);
    spec["callbacks"][0]["auth"] = json!({"type": "header", "name": "X-Key", "value": "v"});
    spec["callbacks"][0]["maxPerSecond"] = json!(1000);
    spec["duringCall"] = json!("queue");
    ok(api.ask(Method::PUT, &process, &[], &spec).await);
    assert_eq!(api.ask(Method::PUT, &process, &[("if-match", "\"0\"")], &spec).await.0, 412);
    let new = json!({"name": "more", "url": stack.receiver.url("/more"), "auth": {"type": "bearer", "token": "t"},
        "events": ["update.failed"], "ordering": "lead"});
    let made = ok(api.post(&format!("{process}/callbacks"), &new).await);
    let callback = format!("{process}/callbacks/{}", made["data"]["callbackId"].as_str().expect("an id"));
    ok(api.ask(Method::PUT, &callback, &[], &new).await);
    ok(api.post(&format!("{callback}/rotate-secret"), &json!({"overlapSeconds": 60})).await);
    ok(api.post(&format!("{callback}/test"), &json!({})).await);
    ok(api.post(&format!("{callback}/enable"), &json!({})).await);
    ok(api.get(&process).await);
    ok(api.ask(Method::DELETE, &callback, &[], &json!({})).await);

    // What only operators ask.
    let create = CreateKey {
        project_id,
        name: "short".into(),
        sha256: secrets::api_key::hash("short"),
        scopes: [Scope::LeadsRead].into(),
        expires_at: Some(contract::Timestamp::from_millis(1)),
    };
    let key: ApiKey = stack.call(rpc::KEY_CREATE, &create).await;
    let _: ApiKey = stack.call(rpc::KEY_REVOKE, &RevokeKey { key_id: key.key_id }).await;
    let _: rpc::Keys = stack.call(rpc::KEY_LIST, &ListKeys { project_id }).await;
    let _: Vec<rpc::CallbackStatus> = stack.call(rpc::CALLBACK_LIST, &ListCallbacks { project_id }).await;
    let _: rpc::RotationResult = stack.call(rpc::SECRETS_ROTATE, &rpc::RotateSecrets {}).await;
    stack.wait_until_applied().await;
    let now: RecoveryStatus = stack.call(rpc::RECOVERY_GET, &GetRecovery {}).await;
    let RecoveryStatus { generation, applied, .. } = now;
    let since = Some(contract::Timestamp::from_millis(0));
    let recover = Recover { kind: RecoveryKind::Reannounce, since, generation, applied };
    let _: RecoveryStatus = stack.call(rpc::RECOVERY_RECOVER, &recover).await;
    let story = ok(api.get(&format!("/api/v1/updates/{first}")).await);
    assert!(story["data"]["deliveries"].is_array(), "{story}");
}

/// Every message of a stream, in order.
async fn messages(stack: &Stack, stream: &str) -> Vec<async_nats::jetstream::message::StreamMessage> {
    let js = service_kit::nats::jetstream(&stack.client);
    let mut stream = js.get_stream(stream).await.expect("the stream");
    let state = stream.info().await.expect("its state").state.clone();
    let mut all = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        all.push(stream.get_raw_message(sequence).await.expect("a message"));
    }
    all
}

#[tokio::test]
async fn every_message_is_what_the_schemas_say() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms")]).await;
    let mut traffic = stack.client.subscribe(">").await.expect("a subscription");
    stack.client.flush().await.expect("it is in force");
    stack.receiver.on("/away", vec![500; 100]);
    stack.receiver.on("/gone", [410]);
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm")},
            {"name": "away", "url": stack.receiver.url("/away"), "events": ["update.failed"]},
        ]))
        .await;
    stack.fallback_of(stack.api.project_id, json!([{"name": "gone", "url": stack.receiver.url("/gone")}])).await;
    let (project_id, process_id) = (stack.api.project_id, applied.process.process_id.expect("an id"));
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    let subject = |what: &str| format!("leads.cmd.{project_id}.{what}");

    // Applied, with everything that an update can have.
    let whole = json!({
        "leadId": lead, "referenceId": "R-1", "projectId": project_id, "processId": process_id, "name": "Ada",
        "targetState": "interested", "disposition": "hot", "userId": "u-1", "expectedVersion": 1, "expectedState": "new",
        "metadata": {"n": 7, "deep": [null, {"a": true}], "text": "é"},
    });
    let first = stack.api.update(whole).await;
    stack.api.outcome(&first).await;
    // Refused, with a lead and without one; and one that is applied with a warning.
    let refused = stack.api.update(json!({"leadId": lead, "targetState": "nowhere"})).await;
    let unknown = stack.api.update(json!({"leadId": "65e4b2d9f1a2000000000001", "name": "x"})).await;
    let warned = stack.api.update(json!({"leadId": lead, "targetState": "followup_2", "disposition": "x"})).await;
    // Internal producers: calls, an update without an id, and what cannot be applied.
    stack
        .publish(subject("call.started"), json!({"leadId": lead, "callId": "c-1", "timeoutSeconds": 60}).to_string())
        .await;
    stack.publish(subject("call.ended"), json!({"referenceId": "R-1", "processId": process_id}).to_string()).await;
    stack.publish(subject("update"), json!({"leadId": lead, "metadata": {"a": 1}}).to_string()).await;
    let letters = stack.dead_letters().await;
    let at_home = stack.wait_until_applied().await;
    stack.publish(subject("update"), "not JSON").await;
    stack.publish(subject("update"), r#"{"leadId":7}"#).await;
    stack.publish(subject("call.ended"), r#"{"leadId":"65e4b2d9f1a2000000000001"}"#).await;
    stack.publish(subject("nonsense"), "{}").await;
    let js = service_kit::nats::jetstream(&stack.client);
    eventually(SOON, "the dead letters", async || {
        let count = stack.dead_letters().await - letters;
        if count == 4 { Ok(()) } else { Err(format!("{count}")) }
    })
    .await;
    eventually(SOON, "a delivery is exhausted, and a callback disabled", async || {
        let mut stream = js.get_stream(WEBHOOK_EVENTS).await.map_err(|e| e.to_string())?;
        let count = stream.info().await.map_err(|e| e.to_string())?.state.messages;
        if count >= 2 { Ok(()) } else { Err(format!("{count}")) }
    })
    .await;
    for update in [&refused, &unknown, &warned] {
        stack.api.outcome(update).await;
    }
    stack.receiver.wait_for_requests("/crm", 4, SOON).await;
    let exhausted = eventually(SOON, "a delivery is exhausted", async || {
        let (_, listed) = stack.api.get("/api/v1/deliveries?status=exhausted").await;
        let away = listed["data"].as_array().into_iter().flatten().find(|one| one["processId"] == json!(process_id));
        away.and_then(|one| one["deliveryId"].as_str().map(str::to_owned)).ok_or(listed.to_string())
    })
    .await;
    ask_everything(&stack, &process_id.to_string(), &lead, &first, &exhausted).await;

    let mut schemas = Schemas::load();
    // All that was said so far stands before what is said now.
    stack.client.publish("end.of.test", "".into()).await.expect("a publish");
    let mut said = Vec::new();
    while let Some(message) = traffic.next().await
        && message.subject.as_str() != "end.of.test"
    {
        said.push(message);
    }
    schemas.check_traffic(&said);
    let asked: Vec<_> = schemas.queries.keys().cloned().collect();
    assert!(asked.len() > 25, "{asked:?}");
    for subject in asked {
        assert!(schemas.seen.contains_key(&subject), "nobody was told anything by {subject}");
    }
    // What came after is not what the services emit, and on purpose no command.
    for message in messages(&stack, LEAD_COMMANDS).await.into_iter().filter(|message| message.sequence <= at_home) {
        schemas.check_message(&message.subject, &message.headers, &message.payload);
    }
    for stream in [LEAD_EVENTS, WEBHOOK_EVENTS, LEAD_DEAD_LETTERS] {
        for message in messages(&stack, stream).await {
            schemas.check_message(&message.subject, &message.headers, &message.payload);
        }
    }
    for request in stack.receiver.requests() {
        let ping = request.json()["action_type"] == "test";
        schemas.check(if ping { "TestPayload" } else { "WebhookPayload" }, &request.body);
    }

    // Nothing passes because it was not there.
    for (kind, least) in [
        ("UpdateCommand", 5),
        ("CallStarted", 1),
        ("CallEnded", 1),
        ("succeeded", 3),
        ("failed", 2),
        ("exhausted", 1),
        ("callback disabled", 1),
        ("DeadLetterHeaders", 4),
        ("WebhookPayload", 6),
        ("TestPayload", 1),
        ("ErrorHeaders", 2),
        ("Process", 5),
        ("ApiKey", 5),
        ("IdempotencyRecord", 1),
    ] {
        let seen = schemas.seen.get(kind).copied().unwrap_or_default();
        assert!(seen >= least, "{seen} of {kind}: {:?}", schemas.seen);
    }
    let trace = |message: &async_nats::jetstream::message::StreamMessage| {
        message.headers.get(headers::TRACEPARENT).map(|value| value.as_str().to_owned())
    };
    assert!(messages(&stack, LEAD_COMMANDS).await.first().and_then(trace).is_some());
}

#[tokio::test]
async fn the_reference_library_verifies_webhooks_also_during_a_rotation() {
    let stack = Stack::start().await;
    let [old, new] = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"];
    let mut lead = String::new();
    for (round, secrets) in [vec![old], vec![new, old], vec![new]].into_iter().enumerate() {
        let callback = json!({"name": "crm", "url": stack.receiver.url("/crm"), "secrets": secrets});
        let applied = stack.process(json!([callback])).await;
        if lead.is_empty() {
            lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
        }
        // The notifier takes over what was applied a moment later.
        let request = eventually(SOON, "webhooks are signed with these secrets", async || {
            let before = stack.receiver.requests_to("/crm").len();
            stack.api.update(json!({"leadId": lead, "metadata": {"round": round, "text": "é"}})).await;
            let request = stack.receiver.wait_for_requests("/crm", before + 1, SOON).await.swap_remove(before);
            let signatures = request.header("webhook-signature").expect("a signature").split(' ').count();
            let trusted = verified(secrets[0], &request).is_ok();
            if signatures == secrets.len() && trusted { Ok(request) } else { Err(format!("{signatures}, {trusted}")) }
        })
        .await;
        for secret in [old, new] {
            let verified = verified(secret, &request);
            assert_eq!(verified.is_ok(), secrets.contains(&secret), "round {round}: {verified:?}");
        }
        let mut forged = request.clone();
        forged.body = request.body.iter().copied().chain(*b" ").collect();
        assert!(verified(secrets[0], &forged).is_err(), "a body that was changed");
    }
}

/// As a receiver in Rust would do it.
fn verified(secret: &str, request: &test_support::Request) -> Result<(), String> {
    let webhook = standardwebhooks::Webhook::new(secret).map_err(|e| e.to_string())?;
    webhook.verify(&request.body, &request.headers).map_err(|e| e.to_string())
}

/// The sources of the services, without their tests.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, sources: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                let code = code.split("#[cfg(test)]\npub(crate) mod tests").next().unwrap_or_default();
                sources.push((path.display().to_string(), code.to_owned()));
            }
        }
    }
    let mut sources = Vec::new();
    for name in ["contract", "service-kit", "gateway", "lead-state", "webhook-notifier"] {
        walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates").join(name).join("src"), &mut sources);
    }
    sources
}

static ERRORS: LazyLock<String> = LazyLock::new(|| {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ERRORS.md");
    std::fs::read_to_string(file).expect("docs/ERRORS.md")
});

/// The rows of the one table of codes: kind, status where it has one, and code or warning.
fn table() -> BTreeSet<[&'static str; 3]> {
    let row = |line: &'static str| {
        let cells: Vec<_> = line.strip_prefix("| ")?.strip_suffix(" |")?.split('|').map(str::trim).collect();
        let [kind, status, code, when, what_to_do] = cells[..] else { return None };
        let code = code.strip_prefix('`')?.strip_suffix('`')?;
        assert!(!when.is_empty() && !what_to_do.is_empty(), "{line}");
        Some([kind, status, code])
    };
    let rows: Vec<_> = ERRORS.lines().filter_map(row).collect();
    let table: BTreeSet<_> = rows.iter().copied().collect();
    assert_eq!(table.len(), rows.len(), "a row of docs/ERRORS.md stands twice");
    table
}

/// The codes of a kind.
fn of_kind(kind: &str) -> BTreeSet<String> {
    table().into_iter().filter(|row| row[0] == kind).map(|[_, _, code]| code.to_owned()).collect()
}

/// What stands behind `before` up to the next of `end`, wherever that is.
fn behind<'a>(text: &'a str, before: &str, end: char) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| Some(rest.split_once(end)?.0)).collect()
}

/// The source of this file of a service.
fn source(sources: &[(String, String)], file: &str) -> String {
    let found = sources.iter().find(|(path, _)| path.ends_with(file));
    found.unwrap_or_else(|| panic!("no {file}")).1.clone()
}

#[test]
fn every_code_is_in_the_table_and_no_other() {
    let sources = sources();
    let table = table();
    let mut kinds: Vec<_> = table.iter().map(|row| row[0]).collect();
    kinds.dedup();
    assert_eq!(kinds, ["HTTP", "NATS", "dead letter", "failed update", "halted", "warning"]);

    // Refusals, over HTTP and over NATS. (The gateway's own are held against the table by its own tests.)
    let mut count = 0;
    for (file, text) in &sources {
        for arguments in behind(text, "RpcError::new(", ')') {
            let mut parts = arguments.split(',').map(str::trim);
            let (Some(status), Some(code)) = (parts.next(), parts.next()) else { continue };
            let Some(code) = code.strip_prefix('"').and_then(|code| code.strip_suffix('"')) else { continue };
            let told = ["HTTP", "NATS"].iter().any(|kind| table.contains(&[kind, status, code]));
            assert!(
                told,
                "{file}: {status} {code} has no row: of kind HTTP if clients of the gateway may see it, else NATS"
            );
            count += 1;
        }
    }
    assert!(count > 40, "only {count} were found: the sources are written in another way, and this test is of no use");
    let all: String = sources.iter().map(|(_, text)| text.as_str()).collect();
    for [_, status, code] in table.iter().filter(|row| matches!(row[0], "HTTP" | "NATS")) {
        assert!(status.parse::<u16>().is_ok(), "{code} has no status");
        assert!(all.contains(&format!("\"{code}\"")), "{code} is in docs/ERRORS.md, and nowhere in the code");
    }

    let decide = source(&sources, "lead-state/src/core/decide.rs");
    let refusals = decide.split("pub const fn code(").nth(1).and_then(|rest| rest.split("\n    }\n").next());
    let refusals = behind(refusals.expect("the codes of refusals"), "=> \"", '"');
    assert_eq!(of_kind("failed update"), refusals.into_iter().map(str::to_owned).collect());
    let reasons = contract::subject::DeadLetterReason::ALL.map(|reason| reason.as_str().to_owned());
    assert_eq!(of_kind("dead letter"), reasons.into());
    let recovery = source(&sources, "lead-state/src/recovery/diagnose.rs");
    let reasons = behind(&recovery, "return halted(\"", '"');
    assert_eq!(of_kind("halted"), reasons.into_iter().map(str::to_owned).collect());
}

#[test]
fn every_warning_is_in_the_table() {
    // `{}` and what stands in it is a value.
    let plain = |literal: &str| {
        let mut parts = literal.split('{');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            text.push('…');
            text.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
        }
        text.replace("……", "…")
    };
    let told = of_kind("warning");
    let sources = sources();
    let mut given = BTreeSet::new();
    for (file, text) in &sources {
        // However the lines are broken.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace("( ", "(");
        let reasons = behind(&text, "ignore_rest(\"", '"').into_iter().map(|why| format!("ignored {why}: …"));
        let mut warnings: Vec<_> = reasons.collect();
        for call in ["warnings.push(\"", "warnings.push(format!(\""] {
            warnings.extend(behind(&text, call, '"').into_iter().map(plain));
        }
        // All that `ignore_rest` says, without its reason.
        for warning in warnings.into_iter().filter(|warning| warning != "ignored …: …") {
            assert!(told.contains(&warning), "{file}: docs/ERRORS.md has no row of the warning `{warning}`");
            given.insert(warning);
        }
    }
    assert!(
        given.len() > 8,
        "only {given:?} were found: the sources are written in another way, and this test is of no use"
    );
    // Those that are put together elsewhere, by the longest of their words.
    for warning in told.difference(&given) {
        let parts = warning.trim_start_matches("ignored ").split('…').map(|part| part.trim_matches([' ', ':']));
        let part = parts.max_by_key(|part| part.len()).unwrap_or_default();
        assert!(
            sources.iter().any(|(_, text)| text.contains(part)),
            "{warning} is in docs/ERRORS.md, and nowhere given"
        );
    }
}

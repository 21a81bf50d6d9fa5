//! Every message on NATS and every webhook conforms to the schemas in `proto-schemas/`: the protobuf and the JSON
//! Schemas.

use std::{collections::BTreeMap, path::Path};

use async_nats::{HeaderMap, jetstream::message::StreamMessage};
use bytes::Bytes;
use contract::{
    ObjectId,
    event::WebhookEvent,
    headers, pack,
    rpc::{self, CreateKey, GetRecovery, ListCallbacks, ListKeys, Recover, RecoveryKind, RecoveryStatus, RevokeKey},
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, WEBHOOK_EVENTS},
};
use futures::StreamExt;
use jsonschema::Validator;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage};
use reqwest::Method;
use serde_json::{Map, Value, json};
use test_support::eventually;

use crate::support::{Api, Stack, TEST_TIMEOUT, UPDATE, assert_ok, create_key, process_id, send};

/// The schemas in the form that programs in other languages read.
struct Schemas {
    protobuf: DescriptorPool,
    json: BTreeMap<String, Validator>,
    /// The messages of request and reply of each query, by subject, from the AsyncAPI document.
    queries: BTreeMap<String, [String; 2]>,
    /// The number of checked messages of each kind.
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
        // Only the AsyncAPI document describes headers.
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

    /// Checks a value against its JSON Schema, which must describe every field of the value.
    fn check_json(&mut self, name: &str, value: &Value) {
        let validator = self.json.get(name).unwrap_or_else(|| panic!("no schema of {name}"));
        let faults: Vec<_> =
            validator.iter_errors(value).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
        assert!(faults.is_empty(), "{name} {value}: {faults:?}");
        *self.seen.entry(name.to_owned()).or_default() += 1;
    }

    /// Checks a body against both schemas.
    fn check(&mut self, name: &str, body: &[u8]) {
        let value: Value = serde_json::from_slice(body).expect("JSON");
        self.check_json(name, &value);
        let schema = self.protobuf.get_message_by_name(&format!("leadrelay.v1.{name}")).expect(name);
        let mut json = serde_json::Deserializer::from_slice(body);
        let options = DeserializeOptions::new().deny_unknown_fields(true);
        DynamicMessage::deserialize_with_options(schema, &mut json, &options)
            .unwrap_or_else(|e| panic!("{name} {value}: {e}"));
    }

    /// Checks the reply to a query: a message, a list of messages, or an error.
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

    /// Checks all queries, their replies, and all entries of buckets.
    fn check_traffic(&mut self, traffic: &[async_nats::Message]) {
        let mut queries = BTreeMap::new();
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
                    queries.insert(message.reply.clone().expect("an inbox"), subject);
                }
                // An entry that was removed has no value.
                ["$KV", ..] if body.is_empty() => {}
                ["$KV", "api_keys", _] => self.check("ApiKey", body),
                ["$KV", "processes", ..] => self.check("Process", body),
                ["$KV", "idempotency", ..] => self.check("IdempotencyRecord", body),
                ["$KV", ..] => panic!("an entry {subject} of an unknown bucket"),
                _ => {
                    if let Some(subject) = queries.remove(&message.subject) {
                        self.check_reply(subject, headers, body);
                    }
                }
            }
        }
        assert!(queries.is_empty(), "not answered: {queries:?}");
    }

    /// Checks a message of a stream by its subject, in the grammar of `contract::subject`.
    fn check_message(&mut self, subject: &str, map: &HeaderMap, body: &[u8]) {
        let headers = object(map);
        let tokens: Vec<_> = subject.split('.').collect();
        match tokens[..] {
            ["leads", "cmd", _, "update"] => self.check("UpdateCommand", body),
            ["leads", "cmd", _, "call", "started"] => self.check("CallStarted", body),
            ["leads", "cmd", _, "call", "ended"] => self.check("CallEnded", body),
            ["leads", "cmd", _, "call", "expired"] => self.check("CallExpired", body),
            ["leads", "cmd", _, "lead", "created"] => self.check("LeadCreated", body),
            ["leads", "cmd", "pack"] => {
                self.check("CommandPack", body);
                for command in pack::read(&Bytes::copy_from_slice(body)).expect("a pack") {
                    self.check_message(&command.subject, &HeaderMap::new(), &command.payload);
                }
            }
            ["leads", "evt", _, _, "update", outcome] | ["leads", "evt", _, _, "call" | "lead", _, outcome] => {
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
            _ => panic!("a message on {subject}, which the grammar does not have"),
        }
    }
}

/// Headers as a JSON object.
fn object(map: &HeaderMap) -> Value {
    let headers: Map<_, _> =
        map.iter().filter_map(|(name, values)| Some((name.to_string(), json!(values.first()?.as_str())))).collect();
    Value::Object(headers)
}

/// Sends every query, through the gateway if the gateway can send it. The replies include successes and errors.
async fn send_every_query(stack: &Stack, process_id: &str, lead: &str, first: &str, exhausted: &str) {
    let api = &stack.api;
    let other = Api::create(api.url.clone(), &stack.client, "other").await;
    assert_ok(api.get(&format!("/api/v1/leads/get?leadId={lead}")).await);
    assert_ok(api.get("/api/v1/leads?limit=1").await);
    assert_ok(api.get("/api/v1/calls").await);
    assert_ok(api.get("/api/v1/stats?by=process").await);
    let day = json!({"start": 1_768_176_000_000_u64, "end": 1_768_262_400_000_u64, "includeUniqueLeads": true});
    assert_ok(api.post("/api/v1/analytics/customer/stats", &day).await);
    assert_ok(api.get(&format!("/api/v1/leads/{lead}/updates?limit=2")).await);
    assert_eq!(other.get(&format!("/api/v1/leads/get?leadId={lead}")).await.0, 404);
    assert_ok(api.post(&format!("{UPDATE}?dryRun=true"), &json!({"leadId": lead, "name": "Eve"})).await);
    let once = [("idempotency-key", "once")];
    assert_ok(api.ask(Method::POST, UPDATE, &once, &json!({"leadId": lead, "name": "Eve"})).await);

    assert_ok(api.get("/api/v1/updates?limit=2").await);
    let listed = assert_ok(api.get("/api/v1/deliveries?limit=2").await);
    let delivery = listed["data"][0]["deliveryId"].as_str().expect("an id");
    assert_ok(api.get(&format!("/api/v1/deliveries/{delivery}")).await);
    assert_ok(api.post(&format!("/api/v1/deliveries/{exhausted}/redeliver"), &json!({})).await);
    let all = json!({"since": "2026-01-01T00:00:00Z", "status": "delivered", "perSecond": 100});
    assert_ok(api.post("/api/v1/deliveries/recover", &all).await);

    let process = format!("/api/v1/processes/{process_id}");
    assert_ok(api.get("/api/v1/processes?limit=1").await);
    let mut spec = assert_ok(api.get(&process).await)["data"].clone();
    spec["transitions"] = json!({"new": ["interested", "lost"], "interested": []});
    spec["states"][1]["takesDisposition"] = json!(true);
    spec["callbacks"][0]["auth"] = json!({"type": "header", "name": "X-Key", "value": "v"});
    spec["callbacks"][0]["maxPerSecond"] = json!(1000);
    spec["duringCall"] = json!("queue");
    assert_ok(api.ask(Method::PUT, &process, &[], &spec).await);
    assert_eq!(api.ask(Method::PUT, &process, &[("if-match", "\"0\"")], &spec).await.0, 412);
    let new = json!({"name": "more", "url": stack.receiver.url("/more"), "auth": {"type": "bearer", "token": "t"},
        "events": ["update.failed"], "ordering": "lead"});
    let created = assert_ok(api.post(&format!("{process}/callbacks"), &new).await);
    let callback = format!("{process}/callbacks/{}", created["data"]["callbackId"].as_str().expect("an id"));
    assert_ok(api.ask(Method::PUT, &callback, &[], &new).await);
    assert_ok(api.post(&format!("{callback}/rotate-secret"), &json!({"overlapSeconds": 60})).await);
    assert_ok(api.post(&format!("{callback}/test"), &json!({})).await);
    assert_ok(api.post(&format!("{callback}/enable"), &json!({})).await);
    assert_ok(api.post(&format!("{callback}/pause"), &json!({})).await);
    assert_ok(api.post(&format!("{callback}/resume"), &json!({})).await);
    let past = json!({"since": "2026-01-01T00:00:00Z", "dryRun": true});
    assert_ok(api.post(&format!("{callback}/backfill"), &past).await);
    assert_ok(api.get(&process).await);
    let failing = exhausted.split('-').nth(1).expect("the id of a callback");
    let failures = assert_ok(api.get(&format!("{process}/callbacks/{failing}/failures")).await);
    assert_ne!(failures["data"]["groups"], json!([]));
    assert_ok(api.ask(Method::DELETE, &callback, &[], &json!({})).await);
    report_a_call(stack, &process).await;
    send_operators_queries(stack).await;
    let timeline = assert_ok(api.get(&format!("/api/v1/updates/{first}")).await);
    assert!(timeline["data"]["deliveries"].is_array(), "{timeline}");
}

/// Configures a source of call reports, and sends a report.
async fn report_a_call(stack: &Stack, process: &str) {
    let (api, secret) = (&stack.api, "the-secret-of-the-platform");
    let source = json!({"name": "dialer", "platform": "vapi", "secrets": [secret]});
    let created = assert_ok(api.post(&format!("{process}/sources"), &source).await);
    let path = format!("{process}/sources/{}", created["data"]["sourceId"].as_str().expect("an id"));
    assert_ok(api.ask(Method::PUT, &path, &[], &source).await);
    let url = format!("{}{}", api.url, created["data"]["ingestPath"].as_str().expect("a path"));
    eventually(TEST_TIMEOUT, "the source is known", async || {
        let report = api.http.post(&url).header("x-vapi-signature", "ab").header("x-vapi-secret", secret);
        let refused = send(report.body("{}")).await;
        let report = api.http.post(&url).header("x-vapi-secret", secret).body(r#"{"message":{"type":"transcript"}}"#);
        let answer = send(report).await;
        if (refused.0, answer.0) == (401, 200) { Ok(()) } else { Err(format!("{refused:?} {answer:?}")) }
    })
    .await;
    assert_ok(api.ask(Method::DELETE, &path, &[], &json!({})).await);
}

/// Sends the queries that only operators send.
async fn send_operators_queries(stack: &Stack) {
    let project_id = stack.api.project_id;
    let create = create_key(project_id, "short", "short");
    let key = stack.call(&CreateKey { expires_at: Some(contract::Timestamp::from_millis(1)), ..create }).await;
    stack.call(&RevokeKey { key_id: key.key_id, project_id: Some(project_id) }).await;
    stack.call(&ListKeys::of_project(project_id)).await;
    stack.call(&rpc::GetLag {}).await;
    stack.call(&ListCallbacks { project_id, details: true }).await;
    stack.call(&rpc::RotateSecrets::default()).await;
    stack.wait_until_applied().await;
    let RecoveryStatus { generation, applied, .. } = stack.call(&GetRecovery {}).await;
    let since = Some(contract::Timestamp::from_millis(0));
    let recover = Recover { kind: RecoveryKind::Reannounce, since, generation, applied };
    stack.call(&recover).await;
}

/// All messages of a stream, in order.
async fn messages(stack: &Stack, stream: &str) -> Vec<StreamMessage> {
    let stream = stack.js().get_stream(stream).await.expect("the stream");
    let state = &stream.cached_info().state;
    let mut all = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        all.push(stream.get_raw_message(sequence).await.expect("a message"));
    }
    all
}

/// Sends commands of every kind; the last ones become dead letters. Returns the id of the first update, and the last
/// sequence in the log before the dead letters.
async fn send_every_command(stack: &Stack, process_id: ObjectId, lead: &str) -> (String, u64) {
    // This update has every possible field.
    let whole = json!({
        "leadId": lead, "referenceId": "R-1", "projectId": stack.api.project_id, "processId": process_id, "name": "Ada",
        "targetState": "interested", "disposition": "hot", "userId": "u-1",
        "metadata": {"n": 7, "deep": [null, {"a": true}], "text": "é"},
    });
    let expecting = [("if-match", "\"1\"")];
    let first = stack.api.ask(Method::POST, &format!("{UPDATE}?expectedState=new"), &expecting, &whole).await;
    let first = assert_ok(first)["updateId"].as_str().expect("an id").to_owned();
    // The first two updates fail, one with a lead and one without. The third is applied with a warning.
    for body in [
        json!({"leadId": lead, "targetState": "nowhere"}),
        json!({"leadId": "65e4b2d9f1a2000000000001", "name": "x"}),
        json!({"leadId": lead, "targetState": "followup_2", "disposition": "x"}),
    ] {
        stack.api.update_and_wait(body).await;
    }
    stack.publish_call("started", &json!({"leadId": lead, "callId": "c-1", "timeoutSeconds": 60})).await;
    stack.publish_call("ended", &json!({"referenceId": "R-1", "processId": process_id})).await;
    stack.publish_update(&json!({"leadId": lead, "metadata": {"a": 1}})).await;
    let (letters, valid) = (stack.dead_letters().await, stack.wait_until_applied().await);
    let subject = |what: &str| format!("leads.cmd.{}.{what}", stack.api.project_id);
    stack.publish(subject("update"), "not JSON").await;
    stack.publish(subject("update"), r#"{"leadId":7}"#).await;
    stack.publish(subject("call.expired"), r#"{"leadId":"65e4b2d9f1a2000000000001"}"#).await;
    stack.publish(subject("nonsense"), "{}").await;
    eventually(TEST_TIMEOUT, "the dead letters", async || {
        let count = stack.dead_letters().await - letters;
        if count == 4 { Ok(()) } else { Err(count) }
    })
    .await;
    (first, valid)
}

/// Waits until a delivery of a process is exhausted and a callback is disabled, and returns the delivery's id.
async fn wait_for_webhook_events(stack: &Stack, process_id: ObjectId) -> String {
    eventually(TEST_TIMEOUT, "a delivery is exhausted, and a callback disabled", async || {
        let count = stack.stream_state(WEBHOOK_EVENTS).await.messages;
        if count >= 2 { Ok(()) } else { Err(count) }
    })
    .await;
    eventually(TEST_TIMEOUT, "a delivery is exhausted", async || {
        let (_, listed) = stack.api.get("/api/v1/deliveries?status=exhausted").await;
        let away = listed["data"].as_array().into_iter().flatten().find(|one| one["processId"] == json!(process_id));
        away.and_then(|one| one["deliveryId"].as_str().map(str::to_owned)).ok_or(listed.to_string())
    })
    .await
}

#[tokio::test]
async fn every_message_conforms_to_its_schemas() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms")]).await;
    let mut traffic = stack.client.subscribe(">").await.expect("a subscription");
    stack.client.flush().await.expect("it is in force");
    stack.receiver.on("/away", [500]);
    stack.receiver.on("/gone", [410]);
    let away = json!({"name": "away", "url": stack.receiver.url("/away"), "events": ["update.failed", "lead.created"]});
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}, away])).await;
    stack.fallback_of(stack.api.project_id, json!([{"name": "gone", "url": stack.receiver.url("/gone")}])).await;
    let process_id = process_id(&applied);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;

    let (first, valid) = send_every_command(&stack, process_id, &lead).await;
    stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    let exhausted = wait_for_webhook_events(&stack, process_id).await;
    send_every_query(&stack, &process_id.to_string(), &lead, &first, &exhausted).await;
    // Messages on one connection arrive in order, so this message marks the end.
    stack.client.publish("end.of.test", "".into()).await.expect("a publish");
    let mut received = Vec::new();
    while let Some(message) = traffic.next().await
        && message.subject.as_str() != "end.of.test"
    {
        received.push(message);
    }

    let mut schemas = Schemas::load();
    schemas.check_traffic(&received);
    let queries: Vec<_> = schemas.queries.keys().cloned().collect();
    assert!(queries.len() > 25, "{queries:?}");
    for subject in queries {
        assert!(schemas.seen.contains_key(&subject), "no reply of {subject} was checked");
    }
    let commands = messages(&stack, LEAD_COMMANDS).await;
    // The first command is the creation of a lead.
    assert!(commands[1].headers.get(headers::TRACEPARENT).is_some());
    // Messages after the last valid one are invalid on purpose.
    for message in commands.into_iter().filter(|message| message.sequence <= valid) {
        schemas.check_message(&message.subject, &message.headers, &message.payload);
    }
    for stream in [LEAD_EVENTS, WEBHOOK_EVENTS, LEAD_DEAD_LETTERS] {
        for message in messages(&stack, stream).await {
            schemas.check_message(&message.subject, &message.headers, &message.payload);
        }
    }
    for request in stack.receiver.requests() {
        let is_test = request.json()["action_type"] == "test";
        let is_event = request.json()["type"] == "lead.created";
        if !is_event {
            schemas.check(if is_test { "TestPayload" } else { "WebhookPayload" }, &request.body);
        }
    }
    for (kind, least) in [
        ("UpdateCommand", 5),
        ("CallStarted", 1),
        ("CallEnded", 1),
        ("LeadCreated", 1),
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
}

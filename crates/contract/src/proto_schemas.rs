//! The protobuf schemas in `proto-schemas/` match the types: every message, with every field set, is the proto3 JSON
//! form of its schema, and no schema has a field that its message lacks.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, ReflectMessage};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    JsonObject, ObjectId, Timestamp,
    call_result::{CallDirection, CallResult},
    command::{CallEnded, CallExpired, CallStarted, EraseLead, LeadContact, LeadCreated, UpdateCommand},
    event::{CompletionEvent, OutcomeKind, TestPayload, WebhookEvent, WebhookPayload},
    event_kind::DeliveryKind,
    pack::{CommandPack, PackItem},
    rpc,
    schema::QueryEntry,
    schema_files,
};

/// The declared messages.
fn pool() -> DescriptorPool {
    let schemas = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto-schemas");
    let files = ["commands", "events", "config", "rpc"].map(|file| format!("leadrelay/v1/{file}.proto"));
    DescriptorPool::from_file_descriptor_set(protox::compile(files, [schemas]).unwrap()).unwrap()
}

fn schema(pool: &DescriptorPool, name: &str) -> Option<MessageDescriptor> {
    pool.get_message_by_name(&format!("leadrelay.v1.{name}"))
}

/// Reads a message's JSON by its schema; unknown fields and wrong types are errors.
fn read(name: &str, message: &impl Serialize) -> DynamicMessage {
    let schema = schema(&pool(), name).unwrap();
    let text = serde_json::to_string(message).unwrap();
    let mut json = serde_json::Deserializer::from_str(&text);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    DynamicMessage::deserialize_with_options(schema, &mut json, &options).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// The schema's fields that the message leaves unset.
fn unset(message: &DynamicMessage) -> Vec<String> {
    let schema = message.descriptor();
    schema.fields().filter(|field| !message.has_field(field)).map(|field| field.json_name().to_owned()).collect()
}

const NONE: [&str; 0] = [];

fn id(byte: u8) -> ObjectId {
    ObjectId::from_bytes([byte; 12])
}

fn object() -> JsonObject {
    JsonObject::from_text(r#"{"n":123456789012345678901234567890,"a":[null,{"b":true}]}"#.into()).unwrap()
}

/// Other programs may write these messages: their JSON by the schema must parse as our type.
fn both_ways<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, message: &T) {
    let read = read(name, message);
    assert_eq!(unset(&read), NONE, "{name}");
    let written = serde_json::to_string(&read).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&written).unwrap(), message);
}

/// A result with every field.
fn result() -> CallResult {
    let text = || Some("text".to_owned());
    CallResult {
        status: text(),
        connected: Some(true),
        direction: Some(CallDirection::Incoming),
        disposition: text(),
        summary: text(),
        analysis: Some(JsonObject::from_text(r#"{"a":"b"}"#.into()).unwrap()),
        recording_url: text(),
        transcript_url: text(),
        duration_seconds: Some(94),
        metadata: Some(JsonObject::from_text(r#"{"a":"b"}"#.into()).unwrap()),
    }
}

fn contact() -> LeadContact {
    let text = || Some("text".to_owned());
    LeadContact { name: text(), phone: text(), email: text() }
}

#[test]
fn commands() {
    let text = || Some("text".to_owned());
    let command = UpdateCommand {
        update_id: Some(id(1)),
        lead_id: Some(id(2)),
        reference_id: text(),
        process_id: Some(id(3)),
        metadata: Some(JsonObject::from_text(r#"{"a":"b"}"#.into()).unwrap()),
        name: text(),
        target_state: text(),
        disposition: text(),
        user_id: text(),
        api_key_id: Some(id(4)),
        expected_version: Some(4),
        expected_state: text(),
        warnings: vec!["careful".into()],
    };
    both_ways("UpdateCommand", &command);
    read("UpdateCommand", &UpdateCommand { metadata: Some(object()), ..command });
    let (lead_id, process_id) = (Some(id(2)), Some(id(3)));
    both_ways(
        "CallStarted",
        &CallStarted {
            update_id: Some(id(1)),
            lead_id,
            reference_id: text(),
            process_id,
            call_id: text(),
            timeout_seconds: Some(60),
            api_key_id: Some(id(4)),
        },
    );
    both_ways(
        "CallEnded",
        &CallEnded {
            update_id: Some(id(1)),
            lead_id,
            reference_id: text(),
            process_id,
            call_id: text(),
            to_state: text(),
            result: Some(result()),
            api_key_id: Some(id(4)),
        },
    );
    both_ways("CallExpired", &CallExpired { lead_id: id(2) });
    both_ways("EraseLead", &EraseLead { update_id: Some(id(1)), lead_id: id(2), api_key_id: Some(id(4)) });
    let metadata = JsonObject::from_text(r#"{"a":"b"}"#.into()).unwrap();
    both_ways(
        "LeadCreated",
        &LeadCreated { update_id: id(1), lead_id: id(2), state: "new".into(), contact: contact(), metadata },
    );
    let payload = serde_json::value::RawValue::from_string(r#"{"leadId":"a"}"#.into()).unwrap();
    let item = PackItem { subject: "leads.cmd.a.update".into(), traceparent: text(), payload: &payload };
    assert_eq!(unset(&read("CommandPack", &CommandPack { commands: vec![item] })), NONE);
}

#[test]
fn events() {
    let event = CompletionEvent {
        kind: OutcomeKind::CallEnded,
        update_id: id(1),
        project_id: id(2),
        process_id: Some(id(3)),
        lead_id: Some(id(4)),
        reference_id: Some("R".into()),
        success: true,
        error: Some("why".into()),
        error_code: Some("why".into()),
        from_state: Some("new".into()),
        to_state: Some("lost".into()),
        version: Some(2),
        disposition: Some("callback".into()),
        call_id: Some("c-1".into()),
        activity: Some(result()),
        contact: Some(contact()),
        user_id: Some("u".into()),
        warnings: vec!["careful".into()],
        timestamp: Timestamp::from_millis(1_768_193_759_048),
        data: Some(object()),
    };
    let by_schema = read("CompletionEvent", &event);
    assert_eq!(unset(&by_schema), NONE);
    assert_eq!(by_schema.get_field_by_name("timestamp").and_then(|at| at.as_f64()), Some(1_768_193_759_048.0));
    assert_eq!(unset(&read("WebhookPayload", &WebhookPayload::from(&event))), NONE);
    let failed = CompletionEvent {
        success: false,
        error: event.error,
        warnings: event.warnings,
        ..CompletionEvent::new(OutcomeKind::Update, event.project_id, event.update_id, event.timestamp)
    };
    read("CompletionEvent", &failed);
    assert_eq!(
        unset(&read("WebhookPayload", &WebhookPayload::from(&failed))),
        ["success", "leadId", "referenceId", "data"]
    );
}

#[test]
fn test_payloads() {
    let timestamp = Timestamp::from_millis(1);
    let ping = TestPayload { action_type: "test", callback_id: id(5), process_id: Some(id(3)), timestamp };
    assert_eq!(unset(&read("TestPayload", &ping)), NONE);
    assert_eq!(unset(&read("TestPayload", &TestPayload { process_id: None, ..ping })), ["processId"]);
}

#[test]
fn events_about_deliveries() {
    let exhausted = WebhookEvent::Exhausted {
        update_id: id(1),
        project_id: id(2),
        process_id: Some(id(3)),
        callback_id: id(5),
        kind: DeliveryKind::CallEnded,
        attempts: 8,
        error: "the endpoint answered 500".into(),
        timestamp: Timestamp::from_millis(1),
    };
    assert_eq!(unset(&read("WebhookEvent", &exhausted)), ["reason"]);
    let disabled = WebhookEvent::CallbackDisabled {
        project_id: id(2),
        process_id: None,
        callback_id: id(5),
        reason: "the endpoint answered 410 Gone".into(),
        timestamp: Timestamp::from_millis(1),
    };
    assert_eq!(unset(&read("WebhookEvent", &disabled)), ["processId", "updateId", "attempts", "error", "kind"]);
}

/// A JSON Schema of a type behind its references, and whether it may be null.
fn resolved<'a>(root: &'a Value, mut schema: &'a Value) -> (&'a Value, bool) {
    let mut nullable = false;
    loop {
        schema = if let Some(path) = schema["$ref"].as_str() {
            root.pointer(path.trim_start_matches('#')).unwrap()
        } else if let Some([one]) = schema["allOf"].as_array().map(Vec::as_slice) {
            one
        } else if let Some([one, null]) = schema["anyOf"].as_array().map(Vec::as_slice) {
            assert_eq!(null["type"], "null", "{schema}");
            nullable = true;
            one
        } else {
            let types = schema["type"].as_array();
            return (schema, nullable || types.is_some_and(|types| types.contains(&"null".into())));
        }
    }
}

/// The alternatives of a type, itself where it has none.
fn alternatives(schema: &Value) -> Vec<&Value> {
    schema["oneOf"].as_array().map_or_else(|| vec![schema], |all| all.iter().collect())
}

fn is(schema: &Value, kind: &str) -> bool {
    schema["type"] == kind || schema["type"].as_array().is_some_and(|types| types.contains(&kind.into()))
}

/// The fields of an object, and of all its alternatives, each with whether it is always present.
fn fields(schema: &Value) -> BTreeMap<&str, (&Value, bool)> {
    let alternatives = alternatives(schema);
    let mut fields = BTreeMap::new();
    for (name, field) in alternatives.iter().filter_map(|object| object["properties"].as_object()).flatten() {
        let required =
            |object: &&Value| object["required"].as_array().is_some_and(|all| all.contains(&name.as_str().into()));
        fields.insert(name.as_str(), (field, alternatives.iter().all(required)));
    }
    fields
}

/// The protobuf type for a JSON Schema: a scalar, a type of google.protobuf, or one of our messages.
fn expected(schema: &Value) -> &'static str {
    let alternatives = alternatives(schema);
    let all = |kind| alternatives.iter().all(|alternative| is(alternative, kind));
    let members = || alternatives.iter().any(|object| object["properties"].is_object());
    match schema["format"].as_str() {
        Some("int64" | "uint64") => "double",
        Some("int32") => "int32",
        Some("uint16" | "uint32") => "uint32",
        _ if all("string") => "string",
        _ if all("boolean") => "bool",
        _ if all("object") && members() => "message",
        _ if all("object") => "google.protobuf.Struct",
        _ => "google.protobuf.Value",
    }
}

fn actual(kind: &Kind) -> &str {
    match kind {
        Kind::Double => "double",
        Kind::Int32 => "int32",
        Kind::Uint32 => "uint32",
        Kind::String => "string",
        Kind::Bool => "bool",
        Kind::Message(message) if message.package_name() == "google.protobuf" => message.full_name(),
        Kind::Message(_) => "message",
        _ => "a type that none of them needs",
    }
}

/// Compares a message and its nested messages with their JSON Schemas.
fn compare(root: &Value, schema: &Value, message: &MessageDescriptor, met: &mut BTreeSet<String>) {
    let name = message.full_name();
    met.insert(name.to_owned());
    let fields = fields(schema);
    let declared: BTreeSet<_> = message.fields().map(|field| field.json_name().to_owned()).collect();
    assert!(declared.iter().eq(fields.keys()), "{name} has {declared:?}, and its JSON Schema {:?}", fields.keys());
    for field in message.fields() {
        let (schema, always) = fields[field.json_name()];
        let (schema, nullable) = resolved(root, schema);
        let kind = field.kind();
        let path = format!("{name}.{}", field.name());
        if is(schema, "array") && actual(&kind) == "google.protobuf.ListValue" {
            continue;
        }
        assert_eq!(is(schema, "array"), field.is_list(), "{path}");
        let item = if field.is_list() { resolved(root, &schema["items"]).0 } else { schema };
        assert_eq!(actual(&kind), expected(item), "{path}");
        if nullable || !always {
            assert!(field.is_list() || field.supports_presence(), "{path} may be absent: declare it optional");
        }
        if let Kind::Message(inner) = &kind
            && inner.package_name() != "google.protobuf"
        {
            compare(root, item, inner, met);
        }
    }
}

#[test]
fn every_json_schema_has_a_message_of_the_same_fields_and_types() {
    let pool = pool();
    let mut met = BTreeSet::new();
    for (name, json) in schema_files::schemas() {
        let message = schema(&pool, &name).unwrap_or_else(|| panic!("no .proto has a message {name}"));
        compare(&json, &json, &message, &mut met);
    }
    for message in pool.all_messages().filter(|message| message.package_name() == "leadrelay.v1") {
        assert!(
            met.contains(message.full_name()),
            "{} has no JSON Schema and occurs in no message",
            message.full_name()
        );
    }
}

#[test]
fn every_query_is_in_rpc_proto() {
    let rpc = include_str!("../../../proto-schemas/leadrelay/v1/rpc.proto");
    let documented: Vec<Vec<_>> = rpc
        .lines()
        .filter(|line| line.contains(".rpc."))
        .map(|line| line.split_whitespace().skip(1).collect())
        .collect();
    let row = |query: QueryEntry| {
        let reply = if query.is_list { format!("list of {}", query.reply.0) } else { query.reply.0.clone() };
        let row = format!("{} {} → {reply} {}", query.subject, query.request.0, query.service());
        row.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let queries: Vec<_> = rpc::catalog().into_iter().map(row).collect();
    assert_eq!(documented, queries);
}

//! The protobuf schemas in `proto-schemas/` say what these types say: every message, with every field set, is the
//! proto3 JSON form of its schema, and no schema has a field that its message has not.

use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, ReflectMessage};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    JsonObject, ObjectId, Timestamp,
    command::{CallEnded, CallExpired, CallStarted, UpdateCommand},
    event::{CompletionEvent, TestPayload, WebhookEvent, WebhookPayload},
};

/// Reads a message's JSON by its schema; unknown fields and wrong types are errors.
fn read(name: &str, message: &impl Serialize) -> DynamicMessage {
    let schemas = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto-schemas");
    let files = protox::compile(["leadrelay/v1/commands.proto", "leadrelay/v1/events.proto"], [schemas]).unwrap();
    let pool = DescriptorPool::from_file_descriptor_set(files).unwrap();
    let schema = pool.get_message_by_name(&format!("leadrelay.v1.{name}")).unwrap();
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

/// Commands may come from any producer: what it writes by the schema must be read here, too.
fn both_ways<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, message: &T) {
    let read = read(name, message);
    assert_eq!(unset(&read), NONE, "{name}");
    let written = serde_json::to_string(&read).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&written).unwrap(), message);
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
    };
    both_ways("UpdateCommand", &command);
    read("UpdateCommand", &UpdateCommand { metadata: Some(object()), ..command });
    let (lead_id, process_id) = (Some(id(2)), Some(id(3)));
    both_ways(
        "CallStarted",
        &CallStarted { lead_id, reference_id: text(), process_id, call_id: text(), timeout_seconds: Some(60) },
    );
    both_ways("CallEnded", &CallEnded { lead_id, reference_id: text(), process_id, call_id: text() });
    both_ways("CallExpired", &CallExpired { lead_id: id(2) });
}

#[test]
fn events() {
    let event = CompletionEvent {
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
        process_id: None,
        lead_id: None,
        reference_id: None,
        success: false,
        error_code: None,
        from_state: None,
        to_state: None,
        version: None,
        user_id: None,
        data: None,
        ..event
    };
    read("CompletionEvent", &failed);
    assert_eq!(
        unset(&read("WebhookPayload", &WebhookPayload::from(&failed))),
        ["success", "leadId", "referenceId", "data"]
    );
}

#[test]
fn a_ping() {
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
    assert_eq!(unset(&read("WebhookEvent", &disabled)), ["processId", "updateId", "attempts", "error"]);
}

//! Generated documents: a JSON Schema of every message in `proto-schemas/json-schema/`, and the AsyncAPI document of
//! the subjects, `proto-schemas/asyncapi.json`, which refers to them.
//!
//! `just schemas` writes them; the tests fail if they differ.

use std::{collections::BTreeMap, fs};

use schemars::JsonSchema;
use serde_json::{Value, json};

use crate::{
    command, event, idempotency, key, pack, process, rpc,
    schema::{Side, keep, message},
    streams,
    subject::DeadLetterReason,
};

/// The schemas, by the names of their files.
#[derive(Default)]
struct Schemas(BTreeMap<String, Value>);

impl Schemas {
    fn add<T: JsonSchema>(&mut self, side: Side) {
        self.0.insert(T::schema_name().into_owned(), message::<T>(side));
    }
}

macro_rules! add {
    ($schemas:ident, $side:ident: $($message:ty),* $(,)?) => { $($schemas.add::<$message>(Side::$side);)* };
}

/// The JSON Schemas of all messages, by the messages' names.
pub(crate) fn schemas() -> BTreeMap<String, Value> {
    let mut all = Schemas::default();
    add!(all, Read: command::UpdateCommand, command::CallStarted, command::CallEnded, command::CallExpired);
    add!(all, Read: command::EraseLead, command::LeadCreated);
    add!(all, Read: pack::CommandPack<'static>);
    add!(all, Written: event::CompletionEvent, event::WebhookPayload<'static>, event::TestPayload, event::WebhookEvent);
    // The values of the buckets.
    add!(all, Written: key::ApiKey, process::Process, idempotency::IdempotencyRecord);
    for query in rpc::catalog() {
        all.0.extend([query.request, query.reply]);
    }
    all.0
}

#[test]
fn json_schemas_are_current() {
    let schemas = schemas();
    for (name, schema) in &schemas {
        keep(&format!("json-schema/{name}.json"), schema);
    }
    for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto-schemas/json-schema")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let known = name.strip_suffix(".json").is_some_and(|name| schemas.contains_key(name));
        assert!(known, "proto-schemas/json-schema/{name} is not the schema of a message: remove it");
    }
}

fn schema(name: &str) -> Value {
    json!({
        "schemaFormat": "application/schema+json;version=draft-07",
        "schema": {"$ref": format!("./json-schema/{name}.json")},
    })
}

fn list_of(name: &str) -> Value {
    json!({
        "schemaFormat": "application/schema+json;version=draft-07",
        "schema": {"type": "array", "items": {"$ref": format!("./json-schema/{name}.json")}},
    })
}

fn component(kind: &str, name: &str) -> Value {
    json!({"$ref": format!("#/components/{kind}/{name}")})
}

/// The subject without dots, so that links can contain it: `leads_rpc_lead_get`.
fn channel_name(subject: &str) -> String {
    subject.replace('.', "_")
}

fn asyncapi() -> Value {
    let mut channels = json!({});
    let mut operations = json!({});
    let mut messages = json!({});

    // Messages in streams: name, direction as seen from Leadrelay, subject, stream, message, summary.
    let streamed = [
        (
            "updateCommand",
            "send",
            "leads.cmd.{projectId}.update",
            streams::LEAD_COMMANDS,
            "UpdateCommand",
            "Change a lead. The gateway publishes it for its clients and producers.",
        ),
        (
            "callStarted",
            "send",
            "leads.cmd.{projectId}.call.started",
            streams::LEAD_COMMANDS,
            "CallStarted",
            "A call with a lead began. The gateway publishes it for its clients and producers.",
        ),
        (
            "callEnded",
            "send",
            "leads.cmd.{projectId}.call.ended",
            streams::LEAD_COMMANDS,
            "CallEnded",
            "A call with a lead ended. The gateway publishes it for its clients and producers.",
        ),
        (
            "callExpired",
            "send",
            "leads.cmd.{projectId}.call.expired",
            streams::LEAD_COMMANDS,
            "CallExpired",
            "The last call of a lead with queued updates may have expired.",
        ),
        (
            "eraseLead",
            "send",
            "leads.cmd.{projectId}.erase",
            streams::LEAD_COMMANDS,
            "EraseLead",
            "Erase a lead. The gateway publishes it for its clients.",
        ),
        (
            "leadCreated",
            "send",
            "leads.cmd.{projectId}.lead.created",
            streams::LEAD_COMMANDS,
            "LeadCreated",
            "A lead of a process with a callback for `lead.created` was created. lead-state publishes it.",
        ),
        (
            "commandPack",
            "send",
            "leads.cmd.pack",
            streams::LEAD_COMMANDS,
            "CommandPack",
            "Many commands, of any projects, that the gateway publishes as one message.",
        ),
        (
            "updateSucceeded",
            "send",
            "leads.evt.{projectId}.{processId}.update.succeeded",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "An update was applied.",
        ),
        (
            "updateFailed",
            "send",
            "leads.evt.{projectId}.{processId}.update.failed",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "An update failed; nothing was changed.",
        ),
        (
            "callStartSucceeded",
            "send",
            "leads.evt.{projectId}.{processId}.call.started.succeeded",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "The start of a call was applied.",
        ),
        (
            "callStartFailed",
            "send",
            "leads.evt.{projectId}.{processId}.call.started.failed",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "The start of a call failed: its lead is unknown or erased.",
        ),
        (
            "callEndSucceeded",
            "send",
            "leads.evt.{projectId}.{processId}.call.ended.succeeded",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "The end of a call was applied.",
        ),
        (
            "callEndFailed",
            "send",
            "leads.evt.{projectId}.{processId}.call.ended.failed",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "The end of a call failed: its lead is unknown or erased.",
        ),
        (
            "erasureSucceeded",
            "send",
            "leads.evt.{projectId}.{processId}.erase.succeeded",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "A lead was erased.",
        ),
        (
            "erasureFailed",
            "send",
            "leads.evt.{projectId}.{processId}.erase.failed",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "A lead was not erased: it is unknown.",
        ),
        (
            "creationSucceeded",
            "send",
            "leads.evt.{projectId}.{processId}.lead.created.succeeded",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "A lead was created.",
        ),
        (
            "creationFailed",
            "send",
            "leads.evt.{projectId}.{processId}.lead.created.failed",
            streams::LEAD_EVENTS,
            "CompletionEvent",
            "A lead that was created is unknown: it was erased, or the database was restored.",
        ),
        (
            "deliveryExhausted",
            "send",
            "webhooks.evt.{projectId}.{processId}.exhausted",
            streams::WEBHOOK_EVENTS,
            "WebhookEvent",
            "A delivery will not be attempted again.",
        ),
        (
            "callbackDisabled",
            "send",
            "webhooks.evt.{projectId}.{processId}.callback.disabled",
            streams::WEBHOOK_EVENTS,
            "WebhookEvent",
            "A callback is disabled: its deliveries wait until it is enabled again.",
        ),
        (
            "deadLetter",
            "send",
            "leads.dead.{reason}",
            streams::LEAD_DEAD_LETTERS,
            "DeadLetter",
            "A message of the command log that could not be applied, unchanged.",
        ),
        (
            "replayedDeadLetter",
            "send",
            "leads.dead.replayed.{sequence}",
            streams::LEAD_DEAD_LETTERS,
            "ReplayNote",
            "A note that this dead letter was sent again; its body is empty.",
        ),
    ];
    for (name, action, address, stream, message, summary) in streamed {
        let parameters: serde_json::Map<_, _> = address
            .split(['{', '}'])
            .skip(1)
            .step_by(2)
            .map(|parameter| (parameter.to_owned(), component("parameters", parameter)))
            .collect();
        channels[name] = json!({
            "address": address, "description": format!("Stream `{stream}`."), "parameters": parameters,
            "messages": {message: component("messages", message)},
        });
        operations[name] = json!({
            "action": action, "summary": summary, "channel": {"$ref": format!("#/channels/{name}")},
            "messages": [{"$ref": format!("#/channels/{name}/messages/{message}")}],
        });
    }
    for (message, headers) in [
        ("UpdateCommand", "CommandHeaders"),
        ("CallStarted", "CommandHeaders"),
        ("CallEnded", "CommandHeaders"),
        ("CallExpired", "CommandHeaders"),
        ("EraseLead", "CommandHeaders"),
        ("LeadCreated", "CommandHeaders"),
        ("CommandPack", "PackHeaders"),
        ("CompletionEvent", "EventHeaders"),
        ("WebhookEvent", "EventHeaders"),
    ] {
        messages[message] =
            json!({"name": message, "headers": component("schemas", headers), "payload": schema(message)});
    }
    let producers = [
        ("producerUpdate", "update", "UpdateBody", "Change a lead: the body of `POST /api/v1/leads/update`."),
        ("producerCallStarted", "call.started", "ProducerCallStarted", "A call with a lead began."),
        ("producerCallEnded", "call.ended", "ProducerCallEnded", "A call with a lead ended."),
    ];
    for (name, kind, message, summary) in producers {
        channels[name] = json!({
            "address": format!("leads.intake.{{projectId}}.{kind}"),
            "description": format!(
                "`leads.cmd.{{projectId}}.{kind}` in the NATS account of a producer. The gateway answers with JetStream's \
                 acknowledgement once the message is in the log, or with JetStream's error."
            ),
            "parameters": {"projectId": component("parameters", "projectId")},
            "messages": {message: component("messages", message)},
        });
        operations[name] = json!({
            "action": "receive", "summary": summary, "channel": {"$ref": format!("#/channels/{name}")},
            "messages": [{"$ref": format!("#/channels/{name}/messages/{message}")}],
        });
        let payload = match kind {
            "update" => json!({
                "schemaFormat": "application/schema+json;version=draft-07",
                "schema": {"$ref": "./openapi.json#/components/schemas/UpdateRequest"},
            }),
            _ => schema(message.trim_start_matches("Producer")),
        };
        messages[message] =
            json!({"name": message, "headers": component("schemas", "ProducerHeaders"), "payload": payload});
    }
    messages["DeadLetter"] = json!({
        "name": "DeadLetter", "contentType": "application/octet-stream",
        "headers": component("schemas", "DeadLetterHeaders"),
    });
    messages["ReplayNote"] = json!({
        "name": "ReplayNote", "contentType": "application/octet-stream",
        "headers": component("schemas", "ReplayNoteHeaders"),
    });
    messages["Error"] = json!({
        "name": "Error", "summary": "Why a query was not answered. The body is empty.",
        "contentType": "application/octet-stream", "headers": component("schemas", "ErrorHeaders"),
    });

    for query in rpc::catalog() {
        let (subject, request, served_by) = (query.subject, query.request.0.as_str(), query.service());
        let name = channel_name(subject);
        let (reply_name, payload) = match query.reply.0 {
            item if query.is_list => (format!("ListOf{item}"), list_of(&item)),
            reply => (reply.clone(), schema(&reply)),
        };
        messages[request] = json!({"name": request, "payload": schema(request)});
        if messages.get(&reply_name).is_none() {
            messages[&reply_name] = json!({"name": reply_name, "payload": payload});
        }
        channels[&name] = json!({
            "address": subject, "description": format!("A NATS micro service of {served_by}."),
            "messages": {request: component("messages", request)},
        });
        channels[format!("{name}_reply")] = json!({
            "address": null, "description": "The inbox that the request names.",
            "messages": {&reply_name: component("messages", &reply_name), "Error": component("messages", "Error")},
        });
        operations[&name] = json!({
            "action": "receive", "summary": format!("{request} → {reply_name}"),
            "channel": {"$ref": format!("#/channels/{name}")},
            "messages": [{"$ref": format!("#/channels/{name}/messages/{request}")}],
            "reply": {
                "channel": {"$ref": format!("#/channels/{name}_reply")},
                "messages": [
                    {"$ref": format!("#/channels/{name}_reply/messages/{reply_name}")},
                    {"$ref": format!("#/channels/{name}_reply/messages/Error")},
                ],
            },
        });
    }

    let text = |description: &str| json!({"type": "string", "description": description});
    let message_id = text("JetStream's deduplication id: the project and the `updateId`");
    let trace = text("W3C trace context, from the client through every message to the webhook");
    let position = text("The position of the command in the log: generation.epoch.sequence.index");
    json!({
        "asyncapi": "3.1.0",
        "info": {
            "title": "Leadrelay on NATS",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The messages that Leadrelay reads and publishes over NATS JetStream, as JSON. leadrelay/v1 has a protobuf message \
                of the same name for each; its proto3 JSON form is the form on the wire (for a list, the form of its items). Unknown fields are ignored on read; \
                fields are added, never renamed or retyped. `receive` is what Leadrelay reads, `send` what it publishes.",
            "license": {"name": "MIT OR Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "parameters": {
                "projectId": {"description": "24 lower-case hex digits. NATS accounts restrict producers by it"},
                "processId": {"description": "24 lower-case hex digits; _ if the process is unknown"},
                "reason": {
                    "description": "Why the message is a dead letter",
                    "enum": DeadLetterReason::ALL.map(DeadLetterReason::as_str),
                },
                "sequence": {"description": "The sequence of the dead letter in its stream"},
            },
            "schemas": {
                "CommandHeaders": {"type": "object", "properties": {"Nats-Msg-Id": message_id, "traceparent": trace}},
                "PackHeaders": {
                    "type": "object",
                    "properties": {"Nats-Msg-Id": text("A new id, so that a pack that is sent more than once is stored once")},
                },
                "ProducerHeaders": {
                    "type": "object",
                    "properties": {
                        "Nats-Msg-Id": text("A message whose id the project used in the last two minutes is not logged again"),
                        "Leadrelay-Update-Id": text("The id of the update or call event, 24 hex digits; by default a new one"),
                        "Leadrelay-Expected-Version": text("The version that the lead must have"),
                        "Leadrelay-Expected-State": text("The state that the lead must be in"),
                        "traceparent": trace,
                    },
                },
                "EventHeaders": {
                    "type": "object",
                    "properties": {"Nats-Msg-Id": message_id, "traceparent": trace, "Leadrelay-Position": position},
                },
                "DeadLetterHeaders": {
                    "type": "object",
                    "required": ["Leadrelay-Error", "Leadrelay-Origin-Subject", "Leadrelay-Origin-Sequence",
                        "Leadrelay-Origin-Time"],
                    "properties": {
                        "Leadrelay-Error": text("The error, in one sentence"),
                        "Leadrelay-Origin-Subject": text("The subject it was published on"),
                        "Leadrelay-Origin-Sequence": text("Its sequence in the stream that it was read from"),
                        "Leadrelay-Origin-Time": text("When the command log stored it, ISO 8601"),
                        "Leadrelay-Position": position,
                        "Leadrelay-Truncated-From": text("The full length in bytes, if it was truncated"),
                        "Leadrelay-Replay-Of": text("The sequence of the dead letter of which this message is a replay"),
                    },
                },
                "ReplayNoteHeaders": {
                    "type": "object",
                    "required": ["Leadrelay-Replay"],
                    "properties": {"Leadrelay-Replay": text("`begun`, `sent` and a sequence, or `not_sent`")},
                },
                "ErrorHeaders": {
                    "type": "object",
                    "required": ["Nats-Service-Error-Code", "Nats-Service-Error"],
                    "properties": {
                        "Nats-Service-Error-Code": text("An HTTP status"),
                        "Nats-Service-Error": text("`{code}: {message}`; codes are in docs/ERRORS.md"),
                    },
                },
            },
        },
    })
}

#[test]
fn every_reference_in_the_asyncapi_document_resolves() {
    let document = asyncapi();
    let text = document.to_string();
    let references = text.split(r##""$ref":"#"##).skip(1).filter_map(|rest| rest.split('"').next());
    let broken: Vec<_> = references.filter(|reference| document.pointer(reference).is_none()).collect();
    assert_eq!(broken, Vec::<&str>::new());
}

#[test]
fn the_asyncapi_document_is_current() {
    let document = asyncapi();
    let schemas = schemas();
    let text = document.to_string();
    for file in text.split("\"./json-schema/").skip(1).map(|rest| rest.split_once(".json").unwrap().0) {
        assert!(schemas.contains_key(file), "no schema of {file}: add the message to schemas() above");
    }
    keep("asyncapi.json", &document);
}

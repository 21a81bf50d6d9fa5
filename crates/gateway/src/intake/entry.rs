//! 1 Accept: turns a producer's message into a command. Headers that are not documented are ignored.

use async_nats::{HeaderMap, Message};
use contract::{
    ObjectId, Timestamp, command,
    event::OutcomeKind,
    headers,
    subject::{CommandKind, CommandSubject},
    trace,
    update_body::{UpdateBody, parse_expected_state, parse_expected_version},
};

use crate::{command::Command, command_log::LogEntry, error::ApiError};

/// The longest message id of a producer, in bytes: the log keeps it with the message.
const MAX_MESSAGE_ID: usize = 255;

/// Parses a message of this project's producers. `new_id` is the id of an update that has none.
pub(super) fn parse(
    message: &Message,
    project_id: ObjectId,
    new_id: ObjectId,
    now: Timestamp,
) -> Result<LogEntry, ApiError> {
    let subject = CommandSubject::parse_intake(&message.subject).map_err(|_| {
        ApiError::field("the subject", "must be leads.cmd.{projectId} with .update, .call.started or .call.ended")
    })?;
    let headers = Headers(message.headers.as_ref());
    let expected =
        [headers::EXPECTED_VERSION, headers::EXPECTED_STATE].into_iter().find(|name| headers.get(name).is_some());
    if let Some(name) = expected.filter(|_| subject.kind != CommandKind::Update) {
        return Err(ApiError::field(name, "applies to updates: a call event does not depend on the lead"));
    }
    let id = headers.update_id(now)?.unwrap_or(new_id);
    let mut command = match subject.kind {
        CommandKind::Update => update(&message.payload, headers, project_id)?,
        CommandKind::CallStarted => Command::parse(OutcomeKind::CallStarted, &message.payload, project_id)?.0,
        _ => Command::parse(OutcomeKind::CallEnded, &message.payload, project_id)?.0,
    };
    command.identify(id, None);
    let entry = LogEntry::new(project_id, id, &command)?;
    let message_id = match headers.get(headers::MESSAGE_ID) {
        Some(id) if id.is_empty() || id.len() > MAX_MESSAGE_ID => {
            return Err(ApiError::field(headers::MESSAGE_ID, format!("must have 1 to {MAX_MESSAGE_ID} bytes")));
        }
        Some(id) => command::producer_message_id(project_id, id),
        None => entry.message_id,
    };
    let traceparent = headers.get(headers::TRACEPARENT).filter(|value| trace::is_traceparent(value));
    Ok(LogEntry { message_id, traceparent: traceparent.map(str::to_owned), ..entry })
}

/// Parses an update, with the expectations in its headers.
fn update(body: &[u8], headers: Headers<'_>, project_id: ObjectId) -> Result<Command, ApiError> {
    let mut update = UpdateBody::parse(body, Some(project_id))?;
    let version = headers.get(headers::EXPECTED_VERSION);
    update.command.expected_version =
        version.map(|text| parse_expected_version(headers::EXPECTED_VERSION, text)).transpose()?;
    let state = headers.get(headers::EXPECTED_STATE);
    update.command.expected_state =
        state.map(|text| parse_expected_state(headers::EXPECTED_STATE, text)).transpose()?;
    // The reply has no place for the warnings; the command contains them.
    Ok(Command::update(update).0)
}

#[derive(Clone, Copy)]
struct Headers<'a>(Option<&'a HeaderMap>);

impl<'a> Headers<'a> {
    fn get(self, name: &str) -> Option<&'a str> {
        Some(self.0?.get(name)?.as_str())
    }

    /// The id that the producer gave its update or call event.
    fn update_id(self, now: Timestamp) -> Result<Option<ObjectId>, ApiError> {
        let Some(text) = self.get(headers::UPDATE_ID) else { return Ok(None) };
        let fault = |fault: String| ApiError::field(headers::UPDATE_ID, fault);
        let id: ObjectId = text.parse().map_err(|e: contract::id::InvalidObjectId| fault(e.to_string()))?;
        if command::is_acceptable_id(id, now) {
            Ok(Some(id))
        } else {
            Err(fault("must begin with the time of the update: at most 62 days ago, at most 1 h ahead".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);
    const NEW: ObjectId = ObjectId::from_bytes([0x77; 12]);
    /// The second of 2026-01-12T04:55:59Z in hex.
    const MADE: &str = "69647edf";

    fn now() -> Timestamp {
        Timestamp::from_millis(1_768_193_759_048)
    }

    /// The entry of a message, or its error, in one line.
    fn parsed(kind: &str, headers: &[(&str, &str)], body: &str) -> String {
        let map: HeaderMap = headers.iter().fold(HeaderMap::new(), |mut map, (name, value)| {
            map.insert(*name, *value);
            map
        });
        let message = Message {
            subject: format!("leads.intake.{PROJECT}.{kind}").into(),
            reply: None,
            payload: body.replace("LEAD", &"2".repeat(24)).replace("OURS", &PROJECT.to_string()).into(),
            headers: Some(map),
            status: None,
            description: None,
            length: 0,
        };
        match parse(&message, PROJECT, NEW, now()) {
            Ok(LogEntry { message_id, traceparent, payload, .. }) => {
                let (project, lead) = (PROJECT.to_string(), "2".repeat(24));
                let payload = String::from_utf8(payload.to_vec()).unwrap().replace(&lead, "LEAD");
                let trace = traceparent.map(|trace| format!(" trace {}", &trace[..8])).unwrap_or_default();
                format!("{} {payload}{trace}", message_id.replace(&project, "OURS"))
            }
            Err(e) => format!("{} {}: {e}", e.status().as_u16(), e.code()),
        }
    }

    #[test]
    fn a_message_becomes_a_command() {
        let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let id = format!("{MADE}aaaaaaaaaaaaaaaa");
        let lines = [
            parsed("update", &[], r#"{"leadId":"LEAD","name":"Ada"}"#),
            parsed("update", &[("Nats-Msg-Id", "m-1"), ("traceparent", trace)], r#"{"leadId":"LEAD","name":"Ada"}"#),
            parsed(
                "update",
                &[
                    ("Leadrelay-Update-Id", id.as_str()),
                    ("Leadrelay-Expected-Version", "4"),
                    ("Leadrelay-Expected-State", "new"),
                ],
                r#"{"leadId":"LEAD","name":"","make":"Kia"}"#,
            ),
            // These fields of the body are metadata, as over HTTP.
            parsed("update", &[], r#"{"leadId":"LEAD","updateId":"LEAD","apiKeyId":"LEAD","expectedVersion":1}"#),
            // Headers that only JetStream reads are ignored.
            parsed(
                "update",
                &[("Nats-Expected-Last-Sequence", "7"), ("Nats-Batch-Id", "b"), ("Nats-Rollup", "all")],
                r#"{"leadId":"LEAD","name":"Ada"}"#,
            ),
            parsed("call.started", &[], r#"{"leadId":"LEAD","projectId":"OURS","callId":"c","timeoutSeconds":60}"#),
            parsed("call.ended", &[("Nats-Msg-Id", "m-1")], r#"{"referenceId":"R","processId":"LEAD"}"#),
        ];
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn invalid_messages_are_refused() {
        let long = "x".repeat(256);
        let (early, late) = (format!("{:08x}{}", 1_700_000_000, "a".repeat(16)), "f".repeat(24));
        let update = r#"{"leadId":"LEAD","name":"Ada"}"#;
        let lines = [
            parsed("update", &[], "nonsense"),
            parsed("update", &[], r#"{"leadId":"LEAD","projectId":"LEAD","name":"Ada"}"#),
            parsed("update", &[("Nats-Msg-Id", &long)], update),
            parsed("update", &[("Leadrelay-Update-Id", "7")], update),
            parsed("update", &[("Leadrelay-Update-Id", &early)], update),
            parsed("update", &[("Leadrelay-Update-Id", &late)], update),
            parsed("update", &[("Leadrelay-Expected-Version", "new")], update),
            parsed("call.started", &[], "{}"),
            parsed("call.started", &[], r#"{"referenceId":"R"}"#),
            parsed("call.started", &[], r#"{"leadId":"LEAD","projectId":"LEAD"}"#),
            parsed("call.started", &[], r#"{"leadId":"LEAD","callId":""}"#),
            parsed("call.ended", &[], r#"{"leadId":"LEAD","timeoutSeconds":60}"#),
            parsed("call.expired", &[], r#"{"leadId":"LEAD"}"#),
        ];
        insta::assert_snapshot!(lines.join("\n"));
    }
}

//! 3 Read in order: one message of the command log, parsed. What cannot be parsed is a dead letter, with its reason.

use async_nats::HeaderMap;
use bytes::Bytes;
use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{CallEnded, CallExpired, CallStarted, MAX_TEXT_CHARS, UpdateCommand},
    headers, json,
    subject::{CommandKind, CommandSubject, DeadLetterReason},
    trace,
};
use serde::de::DeserializeOwned;

/// A message of the command log, as it came.
#[derive(Debug, Clone)]
pub struct LogMessage {
    /// Its place in the log.
    pub sequence: u64,
    /// When the log stored it.
    pub logged_at: Timestamp,
    /// The subject it was published on.
    pub subject: String,
    /// Its headers.
    pub headers: Option<HeaderMap>,
    /// Its body.
    pub payload: Bytes,
}

/// A message of the command log, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the log.
    pub sequence: u64,
    /// When the log stored it: the time that decisions go by.
    pub logged_at: Timestamp,
    /// The project that its subject names.
    pub project_id: ObjectId,
    /// What it is.
    pub body: Body,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Change a lead.
    Update {
        /// The update's id: the command's own, else made from the entry.
        update_id: ObjectId,
        /// The command.
        command: Box<UpdateCommand>,
        /// The command's text, for the ledger.
        text: JsonObject,
        /// The trace it belongs to.
        traceparent: Option<String>,
    },
    /// A call began.
    CallStarted(CallStarted),
    /// A call ended.
    CallEnded(CallEnded),
    /// The last call with a lead may have expired.
    CallExpired(CallExpired),
}

/// A message that goes to the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct DeadLetter {
    /// Its place in the log.
    pub sequence: u64,
    /// Why, for programs.
    pub reason: DeadLetterReason,
    /// Why, for people.
    pub error: String,
}

impl DeadLetter {
    /// A message that was understood, and that the database refuses to hold.
    pub fn unapplicable(sequence: u64, error: String) -> Self {
        Self { sequence, reason: DeadLetterReason::Unapplicable, error }
    }
}

/// Parses a message.
pub fn parse(message: &LogMessage) -> Result<Entry, DeadLetter> {
    let dead = |reason, error: String| DeadLetter { sequence: message.sequence, reason, error };
    let subject = CommandSubject::parse(&message.subject)
        .map_err(|e| dead(DeadLetterReason::InvalidSubject, format!("{:?}: {e}", message.subject)))?;
    let text = json::check(&message.payload).map_err(|e| dead(DeadLetterReason::InvalidJson, e.to_string()))?;
    let body = match subject.kind {
        CommandKind::Update => read::<UpdateCommand>(text).and_then(|command| {
            Ok(Body::Update {
                update_id: command.update_id.unwrap_or_else(|| ObjectId::from_log(message.sequence, message.logged_at)),
                command: Box::new(command),
                text: JsonObject::from_text(text.trim().to_owned()).map_err(|e| e.to_string())?,
                traceparent: traceparent(message.headers.as_ref()),
            })
        }),
        CommandKind::CallStarted => read::<CallStarted>(text)
            .and_then(|call| check_call_id(call.call_id.as_deref()).map(|()| Body::CallStarted(call))),
        CommandKind::CallEnded => read(text).map(Body::CallEnded),
        CommandKind::CallExpired => read(text).map(Body::CallExpired),
    };
    let body = body.map_err(|error| dead(DeadLetterReason::InvalidCommand, error))?;
    Ok(Entry { sequence: message.sequence, logged_at: message.logged_at, project_id: subject.project_id, body })
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    if !text.trim_start().starts_with('{') {
        // serde would read a struct from an array as well.
        return Err("the body must be a JSON object".into());
    }
    serde_json::from_str(text).map_err(|e| e.to_string())
}

fn check_call_id(call_id: Option<&str>) -> Result<(), String> {
    if call_id.is_some_and(|id| id.chars().count() > MAX_TEXT_CHARS) {
        return Err(format!("callId is longer than {MAX_TEXT_CHARS} characters"));
    }
    Ok(())
}

fn traceparent(headers: Option<&HeaderMap>) -> Option<String> {
    let value = headers?.get(headers::TRACEPARENT)?.as_str();
    trace::is_traceparent(value).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(subject: &str, payload: &[u8]) -> LogMessage {
        LogMessage {
            sequence: 7,
            logged_at: Timestamp::from_millis(1_768_193_759_048),
            subject: subject.into(),
            headers: None,
            payload: Bytes::copy_from_slice(payload),
        }
    }

    const UPDATE: &str = "leads.cmd.020202020202020202020202.update";

    #[test]
    fn an_update_without_id_gets_the_one_of_its_entry() {
        let entry = parse(&message(UPDATE, br#" {"leadId":"010101010101010101010101","name":"x"} "#)).unwrap();
        assert_eq!(entry.project_id, ObjectId::from_bytes([2; 12]));
        let Body::Update { update_id, command, text, traceparent } = entry.body else { panic!("{entry:?}") };
        assert_eq!(update_id, ObjectId::from_log(7, entry.logged_at));
        assert_eq!(command.name.as_deref(), Some("x"));
        assert_eq!(text.get(), r#"{"leadId":"010101010101010101010101","name":"x"}"#);
        assert_eq!(traceparent, None);
    }

    #[test]
    fn an_id_and_a_trace_are_kept() {
        let mut message = message(UPDATE, br#"{"updateId":"030303030303030303030303"}"#);
        let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut headers = HeaderMap::new();
        headers.insert(headers::TRACEPARENT, trace);
        message.headers = Some(headers);
        let Body::Update { update_id, traceparent, .. } = parse(&message).unwrap().body else { panic!() };
        assert_eq!(update_id, ObjectId::from_bytes([3; 12]));
        assert_eq!(traceparent.as_deref(), Some(trace));
    }

    #[test]
    fn poison_is_named() {
        use DeadLetterReason::{InvalidCommand, InvalidJson, InvalidSubject};
        for (subject, payload, reason) in [
            (UPDATE, &b"not json"[..], InvalidJson),
            (UPDATE, b"", InvalidJson),
            (UPDATE, b"{\"name\":\"\xff\"}", InvalidJson),
            (UPDATE, br#"{"name":"\u0000"}"#, InvalidJson),
            (UPDATE, br#"{"name":1}"#, InvalidCommand),
            (UPDATE, br#"{"leadId":"x"}"#, InvalidCommand),
            (UPDATE, br#"{"metadata":[1]}"#, InvalidCommand),
            (UPDATE, b"[]", InvalidCommand),
            (UPDATE, b"null", InvalidCommand),
            ("leads.cmd.x.update", b"{}", InvalidSubject),
            ("leads.cmd.020202020202020202020202.call.started", br#"{"timeoutSeconds":-1}"#, InvalidCommand),
        ] {
            let dead = parse(&message(subject, payload)).expect_err(subject);
            assert_eq!(dead.reason, reason, "{subject} {payload:?}: {dead}");
            assert_eq!(dead.sequence, 7);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(subject in ".*", payload: Vec<u8>) {
            let _ = parse(&message(&subject, &payload));
            let _ = parse(&message(UPDATE, &payload));
        }
    }
}

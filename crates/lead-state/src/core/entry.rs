//! 3 Read in order: the entries of the command log's messages, parsed. A message is one entry, or a pack of them. An
//! entry that cannot be parsed is a dead letter with a reason.

use async_nats::HeaderMap;
use bytes::Bytes;
use contract::{
    ObjectId, Timestamp,
    call_result::CallResult,
    command::{CallEnded, CallExpired, CallStarted, EraseLead, LeadCreated, MAX_TEXT_CHARS, UpdateCommand},
    headers, json,
    pack::{self, PackedCommand},
    position::LogPosition,
    subject::{CommandKind, CommandSubject, DeadLetterReason, PACKS},
    trace,
};
use serde::de::DeserializeOwned;

/// A message of the command log or a command of a pack, unparsed.
#[derive(Debug, Clone)]
pub struct LogMessage {
    /// The message's sequence.
    pub sequence: u64,
    /// The command's index in its pack; 0 for a message that is not a pack.
    pub index: u32,
    /// Whether no other command of its pack follows.
    pub ends_message: bool,
    /// When the log stored it.
    pub logged_at: Timestamp,
    pub subject: String,
    pub headers: Option<HeaderMap>,
    pub payload: Bytes,
}

impl LogMessage {
    /// A message of the log.
    pub fn alone(
        sequence: u64,
        logged_at: Timestamp,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Self {
        Self { sequence, index: 0, ends_message: true, logged_at, subject, headers, payload }
    }

    /// Its position in the log with this epoch.
    pub fn position(&self, epoch: i32) -> LogPosition {
        LogPosition { epoch, sequence: self.sequence, index: self.index }
    }

    /// The entries that the message holds, in order: the commands of a pack as if each were a message of its own,
    /// otherwise the message itself. A pack that cannot be read stays one entry, and becomes one dead letter.
    pub fn into_entries(self) -> Vec<Self> {
        if self.subject != PACKS {
            return vec![self];
        }
        let Ok(commands) = pack::read(&self.payload) else { return vec![self] };
        let Self { sequence, logged_at, .. } = self;
        let last = commands.len() - 1;
        let entry = |(index, PackedCommand { subject, traceparent, payload })| {
            let headers = traceparent.map(|traceparent| {
                let mut map = HeaderMap::new();
                map.insert(headers::TRACEPARENT, traceparent);
                map
            });
            Self { sequence, index, ends_message: index as usize == last, logged_at, subject, headers, payload }
        };
        (0..).zip(commands).map(entry).collect()
    }
}

/// An entry of the command log, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Update(UpdateEntry),
    /// Boxed, because it may contain the result of a call, and most entries are updates.
    Call(Box<CallEntry>),
    Erase(Box<EraseEntry>),
    Created(Box<CreatedEntry>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateEntry {
    pub position: LogPosition,
    /// When the log stored it: the time that its decision depends on.
    pub logged_at: Timestamp,
    pub project_id: ObjectId,
    /// The command's own id, or one derived from the log entry.
    pub update_id: ObjectId,
    pub command: Box<UpdateCommand>,
    /// The command's text, for the ledger.
    pub text: Box<str>,
    pub traceparent: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallEntry {
    pub position: LogPosition,
    pub logged_at: Timestamp,
    pub project_id: ObjectId,
    /// The event's own id, or one derived from the log entry.
    pub update_id: ObjectId,
    pub change: CallChange,
    /// The event's text, for the ledger.
    pub text: Box<str>,
    pub traceparent: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EraseEntry {
    pub position: LogPosition,
    pub logged_at: Timestamp,
    pub project_id: ObjectId,
    /// The erasure's own id, or one derived from the log entry.
    pub update_id: ObjectId,
    pub lead_id: ObjectId,
    pub api_key_id: Option<ObjectId>,
    /// The command's text, for the ledger.
    pub text: Box<str>,
    pub traceparent: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedEntry {
    pub position: LogPosition,
    pub logged_at: Timestamp,
    pub project_id: ObjectId,
    pub created: LeadCreated,
    /// The command's text, for the ledger.
    pub text: Box<str>,
    pub traceparent: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallChange {
    Started(CallStarted),
    Ended(CallEnded),
    /// The lead's last call may have expired; the log's time decides whether it has.
    Expired(CallExpired),
}

/// An entry that is published to the dead letters instead of being applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct DeadLetter {
    pub position: LogPosition,
    pub reason: DeadLetterReason,
    pub error: String,
}

impl DeadLetter {
    /// A valid entry that the database cannot store.
    pub fn unapplicable(position: LogPosition, error: String) -> Self {
        Self { position, reason: DeadLetterReason::Unapplicable, error }
    }
}

/// Parses a message of the log with this epoch.
pub fn parse(message: &LogMessage, epoch: i32) -> Result<Entry, DeadLetter> {
    let position = message.position(epoch);
    let logged_at = message.logged_at;
    let dead = |reason, error: String| DeadLetter { position, reason, error };
    if message.subject == PACKS {
        let fault = pack::read(&message.payload).err();
        let fault = fault.map_or_else(|| "a pack within a pack".to_owned(), |fault| fault.to_string());
        return Err(dead(DeadLetterReason::InvalidCommand, fault));
    }
    let subject = CommandSubject::parse(&message.subject)
        .map_err(|e| dead(DeadLetterReason::InvalidSubject, format!("{:?}: {e}", message.subject)))?;
    let text = json::check_command(&message.payload).map_err(|e| dead(DeadLetterReason::InvalidJson, e.to_string()))?;
    let project_id = subject.project_id;
    let own_or_derived =
        |id: Option<ObjectId>| id.unwrap_or_else(|| ObjectId::from_log(message.sequence, message.index, logged_at));
    let traceparent = || traceparent(message.headers.as_ref());
    let change = match subject.kind {
        CommandKind::Update => {
            let command: UpdateCommand = read(text).map_err(|e| dead(DeadLetterReason::InvalidCommand, e))?;
            return Ok(Entry::Update(UpdateEntry {
                position,
                logged_at,
                project_id,
                update_id: own_or_derived(command.update_id),
                command: Box::new(command),
                text: text.trim().into(),
                traceparent: traceparent(),
            }));
        }
        CommandKind::Erase => {
            let EraseLead { update_id, lead_id, api_key_id } =
                read(text).map_err(|e| dead(DeadLetterReason::InvalidCommand, e))?;
            return Ok(Entry::Erase(Box::new(EraseEntry {
                position,
                logged_at,
                project_id,
                update_id: own_or_derived(update_id),
                lead_id,
                api_key_id,
                text: text.trim().into(),
                traceparent: traceparent(),
            })));
        }
        CommandKind::LeadCreated => {
            let created = read(text).map_err(|e| dead(DeadLetterReason::InvalidCommand, e))?;
            let (text, traceparent) = (text.trim().into(), traceparent());
            let entry = CreatedEntry { position, logged_at, project_id, created, text, traceparent };
            return Ok(Entry::Created(Box::new(entry)));
        }
        CommandKind::CallStarted => read(text).and_then(check_call_id).map(CallChange::Started),
        CommandKind::CallEnded => read(text).and_then(check_result).map(CallChange::Ended),
        CommandKind::CallExpired => read(text).map(CallChange::Expired),
    };
    let change = change.map_err(|e| dead(DeadLetterReason::InvalidCommand, e))?;
    let update_id = own_or_derived(match &change {
        CallChange::Started(call) => call.update_id,
        CallChange::Ended(call) => call.update_id,
        CallChange::Expired(_) => None,
    });
    let (text, traceparent) = (text.trim().into(), traceparent());
    let call = CallEntry { position, logged_at, project_id, update_id, change, text, traceparent };
    Ok(Entry::Call(Box::new(call)))
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    if !text.trim_start().starts_with('{') {
        // serde reads a struct from an array, too.
        return Err("the body must be a JSON object".into());
    }
    serde_json::from_str(text).map_err(|e| e.to_string())
}

fn check_call_id(call: CallStarted) -> Result<CallStarted, String> {
    if call.call_id.as_ref().is_some_and(|id| id.chars().count() > MAX_TEXT_CHARS) {
        return Err(format!("callId is longer than {MAX_TEXT_CHARS} characters"));
    }
    Ok(call)
}

fn check_result(call: CallEnded) -> Result<CallEnded, String> {
    match call.result.as_ref().and_then(CallResult::fault) {
        Some(fault) => Err(fault),
        None => Ok(call),
    }
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
        let logged_at = Timestamp::from_millis(1_768_193_759_048);
        LogMessage::alone(7, logged_at, subject.into(), None, Bytes::copy_from_slice(payload))
    }

    const UPDATE: &str = "leads.cmd.020202020202020202020202.update";

    fn parse_update(message: &LogMessage) -> UpdateEntry {
        match parse(message, 3) {
            Ok(Entry::Update(update)) => update,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_update_without_id_gets_one_from_its_log_entry() {
        let update = parse_update(&message(UPDATE, br#" {"leadId":"010101010101010101010101","name":"x"} "#));

        assert_eq!(update.position, LogPosition::message(3, 7));
        assert_eq!(update.project_id, ObjectId::from_bytes([2; 12]));
        assert_eq!(update.update_id, ObjectId::from_log(7, 0, update.logged_at));
        assert_eq!(update.command.name.as_deref(), Some("x"));
        assert_eq!(&*update.text, r#"{"leadId":"010101010101010101010101","name":"x"}"#);
        assert_eq!(update.traceparent, None);
    }

    #[test]
    fn the_commands_update_id_and_trace_are_kept() {
        let mut message = message(UPDATE, br#"{"updateId":"030303030303030303030303"}"#);
        let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut headers = HeaderMap::new();
        headers.insert(headers::TRACEPARENT, trace);
        message.headers = Some(headers);

        let update = parse_update(&message);

        assert_eq!(update.update_id, ObjectId::from_bytes([3; 12]));
        assert_eq!(update.traceparent.as_deref(), Some(trace));
    }

    #[test]
    fn a_call_event_keeps_its_id_and_text() {
        let subject = "leads.cmd.020202020202020202020202.call.ended";
        let own = r#"{"updateId":"030303030303030303030303","leadId":"010101010101010101010101"}"#;
        for (text, id) in
            [(own, ObjectId::from_bytes([3; 12])), ("{}", ObjectId::from_log(7, 0, message("", b"").logged_at))]
        {
            let Ok(Entry::Call(call)) = parse(&message(subject, text.as_bytes()), 3) else { panic!("{text}") };
            assert_eq!((call.update_id, &*call.text), (id, text));
        }
    }

    #[test]
    fn an_invalid_message_is_a_dead_letter_with_a_reason() {
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
            (
                "leads.cmd.020202020202020202020202.lead.created",
                br#"{"leadId":"010101010101010101010101"}"#,
                InvalidCommand,
            ),
            ("leads.cmd.020202020202020202020202.call.started", br#"{"timeoutSeconds":-1}"#, InvalidCommand),
        ] {
            let dead = parse(&message(subject, payload), 3).expect_err(subject);
            assert_eq!(dead.reason, reason, "{subject} {payload:?}: {dead}");
            assert_eq!(dead.position.sequence, 7);
        }
    }

    #[test]
    fn the_commands_of_a_pack_are_entries_of_its_sequence() {
        let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let packed = |subject: &str, traceparent: Option<&str>, payload: &str| PackedCommand {
            subject: subject.into(),
            traceparent: traceparent.map(str::to_owned),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
        };
        let commands = [
            packed(UPDATE, Some(trace), "{}"),
            packed(UPDATE, None, "[]"),
            packed("leads.cmd.x.update", None, "{}"),
            packed(PACKS, None, "{}"),
            packed(UPDATE, None, "{}"),
        ];

        let entries = message(PACKS, &pack::write(&commands).unwrap()).into_entries();

        let parsed: Vec<_> = entries.iter().map(|entry| parse(entry, 3)).collect();
        let places: Vec<_> = entries.iter().map(|entry| (entry.sequence, entry.index, entry.ends_message)).collect();
        assert_eq!(places, [(7, 0, false), (7, 1, false), (7, 2, false), (7, 3, false), (7, 4, true)]);
        let reasons: Vec<_> = parsed.iter().map(|entry| entry.as_ref().err().map(|dead| dead.reason)).collect();
        let (command, subject) = (Some(DeadLetterReason::InvalidCommand), Some(DeadLetterReason::InvalidSubject));
        assert_eq!(reasons, [None, command, subject, command, None]);
        let [Ok(Entry::Update(first)), .., Ok(Entry::Update(last))] = &parsed[..] else { panic!("{parsed:?}") };
        assert_eq!((first.traceparent.as_deref(), last.traceparent.as_deref()), (Some(trace), None));
        assert_eq!(last.position, LogPosition { epoch: 3, sequence: 7, index: 4 });
        assert_ne!(first.update_id, last.update_id, "each has an id of its own");
    }

    #[test]
    fn a_message_that_is_not_a_pack_is_one_entry() {
        for (subject, payload) in [(UPDATE, "{}"), (PACKS, "nonsense"), (PACKS, r#"{"commands":[]}"#)] {
            let entries = message(subject, payload.as_bytes()).into_entries();
            assert_eq!(entries.len(), 1, "{subject} {payload}");
            assert_eq!(parse(&entries[0], 3).is_ok(), subject == UPDATE);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(subject in ".*", payload: Vec<u8>) {
            let _ = parse(&message(&subject, &payload), 3);
            let _ = parse(&message(UPDATE, &payload), 3);
        }
    }
}

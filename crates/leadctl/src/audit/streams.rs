//! What the audit reads of NATS: the log, the events and the dead letters, each once and in order.

use async_nats::HeaderMap;
use contract::{ObjectId, Timestamp, headers, position::EventPosition};
use lead_state::core::entry::{Entry as LogEntry, LogMessage, parse};

use super::store::Scope;

/// An entry of the log.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    pub(crate) kind: EntryKind,
}

/// What an entry is, read as lead-state reads it.
#[derive(Debug, Clone)]
pub(crate) enum EntryKind {
    /// An update: its project and id.
    Update(ObjectId, ObjectId),
    /// A call event.
    Call,
    /// It cannot be read.
    Dead,
}

/// A completion event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) sequence: u64,
    pub(crate) project_id: ObjectId,
    pub(crate) update_id: ObjectId,
    pub(crate) published_at: Timestamp,
    /// How often the announcements had been taken back when it was announced.
    pub(crate) generation: i32,
}

/// A dead letter.
#[derive(Debug, Clone)]
pub(crate) struct Letter {
    pub(crate) origin: Origin,
}

/// Where a dead letter came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// The command log.
    Commands(EventPosition),
    /// The stream of events.
    Events(u64),
}

/// Reads an entry as lead-state does.
pub(crate) fn entry(message: &LogMessage) -> Entry {
    // The epoch plays no part in what an entry is.
    let kind = match parse(message, 0) {
        Ok(LogEntry::Update(update)) => EntryKind::Update(update.project_id, update.update_id),
        Ok(LogEntry::Call(_)) => EntryKind::Call,
        Err(_) => EntryKind::Dead,
    };
    Entry { sequence: message.sequence, kind }
}

/// Reads an event by its subject and headers.
pub(crate) fn event(message: &LogMessage) -> Option<Event> {
    let project_id = message.subject.strip_prefix("leads.evt.")?.split('.').next()?.parse().ok()?;
    // What is announced again has a suffix.
    let update_id = header(message.headers.as_ref(), headers::MESSAGE_ID)?.split('-').next()?.parse().ok()?;
    let position = header(message.headers.as_ref(), headers::POSITION).and_then(|at| at.parse::<EventPosition>().ok());
    let generation = position.map_or(0, |at| at.generation);
    Some(Event { sequence: message.sequence, project_id, update_id, published_at: message.logged_at, generation })
}

/// Reads a dead letter, if it belongs to the scope.
pub(crate) fn letter(message: &LogMessage, scope: &Scope) -> Option<Letter> {
    let header = |name| header(message.headers.as_ref(), name);
    let subject = header(headers::ORIGIN_SUBJECT)?;
    if scope.project_id.is_some_and(|id| !subject.split('.').any(|token| token == id.to_string())) {
        return None;
    }
    let origin = if subject.starts_with("leads.evt.") {
        Origin::Events(header(headers::ORIGIN_SEQUENCE)?.parse().ok()?)
    } else {
        Origin::Commands(header(headers::POSITION)?.parse().ok()?)
    };
    // It was buried after it was logged.
    (scope.from.is_none_or(|from| message.logged_at >= from)).then_some(Letter { origin })
}

fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(|value| value.as_str())
}

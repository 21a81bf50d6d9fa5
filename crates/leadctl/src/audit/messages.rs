//! What the audit reads from the streams.

use async_nats::HeaderMap;
use contract::{ObjectId, Timestamp, headers, position::EventPosition};
use lead_state::core::entry::{Entry as LogEntry, LogMessage, parse};

use super::scope::Scope;

/// An entry of the log, parsed as lead-state parses it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    /// Its index in its pack.
    pub(crate) index: u32,
    pub(crate) logged_at: Timestamp,
    pub(crate) kind: EntryKind,
}

#[derive(Debug, Clone)]
pub(crate) enum EntryKind {
    /// Project and id of an update, a call event, a creation or an erasure.
    Update(ObjectId, ObjectId),
    /// The expiry of a call, which has no ledger row.
    Expiry,
    Unreadable,
}

/// A completion event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) sequence: u64,
    pub(crate) project_id: ObjectId,
    pub(crate) update_id: ObjectId,
    pub(crate) published_at: Timestamp,
    /// How often announcements had been rewound before it was announced.
    pub(crate) generation: i32,
}

/// The message that became a dead letter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum DeadLetterOrigin {
    Commands(EventPosition),
    /// A sequence of LEAD_EVENTS.
    Events(u64),
}

/// What the streams contained when they were read; see `audit` for the order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamBounds {
    /// Whether the log is the stream that the checkpoint belongs to.
    pub(crate) is_checkpoint_stream: bool,
    /// The first sequence in the log after it was read.
    pub(crate) log_first: u64,
    pub(crate) log_last: u64,
    /// Whether the log has no gap between the two.
    pub(crate) log_complete: bool,
    /// No dead letter of an entry that was logged at or after this time was removed.
    pub(crate) letters_since: Timestamp,
    /// When the snapshot was taken, webhook-notifier had acked all events up to this one.
    pub(crate) acked: u64,
    /// The first event in the stream after it was read.
    pub(crate) events_first: u64,
    /// Whether events were purged that may have been acked after the snapshot was taken.
    pub(crate) events_overtaken: bool,
}

pub(crate) fn entry(message: &LogMessage) -> Entry {
    // The epoch does not affect the kind of an entry.
    let kind = match parse(message, 0) {
        Ok(LogEntry::Update(update)) => EntryKind::Update(update.project_id, update.update_id),
        Ok(LogEntry::Call(call)) if call.kind().is_some() => EntryKind::Update(call.project_id, call.update_id),
        Ok(LogEntry::Erase(erase)) => EntryKind::Update(erase.project_id, erase.update_id),
        Ok(LogEntry::Created(created)) => EntryKind::Update(created.project_id, created.created.update_id),
        Ok(LogEntry::Call(_)) => EntryKind::Expiry,
        Err(_) => EntryKind::Unreadable,
    };
    Entry { sequence: message.sequence, index: message.index, logged_at: message.logged_at, kind }
}

/// Parses an event's subject and headers.
pub(crate) fn event(message: &LogMessage) -> Option<Event> {
    let project_id = message.subject.strip_prefix("leads.evt.")?.split('.').next()?.parse().ok()?;
    // The project follows, and a number if the update is announced again.
    let update_id = header(message.headers.as_ref(), headers::MESSAGE_ID)?.split('-').next()?.parse().ok()?;
    let position = header(message.headers.as_ref(), headers::POSITION).and_then(|at| at.parse::<EventPosition>().ok());
    let generation = position.map_or(0, |at| at.generation);
    Some(Event { sequence: message.sequence, project_id, update_id, published_at: message.logged_at, generation })
}

/// Parses the origin of a dead letter; none if the letter is outside the scope.
pub(crate) fn dead_letter_origin(message: &LogMessage, scope: &Scope) -> Option<DeadLetterOrigin> {
    let header = |name| header(message.headers.as_ref(), name);
    let subject = header(headers::ORIGIN_SUBJECT)?;
    if scope.project_id.is_some_and(|id| !subject.split('.').any(|token| token == id.to_string())) {
        return None;
    }
    let origin = if subject.starts_with("leads.evt.") {
        DeadLetterOrigin::Events(header(headers::ORIGIN_SEQUENCE)?.parse().ok()?)
    } else {
        DeadLetterOrigin::Commands(header(headers::POSITION)?.parse().ok()?)
    };
    // A message becomes a dead letter after it was logged.
    scope.from.is_none_or(|from| message.logged_at >= from).then_some(origin)
}

fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(|value| value.as_str())
}

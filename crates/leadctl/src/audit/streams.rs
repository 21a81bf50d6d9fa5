//! Reads the log, the events and the dead letters, each once and in order, into the snapshot.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::{
    self, ErrorCode,
    context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamError, GetStreamErrorKind},
    stream::{InfoError, State, Stream},
};
use contract::{
    Timestamp,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS, NOTIFIER_CONSUMER},
    subject,
};
use lead_state::core::entry::LogMessage;

use super::{
    messages::{StreamBounds, dead_letter_origin, entry, event},
    scope::Scope,
    snapshot::Snapshot,
};
use crate::{
    clients::stream_reader::{CHUNK, StreamReader, repeat},
    output::progress::Progress,
};

/// How long a server that has just become the leader of a stream may report an earlier state.
const NEW_LEADER_PAUSE: Duration = Duration::from_secs(1);

pub(crate) async fn open(js: &jetstream::Context, name: &'static str) -> anyhow::Result<Stream> {
    // Final is an answer that waiting does not change, such as that the stream does not exist.
    let is_final =
        |e: &GetStreamError| matches!(e.kind(), GetStreamErrorKind::JetStream(answer) if answer.code() < 500);
    let stream = repeat(async || js.get_stream(name).await, is_final).await;
    stream.with_context(|| format!("cannot find the stream {name}; lead-state creates it"))
}

/// The sequence up to which webhook-notifier has acked all events.
pub(crate) async fn acked(events: &Stream) -> anyhow::Result<u64> {
    let is_missing = |e: &ConsumerInfoError| match e.kind() {
        ConsumerInfoErrorKind::NotFound => true,
        ConsumerInfoErrorKind::JetStream(e) => e.error_code() == ErrorCode::CONSUMER_NOT_FOUND,
        _ => false,
    };
    match repeat(async || events.consumer_info(NOTIFIER_CONSUMER).await, is_missing).await {
        Ok(consumer) => Ok(consumer.ack_floor.stream_sequence),
        // No webhook-notifier has ever run.
        Err(e) if is_missing(&e) => Ok(0),
        Err(e) => Err(e).context("cannot read the progress of webhook-notifier"),
    }
}

/// The present state of a stream.
async fn state(stream: &Stream) -> Result<State, InfoError> {
    repeat(async || stream.get_info().await, |_| false).await.map(|info| info.state)
}

/// The present state of a stream that contained this sequence before. A server that has just become the leader of a
/// stream may report an earlier end, until it has read the stream completely.
async fn state_reaching(stream: &Stream, sequence: u64) -> Result<State, InfoError> {
    let present = state(stream).await?;
    if present.last_sequence >= sequence {
        return Ok(present);
    }
    tokio::time::sleep(NEW_LEADER_PAUSE).await;
    state(stream).await
}

/// Whether a stream has messages, and no message between its first and its last one was removed.
fn is_contiguous(state: &State) -> bool {
    state.messages > 0 && state.messages == state.last_sequence + 1 - state.first_sequence
}

/// The time from which on a stream has all messages that were ever stored. All that were removed from a full stream are
/// older than its first one; all that were removed from between are no younger than its last one.
fn complete_since(state: &State) -> Timestamp {
    if state.messages == state.last_sequence {
        Timestamp::from_millis(0)
    } else if is_contiguous(state) {
        state.first_timestamp.into()
    } else {
        state.last_timestamp.into()
    }
}

/// Reads the streams into the snapshot. `acked` was read before the snapshot was taken.
pub(crate) async fn read(
    js: &jetstream::Context,
    events: Stream,
    acked: u64,
    snapshot: &mut Snapshot,
    scope: Scope,
    progress: &mut Progress,
) -> anyhow::Result<StreamBounds> {
    let log = open(js, LEAD_COMMANDS).await?;
    let identity = contract::streams::identity(log.cached_info());
    let checkpoint = snapshot.checkpoint.as_ref();
    let applied = checkpoint.filter(|checkpoint| checkpoint.stream_created_at == identity);
    let is_checkpoint_stream = applied.is_some();
    let applied = applied.map_or(0, |checkpoint| checkpoint.last_sequence.unsigned_abs());
    let at_first = state_reaching(&log, applied).await.context("cannot read the state of the log")?;
    let log_last = at_first.last_sequence;
    let log_complete = at_first.messages == 0 || is_contiguous(&at_first);

    let reader = StreamReader {
        stream: &log,
        last: log_last,
        from: scope.from,
        // A pack holds commands of several projects.
        subjects: subject::ALL_COMMANDS.into(),
        headers_only: false,
    };
    let entries = |message: LogMessage| -> Vec<_> {
        if !scope.contains(message.logged_at) {
            return Vec::new();
        }
        message.into_entries().iter().filter(|entry| scope.contains_command(&entry.subject)).map(entry).collect()
    };
    load(reader, snapshot, progress, entries, Snapshot::insert_entries).await?;
    let log_first = state(&log).await.context("cannot read the state of the log")?.first_sequence;

    let last = state_reaching(&events, acked).await.context("cannot read the state of the events")?.last_sequence;
    // An event is published after its update was logged, so reading from `from` on misses none.
    let reader = StreamReader {
        stream: &events,
        last,
        from: scope.from,
        subjects: scope.subjects(subject::ALL_EVENTS, "leads.evt"),
        headers_only: true,
    };
    load(reader, snapshot, progress, |message| event(&message), Snapshot::insert_events).await?;
    let events_first = state(&events).await.context("cannot read the state of the events")?.first_sequence;

    let dead_letters = open(js, LEAD_DEAD_LETTERS).await?;
    let of_letters = &dead_letters.cached_info().state;
    let letters_since = complete_since(of_letters);
    let reader = StreamReader {
        stream: &dead_letters,
        last: of_letters.last_sequence,
        from: scope.from,
        subjects: subject::ALL_DEAD_LETTERS.into(),
        headers_only: true,
    };
    let origin = |message: LogMessage| dead_letter_origin(&message, &scope);
    load(reader, snapshot, progress, origin, Snapshot::insert_dead_letters).await?;
    Ok(StreamBounds {
        is_checkpoint_stream,
        log_first,
        log_last,
        log_complete,
        letters_since,
        acked,
        events_first,
        // Only acked events are purged, but some may have been acked after the snapshot was taken.
        events_overtaken: events_first > acked + 1,
    })
}

/// Reads a stream into a table of the snapshot, in chunks.
async fn load<T, I: IntoIterator<Item = T>>(
    reader: StreamReader<'_>,
    snapshot: &mut Snapshot,
    progress: &mut Progress,
    parse: impl Fn(LogMessage) -> I,
    insert: impl AsyncFn(&mut Snapshot, &[T]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut chunk = Vec::with_capacity(CHUNK);
    reader
        .run(progress, async |message| {
            chunk.extend(parse(message));
            if chunk.len() >= CHUNK {
                insert(snapshot, &chunk).await?;
                chunk.clear();
            }
            Ok(())
        })
        .await?;
    insert(snapshot, &chunk).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A stream that stored `last` messages, of which this many are left.
    fn with_messages(first: u64, last: u64, messages: u64) -> State {
        let state = json!({
            "messages": messages, "bytes": 0, "consumer_count": 0,
            "first_seq": first, "first_ts": "2026-01-01T00:00:00Z",
            "last_seq": last, "last_ts": "2026-02-01T00:00:00Z",
        });
        serde_json::from_value(state).unwrap()
    }

    #[test]
    fn messages_that_are_left_bound_the_age_of_removed_ones() {
        let since = |first, last, messages| complete_since(&with_messages(first, last, messages)).to_iso();

        assert_eq!(since(0, 0, 0), "1970-01-01T00:00:00.000Z", "nothing was stored");
        assert_eq!(since(1, 5, 5), "1970-01-01T00:00:00.000Z", "nothing was removed");
        assert_eq!(since(3, 5, 3), "2026-01-01T00:00:00.000Z", "the oldest were removed");
        assert_eq!(since(1, 5, 4), "2026-02-01T00:00:00.000Z", "one was removed from between");
        assert_eq!(since(6, 5, 0), "2026-02-01T00:00:00.000Z", "all were removed");
    }
}

//! Reads the log, the events and the dead letters, each once and in order, into the snapshot.

use anyhow::Context;
use async_nats::jetstream::{
    self, ErrorCode,
    context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamError, GetStreamErrorKind},
    stream::{InfoError, State, Stream},
};
use contract::{
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
    let at_first = &log.cached_info().state;
    let log_last = at_first.last_sequence;
    let log_complete = at_first.messages == 0 || at_first.messages == log_last + 1 - at_first.first_sequence;
    let identity = contract::streams::identity(log.cached_info());
    let checkpoint = snapshot.checkpoint.as_ref();
    let is_checkpoint_stream = checkpoint.is_some_and(|checkpoint| checkpoint.stream_created_at == identity);

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

    let last = state(&events).await.context("cannot read the state of the events")?.last_sequence;
    // An event is published after its update was logged, so `from` misses none.
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
    let dead_letters_complete = of_letters.messages == of_letters.last_sequence;
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
        dead_letters_complete,
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

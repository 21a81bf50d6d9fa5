//! 3 Read in order: reads the command log from the checkpoint on, without acks.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, ReplayPolicy, pull},
    stream::Stream,
};
use contract::{
    Timestamp,
    position::LogPosition,
    streams::{self, LEAD_COMMANDS},
};
use futures::StreamExt;
use service_kit::nats::retry_backoff;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::{core::entry::LogMessage, recovery::state::logged_at, store::checkpoint::Checkpoint};

/// Limit of the bytes read ahead of the applier. They are held in memory. A slower network needs more to keep the
/// applier busy.
const READ_AHEAD_BYTES: usize = 16 << 20;
const READ_AHEAD_MESSAGES: usize = 4096;
/// Lower bound of the bytes per pull request. The server never sends a message that is larger than the request, so a
/// request is at least as large as the largest message that NATS accepts.
const PULL_BYTES: usize = 8 << 20;
/// Size of a message's subject, reply subject and headers.
const MESSAGE_OVERHEAD: usize = 64 << 10;
/// Memory that an entry of a pack takes in addition to its bytes.
const ENTRY_OVERHEAD: usize = 256;
/// Interval of the server's heartbeats while there is nothing to read. After two missed heartbeats the reader creates
/// its consumer again, because a restarted server has lost the consumer without notice. Each heartbeat costs a message.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a pull request lasts, and how long the server keeps a consumer without one.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// A message read ahead. Its bytes count against the limit until it is dropped.
#[derive(Debug)]
pub(crate) struct ReadMessage {
    /// The entries to apply, at least one.
    pub(crate) entries: Vec<LogMessage>,
    _bytes: OwnedSemaphorePermit,
}

pub(crate) fn channel() -> (mpsc::Sender<ReadMessage>, mpsc::Receiver<ReadMessage>) {
    mpsc::channel(READ_AHEAD_MESSAGES)
}

/// The last message that was read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadPosition {
    sequence: u64,
    /// When the log stored it; None before the first.
    logged_at: Option<Timestamp>,
    /// How many of the message's entries are applied. None if all are, so that reading continues with the next message.
    applied_entries: Option<usize>,
}

impl ReadPosition {
    /// At the checkpoint, which may be inside a pack.
    pub(crate) fn at(checkpoint: &Checkpoint) -> Self {
        let LogPosition { sequence, index, .. } = checkpoint.applied;
        let applied_entries = (!checkpoint.ends_message).then_some(index as usize + 1);
        Self { sequence, logged_at: checkpoint.last_logged_at, applied_entries }
    }

    /// The first sequence to read.
    fn next_sequence(&self) -> u64 {
        if self.applied_entries.is_some() { self.sequence } else { self.sequence + 1 }
    }

    /// The entries of `message` that are not applied yet.
    fn entries_of(&self, message: LogMessage) -> Vec<LogMessage> {
        let applied = self.applied_entries.filter(|_| message.sequence == self.sequence).unwrap_or_default();
        let mut entries = message.into_entries();
        entries.drain(..applied.min(entries.len()));
        entries
    }
}

/// Reads the messages after `last` into a channel, until the channel is closed.
///
/// # Errors
/// When the log was replaced, or has lost entries that were read. The term must end then.
pub(crate) async fn read(
    js: jetstream::Context,
    stream: Stream,
    identity: String,
    mut last: ReadPosition,
    out: mpsc::Sender<ReadMessage>,
) -> anyhow::Result<()> {
    let bytes = Arc::new(Semaphore::new(READ_AHEAD_BYTES));
    let mut delays = retry_backoff();
    loop {
        let before = last.sequence;
        match check_log(&stream, &identity, last).await? {
            Err(e) => tracing::warn!("cannot read the state of {LEAD_COMMANDS}, retrying: {e:#}"),
            Ok(()) => match follow(&js, &stream, &mut last, &bytes, &out).await {
                Ok(()) => return Ok(()),
                Err(e) => tracing::warn!(last = last.sequence, "reading {LEAD_COMMANDS} failed, retrying: {e:#}"),
            },
        }
        if last.sequence > before {
            delays = retry_backoff();
        }
        tokio::time::sleep(delays.next().unwrap_or(MAX_PAUSE)).await;
    }
}

/// Checks that the log still contains the message read last, and continues after it. The inner error is temporary.
async fn check_log(stream: &Stream, identity: &str, last: ReadPosition) -> anyhow::Result<anyhow::Result<()>> {
    let info = match stream.get_info().await {
        Ok(info) => info,
        Err(e) => return Ok(Err(e.into())),
    };
    let ReadPosition { sequence, logged_at: read_at, .. } = last;
    if streams::identity(&info) != identity {
        anyhow::bail!("{LEAD_COMMANDS} was deleted and created again while it was being read");
    }
    if info.state.last_sequence < sequence {
        anyhow::bail!("{LEAD_COMMANDS} ends at {}, but {sequence} was read", info.state.last_sequence);
    }
    if info.state.first_sequence > last.next_sequence() {
        // An operator purged the log, or nats-server before 2.10.5 dropped the oldest entry of an almost full log.
        anyhow::bail!("{LEAD_COMMANDS} begins at {}, but only {sequence} was read", info.state.first_sequence);
    }
    // A log that was restored to an older state and then grew ends late enough, but holds other entries.
    let Some(read_at) = read_at else { return Ok(Ok(())) };
    match logged_at(stream, sequence).await {
        Ok(Some(now)) if now != read_at => {
            anyhow::bail!("entry {sequence} of {LEAD_COMMANDS} is not the one that was read")
        }
        Ok(_) => Ok(Ok(())),
        Err(e) => Ok(Err(e)),
    }
}

/// Reads through one consumer until it fails, or until the channel is closed.
async fn follow(
    js: &jetstream::Context,
    stream: &Stream,
    last: &mut ReadPosition,
    bytes: &Arc<Semaphore>,
    out: &mpsc::Sender<ReadMessage>,
) -> anyhow::Result<()> {
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: last.next_sequence() },
            // The checkpoint in Postgres records the last applied entry, so no entry is acked or redelivered.
            ack_policy: AckPolicy::None,
            replay_policy: ReplayPolicy::Instant,
            memory_storage: true,
            num_replicas: 1,
            inactive_threshold: PULL_EXPIRES,
            ..pull::Config::default()
        })
        .await
        .context("cannot create a consumer")?;
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(READ_AHEAD_MESSAGES)
        .max_bytes_per_batch(PULL_BYTES.max(js.client().server_info().max_payload + MESSAGE_OVERHEAD))
        .expires(PULL_EXPIRES)
        .heartbeat(HEARTBEAT)
        .messages()
        .await
        .context("cannot pull")?;
    let mut expected = 1;
    loop {
        let message = tokio::select! {
            message = messages.next() => message.context("the consumer ended")?.context("the pull failed")?,
            () = out.closed() => return Ok(()),
        };
        let info = message.info().map_err(|e| anyhow::anyhow!("a message has no position in the log: {e}"))?;
        if info.consumer_sequence != expected {
            anyhow::bail!("a message after {} is missing", last.sequence);
        }
        expected += 1;
        let (sequence, logged_at): (_, Timestamp) = (info.stream_sequence, info.published.into());
        if sequence > last.next_sequence() {
            let first = stream.get_info().await.context("cannot read the state of the log")?.state.first_sequence;
            anyhow::ensure!(first <= last.next_sequence(), "the log lost the entries after {}", last.sequence);
            tracing::error!(
                after = last.sequence,
                before = sequence,
                "entries of {LEAD_COMMANDS} were deleted and are not applied"
            );
        }
        let async_nats::Message { subject, payload, headers, length, .. } = message.message;
        let message = LogMessage::alone(sequence, logged_at, subject.into_string(), headers, payload);
        let entries = last.entries_of(message);
        // The checkpoint is inside a longer message, so this is a message of another log. The next term diagnoses that.
        anyhow::ensure!(!entries.is_empty(), "entry {sequence} has fewer commands than were applied from it");
        let weight = length.saturating_add((entries.len() - 1) * ENTRY_OVERHEAD).clamp(1, READ_AHEAD_BYTES);
        let permit = bytes.clone().acquire_many_owned(u32::try_from(weight).unwrap_or(u32::MAX));
        let permit = permit.await.context("the read-ahead ended")?;
        if out.send(ReadMessage { entries, _bytes: permit }).await.is_err() {
            return Ok(());
        }
        *last = ReadPosition { sequence, logged_at: Some(logged_at), applied_entries: None };
    }
}

#[cfg(test)]
mod tests {
    use contract::{
        pack::{self, PackedCommand},
        subject::PACKS,
    };

    use super::*;

    fn message(sequence: u64, subject: &str, payload: bytes::Bytes) -> LogMessage {
        let logged_at = Timestamp::from_millis(1_000);
        LogMessage::alone(sequence, logged_at, subject.into(), None, payload)
    }

    fn pack(sequence: u64, commands: usize) -> LogMessage {
        let command = PackedCommand { subject: "s".into(), traceparent: None, payload: "{}".into() };
        message(sequence, PACKS, pack::write(&vec![command; commands]).expect("a pack"))
    }

    fn at(sequence: u64, index: u32, ends_message: bool) -> ReadPosition {
        ReadPosition::at(&Checkpoint {
            stream: LEAD_COMMANDS.into(),
            stream_created_at: "l".into(),
            generation: 0,
            applied: LogPosition { epoch: 1, sequence, index },
            last_logged_at: None,
            ends_message,
            announced: LogPosition::default(),
            delivered: LogPosition::default(),
            events_created_at: None,
        })
    }

    #[test]
    fn reading_continues_behind_the_applied_entries_of_a_pack() {
        let indexes = |at: ReadPosition, message: LogMessage| -> Vec<u32> {
            at.entries_of(message).iter().map(|entry| entry.index).collect()
        };
        let next = [at(0, 0, true), at(7, 1, true), at(7, 1, false)].map(|at| at.next_sequence());
        assert_eq!(next, [1, 8, 7]);

        assert_eq!(indexes(at(7, 1, false), pack(7, 4)), [2, 3]);
        assert_eq!(indexes(at(7, 1, false), pack(7, 2)), [0; 0], "it holds less than was applied");
        assert_eq!(indexes(at(7, 1, false), pack(8, 2)), [0, 1], "an operator deleted the rest");
        assert_eq!(indexes(at(7, 1, true), pack(8, 2)), [0, 1]);
        assert_eq!(indexes(at(7, 0, true), message(8, "s", "{}".into())), [0]);
    }
}

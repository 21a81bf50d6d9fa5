//! 3 Read in order: the command log from the checkpoint on, without acks.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, ReplayPolicy, pull},
    stream::Stream,
};
use contract::{
    Timestamp,
    streams::{self, LEAD_COMMANDS},
};
use futures::StreamExt;
use service_kit::nats::retry_backoff;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::{core::entry::LogMessage, recovery};

/// Most bytes of messages that are read ahead of the applier. More keeps it busy over a slower network, and is held
/// in memory.
const READ_AHEAD_BYTES: usize = 16 << 20;
/// Most messages that are read ahead.
const READ_AHEAD_MESSAGES: usize = 4096;
/// Least bytes asked of the server at once; at least one message of the largest that NATS takes must fit, or it is never
/// sent.
const PULL_BYTES: usize = 8 << 20;
/// What a message has beside its payload: subject, reply subject, headers.
const MESSAGE_OVERHEAD: usize = 64 << 10;
/// How often the server says something when there is nothing to read. After two of these without a word the consumer is made
/// anew: a server that was restarted knows nothing of it, and does not say so. Shorter costs a message each.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a pull stands before the next one, and how long the server keeps a consumer that nobody pulls from.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// How long the reader waits before it tries again, at most.
const PAUSE: Duration = Duration::from_secs(2);

/// A message that was read ahead; its bytes count until it is dropped.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) message: LogMessage,
    _bytes: OwnedSemaphorePermit,
}

/// Makes the channel that [`read`] fills.
pub(crate) fn channel() -> (mpsc::Sender<Read>, mpsc::Receiver<Read>) {
    mpsc::channel(READ_AHEAD_MESSAGES)
}

/// Reads the log behind `after` into a channel, until the channel is closed; `after_at` is when the log stored that entry.
///
/// # Errors
/// When the log is not the one that it was, or lost what was already read: then the term must end.
pub(crate) async fn read(
    js: jetstream::Context,
    stream: Stream,
    identity: String,
    (mut after, mut after_at): (u64, Option<Timestamp>),
    out: mpsc::Sender<Read>,
) -> anyhow::Result<()> {
    let bytes = Arc::new(Semaphore::new(READ_AHEAD_BYTES));
    let mut delays = retry_backoff();
    loop {
        let info = match stream.get_info().await {
            Ok(info) => info,
            Err(e) => {
                tracing::warn!("cannot read the state of {LEAD_COMMANDS}, trying again: {e}");
                tokio::time::sleep(delays.next().unwrap_or(PAUSE)).await;
                continue;
            }
        };
        if streams::identity(&info) != identity {
            anyhow::bail!("{LEAD_COMMANDS} was made anew while it was being read");
        }
        if info.state.last_sequence < after {
            anyhow::bail!("{LEAD_COMMANDS} ends at {}, but {after} was read", info.state.last_sequence);
        }
        if info.state.first_sequence > after + 1 {
            // nats-server before 2.10.5 drops the oldest entry of a log that is all but full; or somebody purged it.
            let first = info.state.first_sequence;
            anyhow::bail!("{LEAD_COMMANDS} begins at {first}, but only {after} was read");
        }
        // A log that was set back and went on from there ends late enough, and is another.
        if let Some(was) = after_at {
            match recovery::logged_at(&stream, after).await {
                Ok(Some(is)) if was != is => {
                    anyhow::bail!("entry {after} of {LEAD_COMMANDS} is not the one that was read");
                }
                Ok(_) => {}
                Err(e) => {
                    tracing::warn!("cannot read {LEAD_COMMANDS}, trying again: {e:#}");
                    tokio::time::sleep(delays.next().unwrap_or(PAUSE)).await;
                    continue;
                }
            }
        }
        let before = after;
        match follow(&js, &stream, (&mut after, &mut after_at), &bytes, &out).await {
            Ok(()) => return Ok(()),
            Err(e) => tracing::warn!(after, "reading {LEAD_COMMANDS} was interrupted, going on: {e:#}"),
        }
        if after > before {
            delays = retry_backoff();
        }
        tokio::time::sleep(delays.next().unwrap_or(PAUSE)).await;
    }
}

/// Reads through one consumer until it fails; returns when nobody wants more.
async fn follow(
    js: &jetstream::Context,
    stream: &Stream,
    (after, after_at): (&mut u64, &mut Option<Timestamp>),
    bytes: &Arc<Semaphore>,
    out: &mpsc::Sender<Read>,
) -> anyhow::Result<()> {
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: *after + 1 },
            // The checkpoint in Postgres says what was read; nothing is acked, and nothing sent again.
            ack_policy: AckPolicy::None,
            replay_policy: ReplayPolicy::Instant,
            memory_storage: true,
            num_replicas: 1,
            inactive_threshold: PULL_EXPIRES,
            ..pull::Config::default()
        })
        .await
        .context("cannot make a consumer")?;
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
        let info = message.info().map_err(|e| anyhow::anyhow!("a message without its place in the log: {e}"))?;
        if info.consumer_sequence != expected {
            anyhow::bail!("a message is missing behind {after}");
        }
        expected += 1;
        let (sequence, logged_at): (_, Timestamp) = (info.stream_sequence, info.published.into());
        if sequence != *after + 1 {
            let first = stream.get_info().await.context("cannot read the state of the log")?.state.first_sequence;
            anyhow::ensure!(first <= *after + 1, "the log lost what is behind {after}");
            tracing::error!(
                behind = *after,
                before = sequence,
                "somebody deleted entries from {LEAD_COMMANDS}: they are not applied"
            );
        }
        let async_nats::Message { subject, payload, headers, length, .. } = message.message;
        let weight = u32::try_from(length.clamp(1, READ_AHEAD_BYTES)).unwrap_or(u32::MAX);
        let permit = bytes.clone().acquire_many_owned(weight).await.context("the read-ahead ended")?;
        let message = LogMessage { sequence, logged_at, subject: subject.into_string(), headers, payload };
        if out.send(Read { message, _bytes: permit }).await.is_err() {
            return Ok(());
        }
        (*after, *after_at) = (sequence, Some(logged_at));
    }
}

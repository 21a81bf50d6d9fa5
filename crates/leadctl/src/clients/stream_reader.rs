//! Reads a stream once and in order, without acks.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use async_nats::jetstream::{
    consumer::{AckPolicy, DeliverPolicy, ReplayPolicy, pull},
    stream::Stream,
};
use contract::Timestamp;
use futures::StreamExt;
use lead_state::core::entry::LogMessage;
use service_kit::clock;

use crate::output::progress::Progress;

/// Messages per pull and per insert. A larger number takes fewer statements and more memory.
pub(crate) const CHUNK: usize = 5_000;
/// Bytes per pull; must be more than the largest message.
const PULL_BYTES: usize = 16 << 20;
/// How long the server may be silent before the stream is checked for a purge.
const SILENCE: Duration = Duration::from_secs(10);

pub(crate) struct StreamReader<'a> {
    pub(crate) stream: &'a Stream,
    /// The last sequence to read.
    pub(crate) last: u64,
    /// Read only messages stored at or after this time.
    pub(crate) from: Option<Timestamp>,
    pub(crate) subjects: String,
    pub(crate) headers_only: bool,
}

/// Why reading ended early.
enum ReadError {
    /// The consumer does not exist yet, or any more: reading can continue with another one.
    Interrupted(anyhow::Error),
    Failed(anyhow::Error),
}

impl ReadError {
    fn interrupted(error: impl Into<anyhow::Error>, what: String) -> Self {
        Self::Interrupted(error.into().context(what))
    }
}

impl StreamReader<'_> {
    /// Reads the stream and passes every message to `each`. A consumer lives on one server: when it is lost, or does
    /// not answer yet, another one continues after the last message.
    pub(crate) async fn run(
        self,
        progress: &mut Progress,
        mut each: impl AsyncFnMut(LogMessage) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut read_up_to = None;
        let mut interruptions = Patience::default();
        loop {
            let before = read_up_to;
            match self.read(&mut read_up_to, progress, &mut each).await {
                Ok(()) => return Ok(()),
                Err(ReadError::Failed(error)) => return Err(error),
                Err(ReadError::Interrupted(error)) => {
                    if read_up_to != before {
                        interruptions = Patience::default();
                    }
                    interruptions.pause(error).await?;
                }
            }
        }
    }

    /// Continues reading with a new consumer.
    async fn read(
        &self,
        read_up_to: &mut Option<u64>,
        progress: &mut Progress,
        each: &mut impl AsyncFnMut(LogMessage) -> anyhow::Result<()>,
    ) -> Result<(), ReadError> {
        let name = &self.stream.cached_info().config.name;
        let cannot_read = || format!("cannot read {name}");
        let deliver_policy = match (*read_up_to, self.from) {
            (Some(sequence), _) => DeliverPolicy::ByStartSequence { start_sequence: sequence + 1 },
            (None, Some(from)) => DeliverPolicy::ByStartTime { start_time: from.into() },
            (None, None) => DeliverPolicy::All,
        };
        let consumer = self.stream.create_consumer(pull::Config {
            deliver_policy,
            ack_policy: AckPolicy::None,
            replay_policy: ReplayPolicy::Instant,
            filter_subject: self.subjects.clone(),
            headers_only: self.headers_only,
            memory_storage: true,
            num_replicas: 1,
            inactive_threshold: SILENCE * 3,
            ..pull::Config::default()
        });
        let consumer = consumer.await.map_err(|e| ReadError::interrupted(e, cannot_read()))?;
        let mut left = consumer.cached_info().num_pending;
        let messages = consumer
            .stream()
            .max_messages_per_batch(CHUNK)
            .max_bytes_per_batch(PULL_BYTES)
            .expires(SILENCE * 3)
            .heartbeat(SILENCE / 2)
            .messages();
        let mut messages = messages.await.map_err(|e| ReadError::interrupted(e, cannot_read()))?;
        let mut expected = 1;
        while left > 0 {
            let message = match tokio::time::timeout(SILENCE, messages.next()).await {
                Ok(Some(message)) => message.map_err(|e| ReadError::interrupted(e, cannot_read()))?,
                Ok(None) => return Err(ReadError::Interrupted(anyhow!("{name} ended"))),
                // The stream may have been purged meanwhile.
                Err(_) => {
                    let info = self.stream.get_info().await.map_err(|e| ReadError::interrupted(e, cannot_read()))?;
                    if info.state.messages == 0 || info.state.first_sequence > self.last {
                        return Ok(());
                    }
                    let silent = anyhow!("{name} sent no message for {SILENCE:?}; check that NATS is healthy");
                    return Err(ReadError::Interrupted(silent));
                }
            };
            let info = message
                .info()
                .map_err(|e| ReadError::Failed(anyhow!("cannot read the metadata of a message of {name}: {e}")))?;
            if info.consumer_sequence != expected {
                return Err(ReadError::Interrupted(anyhow!("a message of {name} was lost on the way")));
            }
            expected += 1;
            let (sequence, logged_at, pending) = (info.stream_sequence, info.published.into(), info.pending);
            if sequence > self.last {
                return Ok(());
            }
            left = pending.min(self.last - sequence);
            let async_nats::Message { subject, payload, headers, .. } = message.message;
            let message = LogMessage::alone(sequence, logged_at, subject.into_string(), headers, payload);
            each(message).await.map_err(ReadError::Failed)?;
            *read_up_to = Some(sequence);
            progress.stream_read(name, left);
        }
        Ok(())
    }
}

/// How long to retry what a cluster of NATS servers refuses temporarily: longer than an election takes.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(250);

/// Limits how long a failed request is retried.
#[derive(Default)]
struct Patience {
    since: Option<Instant>,
}

impl Patience {
    /// Waits before the next attempt.
    ///
    /// # Errors
    /// `error`, once it was retried for long enough.
    async fn pause<E>(&mut self, error: E) -> Result<(), E> {
        if self.since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return Err(error);
        }
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }
}

/// Repeats an attempt for a while, unless its error is final.
pub(crate) async fn repeat<T, E>(
    attempt: impl AsyncFn() -> Result<T, E>,
    is_final: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let mut patience = Patience::default();
    loop {
        match attempt().await {
            Err(error) if !is_final(&error) => patience.pause(error).await?,
            ended => return ended,
        }
    }
}

/// The age of a message; none if the stream does not have it.
pub(crate) async fn age_of(stream: &Stream, sequence: u64) -> Option<Duration> {
    let stored: Timestamp = stream.get_raw_message(sequence).await.ok()?.time.into();
    Some(Duration::from_millis(u64::try_from(clock::now().millis() - stored.millis()).unwrap_or_default()))
}

//! Reads a stream once and in order, without acks.

use std::time::Duration;

use anyhow::{Context, bail};
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

impl StreamReader<'_> {
    /// Reads the stream and passes every message to `each`.
    pub(crate) async fn run(
        self,
        progress: &mut Progress,
        mut each: impl AsyncFnMut(LogMessage) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let name = self.stream.cached_info().config.name.clone();
        let deliver_policy = match self.from {
            Some(from) => DeliverPolicy::ByStartTime { start_time: from.into() },
            None => DeliverPolicy::All,
        };
        let consumer = self
            .stream
            .create_consumer(pull::Config {
                deliver_policy,
                ack_policy: AckPolicy::None,
                replay_policy: ReplayPolicy::Instant,
                filter_subject: self.subjects,
                headers_only: self.headers_only,
                memory_storage: true,
                num_replicas: 1,
                inactive_threshold: SILENCE * 3,
                ..pull::Config::default()
            })
            .await
            .with_context(|| format!("cannot read {name}"))?;
        let mut left = consumer.cached_info().num_pending;
        let mut messages = consumer
            .stream()
            .max_messages_per_batch(CHUNK)
            .max_bytes_per_batch(PULL_BYTES)
            .expires(SILENCE * 3)
            .heartbeat(SILENCE / 2)
            .messages()
            .await
            .with_context(|| format!("cannot read {name}"))?;
        let mut expected = 1;
        while left > 0 {
            let message = match tokio::time::timeout(SILENCE, messages.next()).await {
                Ok(message) => message.with_context(|| format!("{name} ended"))?,
                // The stream may have been purged meanwhile.
                Err(_) => {
                    let info = self.stream.get_info().await.with_context(|| format!("cannot read {name}"))?;
                    if info.state.messages == 0 || info.state.first_sequence > self.last {
                        return Ok(());
                    }
                    bail!("{name} sent no message for {SILENCE:?}; check that NATS is healthy");
                }
            };
            let message = message.with_context(|| format!("reading {name} was interrupted"))?;
            let info =
                message.info().map_err(|e| anyhow::anyhow!("cannot read the metadata of a message of {name}: {e}"))?;
            if info.consumer_sequence != expected {
                bail!("a message of {name} was lost on the way; run the command again");
            }
            expected += 1;
            let (sequence, logged_at, pending) = (info.stream_sequence, info.published.into(), info.pending);
            if sequence > self.last {
                return Ok(());
            }
            left = pending.min(self.last - sequence);
            let async_nats::Message { subject, payload, headers, .. } = message.message;
            each(LogMessage { sequence, logged_at, subject: subject.into_string(), headers, payload }).await?;
            progress.stream_read(&name, left);
        }
        Ok(())
    }
}

/// The age of a message; none if the stream does not have it.
pub(crate) async fn age_of(stream: &Stream, sequence: u64) -> Option<Duration> {
    let stored: Timestamp = stream.get_raw_message(sequence).await.ok()?.time.into();
    Some(Duration::from_millis(u64::try_from(clock::now().millis() - stored.millis()).unwrap_or_default()))
}

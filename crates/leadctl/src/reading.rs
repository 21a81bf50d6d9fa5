//! Reading what a stream holds, once and in order, without acks.

use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::jetstream::{
    consumer::{AckPolicy, DeliverPolicy, ReplayPolicy, pull},
    stream::Stream,
};
use contract::Timestamp;
use futures::StreamExt;
use lead_state::core::entry::LogMessage;

use crate::progress::Progress;

/// How many messages are kept at once. More saves statements, and is held in memory.
pub(crate) const CHUNK: usize = 5_000;
/// Most bytes asked of the server at once; one message of the largest size must fit.
const PULL_BYTES: usize = 16 << 20;
/// How long the server may be silent before it is asked whether there is anything left.
const SILENCE: Duration = Duration::from_secs(10);

/// What is read of a stream.
pub(crate) struct Reading<'a> {
    /// The stream.
    pub(crate) stream: &'a Stream,
    /// The last sequence that is read.
    pub(crate) last: u64,
    /// From when on.
    pub(crate) from: Option<Timestamp>,
    /// Only these subjects.
    pub(crate) subjects: String,
    /// Without bodies.
    pub(crate) headers_only: bool,
}

impl Reading<'_> {
    /// Reads it, and gives every message to `each`, which may keep what it makes of it.
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
                // Purged while it was being read?
                Err(_) => {
                    let info = self.stream.get_info().await.with_context(|| format!("cannot read {name}"))?;
                    if info.state.messages == 0 || info.state.first_sequence > self.last {
                        return Ok(());
                    }
                    bail!("{name} does not send what it holds");
                }
            };
            let message = message.with_context(|| format!("reading {name} was interrupted"))?;
            let info = message.info().map_err(|e| anyhow::anyhow!("a message of {name} without its place: {e}"))?;
            if info.consumer_sequence != expected {
                bail!("a message of {name} went astray");
            }
            expected += 1;
            let (sequence, logged_at, pending) = (info.stream_sequence, info.published.into(), info.pending);
            if sequence > self.last {
                return Ok(());
            }
            left = pending.min(self.last - sequence);
            let async_nats::Message { subject, payload, headers, .. } = message.message;
            each(LogMessage { sequence, logged_at, subject: subject.into_string(), headers, payload }).await?;
            progress.read(&name, left);
        }
        Ok(())
    }
}

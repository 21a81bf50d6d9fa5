//! 7 Deliver: pulls completion events from `LEAD_EVENTS` and acknowledges them.
//!
//! Every event is a task of its own, so no event waits for the endpoint of another. An event is acknowledged once all
//! its deliveries are recorded.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream::{
    self, AckKind,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
    message::Acker,
    stream::Stream,
};
use contract::streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER, ORDER_CONSUMER};
use futures::StreamExt;
use service_kit::{
    health::Readiness,
    lifecycle::drain,
    nats::{error_chain, retry_backoff},
};
use tokio::{sync::OwnedSemaphorePermit, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::event::{AckDecision, ConsumerRole, EventDispatcher, EventMeta};

/// How soon an event without an ack is redelivered. Progress acks extend it, so it only delays events after a crash.
/// With a shorter wait, events of a notifier that stalls would be redelivered.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// How often a progress ack is sent: often enough that losing one does no harm.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of unacknowledged events of all notifiers together. A higher maximum keeps more replicas busy; with a
/// lower one, fewer events are delivered twice after a crash.
const MAX_ACK_PENDING: i64 = 4096;
/// The size of a pull. At most about twice as much is buffered here.
const PULL_MESSAGES: usize = 256;
const PULL_BYTES: usize = 8 * 1024 * 1024;
/// How long a pull waits at the server, and how long it may be silent before the connection counts as lost.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const PULL_HEARTBEAT: Duration = Duration::from_secs(5);
/// How soon an event that could not be handled is redelivered.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// `ACK_WAIT` and `PROGRESS_INTERVAL` of [`ConsumerRole::RecordOrdered`]: an unrecorded event delays all later ordered
/// deliveries.
const RECORD_ACK_WAIT: Duration = Duration::from_secs(6);
const RECORD_PROGRESS_INTERVAL: Duration = Duration::from_secs(2);
/// How long the consumer of ordered events is kept while no notifier pulls. If it were kept longer, events that were
/// recorded long ago would be read again.
const ORDER_CONSUMER_RETENTION: Duration = Duration::from_secs(30);
/// How often the notifier checks whether any callback is ordered.
const ORDER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

fn progress_interval(role: ConsumerRole) -> Duration {
    match role {
        ConsumerRole::Deliver => PROGRESS_INTERVAL,
        ConsumerRole::RecordOrdered => RECORD_PROGRESS_INTERVAL,
    }
}

pub(crate) struct EventConsumer {
    dispatcher: EventDispatcher,
    readiness: Readiness,
}

impl EventConsumer {
    pub(crate) fn new(dispatcher: EventDispatcher, readiness: Readiness) -> Arc<Self> {
        Arc::new(Self { dispatcher, readiness })
    }

    fn role(&self) -> ConsumerRole {
        self.dispatcher.role
    }

    /// Consumes events until shutdown, then lets those in flight finish.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut events = JoinSet::new();
        let consumed = tokio::select! {
            consumed = self.pull(&mut events) => consumed,
            () = shutdown.cancelled() => Ok(()),
        };
        drain(events).await?;
        consumed
    }

    /// Pulls forever; after an error, with a new consumer.
    async fn pull(self: &Arc<Self>, events: &mut JoinSet<()>) -> anyhow::Result<()> {
        let mut delays = retry_backoff();
        let mut highest_sequence = 0;
        loop {
            if !self.is_needed() {
                self.readiness.ready(self.role().readiness());
                tokio::time::sleep(ORDER_CHECK_INTERVAL).await;
                continue;
            }
            let stopped = self.pull_consumer(events, &mut highest_sequence, || delays = retry_backoff()).await?;
            if !self.is_needed() {
                continue;
            }
            tracing::warn!("the pull of events stopped, starting again: {stopped}");
            self.readiness.not_ready(self.role().readiness(), stopped);
            tokio::time::sleep(delays.next().unwrap_or(PULL_HEARTBEAT)).await;
        }
    }

    /// Pulls until the pull stops; returns why. Fails only when the task of an event died.
    async fn pull_consumer(
        self: &Arc<Self>,
        events: &mut JoinSet<()>,
        highest_sequence: &mut u64,
        mut on_message: impl FnMut(),
    ) -> anyhow::Result<String> {
        let (mut messages, stream) = match self.messages().await {
            Ok(messages) => messages,
            Err(e) => return Ok(format!("{e:#}")),
        };
        self.readiness.ready(self.role().readiness());
        let mut order_check = tokio::time::interval(ORDER_CHECK_INTERVAL);
        loop {
            let message = tokio::select! {
                Some(ended) = events.join_next() => {
                    ended.context("the task of an event died")?;
                    continue;
                }
                message = messages.next() => message,
                _ = order_check.tick() => match self.is_needed() {
                    true => continue,
                    false => return Ok("no callback is ordered any more".into()),
                },
            };
            let message = match message {
                Some(Ok(message)) => message,
                Some(Err(e)) => return Ok(error_chain(&e)),
                None => return Ok("the pull ended".into()),
            };
            on_message();
            let meta = match EventMeta::read(&message, &stream, highest_sequence) {
                Ok(meta) => meta,
                Err(e) => {
                    tracing::error!("a message without JetStream metadata arrived with the events: {e}");
                    continue;
                }
            };
            let memory = self.dispatcher.memory.acquire(message.payload.len()).await?;
            let consumer = self.clone();
            // Boxed, since the runtime moves the future several times.
            events.spawn(Box::pin(async move { consumer.handle(message, meta, memory).await }));
        }
    }

    fn is_needed(&self) -> bool {
        self.role() == ConsumerRole::Deliver || self.dispatcher.deliverer.callbacks.any_ordered()
    }

    /// Creates or updates the consumer, and starts to pull. Also returns the stream's identity.
    async fn messages(&self) -> anyhow::Result<(pull::Stream, Arc<str>)> {
        let stream = self.dispatcher.js.get_stream(LEAD_EVENTS).await.context("cannot find the stream LEAD_EVENTS")?;
        let consumer = match self.role() {
            ConsumerRole::Deliver => Self::consumer(&stream).await?,
            ConsumerRole::RecordOrdered => Self::order_consumer(&stream).await?,
        };
        let messages = consumer
            .stream()
            .max_messages_per_batch(PULL_MESSAGES)
            .max_bytes_per_batch(PULL_BYTES)
            .expires(PULL_EXPIRES)
            .heartbeat(PULL_HEARTBEAT)
            .messages();
        Ok((messages.await.context("cannot pull events")?, streams::identity(stream.cached_info()).into()))
    }

    async fn consumer(stream: &Stream) -> anyhow::Result<PullConsumer> {
        let config = pull::Config {
            durable_name: Some(NOTIFIER_CONSUMER.into()),
            description: Some("Delivers events to callbacks; shared by all webhook-notifiers".into()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: MAX_ACK_PENDING,
            ..Default::default()
        };
        stream.create_consumer(config).await.with_context(|| format!("cannot create the consumer {NOTIFIER_CONSUMER}"))
    }

    /// The consumer of ordered events starts after the ack floor of the delivering one: earlier events are recorded.
    async fn order_consumer(stream: &Stream) -> anyhow::Result<PullConsumer> {
        if stream.consumer_info(ORDER_CONSUMER).await.is_ok() {
            let found = stream.get_consumer(ORDER_CONSUMER).await;
            return found.map_err(|e| anyhow::anyhow!("cannot find the consumer {ORDER_CONSUMER}: {e}"));
        }
        let main = stream.consumer_info(NOTIFIER_CONSUMER).await;
        let main = main.with_context(|| format!("cannot read the state of the consumer {NOTIFIER_CONSUMER}"))?;
        let config = pull::Config {
            durable_name: Some(ORDER_CONSUMER.into()),
            description: Some("Records the deliveries of ordered callbacks; shared by all webhook-notifiers".into()),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: main.ack_floor.stream_sequence + 1 },
            ack_policy: AckPolicy::Explicit,
            ack_wait: RECORD_ACK_WAIT,
            max_ack_pending: MAX_ACK_PENDING,
            inactive_threshold: ORDER_CONSUMER_RETENTION,
            ..Default::default()
        };
        stream.create_consumer(config).await.with_context(|| format!("cannot create the consumer {ORDER_CONSUMER}"))
    }

    /// Dispatches an event and acknowledges it.
    async fn handle(&self, message: jetstream::Message, meta: EventMeta, _memory: OwnedSemaphorePermit) {
        let sequence = meta.sequence;
        let (message, acker) = message.split();
        let dispatch = self.dispatcher.dispatch(message, meta);
        let kind = match with_progress_acks(&acker, progress_interval(self.role()), dispatch).await {
            AckDecision::Ack => AckKind::Ack,
            AckDecision::DeadLettered(error) => {
                tracing::error!(sequence, "an event was published to LEAD_DEAD_LETTERS: {error}");
                AckKind::Term
            }
            AckDecision::RetryLater(reason) => {
                tracing::warn!(sequence, "an event is retried later: {reason}");
                AckKind::Nak(Some(RETRY_DELAY))
            }
            AckDecision::Stopping => AckKind::Nak(None),
        };
        if let Err(e) = acker.ack_with(kind).await {
            // The event is redelivered, and its recorded deliveries are found then.
            tracing::warn!(sequence, "cannot acknowledge an event: {e}");
        }
    }
}

/// Sends progress acks while the work goes on.
async fn with_progress_acks<T>(acker: &Acker, interval: Duration, work: impl Future<Output = T>) -> T {
    let progress = async {
        loop {
            tokio::time::sleep(interval).await;
            if let Err(e) = acker.ack_with(AckKind::Progress).await {
                tracing::debug!("cannot send a progress ack: {e}");
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = progress => unreachable!("progress acks never end"),
    }
}

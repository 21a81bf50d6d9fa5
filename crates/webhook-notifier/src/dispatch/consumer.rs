//! 7 Deliver: events come from `LEAD_EVENTS`; the first attempt for each callback runs straight off the event.
//!
//! Every event is a task of its own, so none waits for another's endpoint. An attempt that finds no slot soon, or is
//! over its callback's rate, or meets an open breaker, is spilled: recorded as due now, for the retries. The event is acked when every delivery of it is recorded.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream::{
    self, AckKind,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
    message::Acker,
    stream::Stream,
};
use contract::{
    Timestamp,
    event::{CompletionEvent, WebhookPayload},
    headers, json,
    position::{EventPosition, LogPosition},
    process::Ordering,
    streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER, ORDER_CONSUMER},
    subject::DeadLetterReason,
    trace::is_traceparent,
};
use futures::{StreamExt, future::try_join_all};
use service_kit::{
    clock,
    health::Readiness,
    lifecycle::drain,
    nats::{error_chain, retry_backoff},
    traces::{Span, Step},
};
use sqlx::PgPool;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::{Target, Unreadable},
    core::delivery::{Delivery, Order, Origin},
    deliver::Deliverer,
    dispatch::dead_letter::{self, DeadLetter},
    recorder::Stopping,
    store,
};

/// After how long an event that nobody acked is given out again. Whoever works on it asks for more time meanwhile, so
/// this is only how long a crash delays: shorter costs needless redeliveries when a notifier stalls.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// How often more time is asked for: often enough that one lost request does no harm.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Most events that are given out and not acked, of all notifiers. More keeps more replicas busy, fewer are told twice
/// after a crash.
const MAX_ACK_PENDING: i64 = 4096;
/// How much is asked of JetStream at once; what is buffered here is at most about twice that.
const PULL_MESSAGES: usize = 256;
const PULL_BYTES: usize = 8 * 1024 * 1024;
/// How long a pull waits at the server, and how long it may be silent before the connection counts as lost.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const PULL_HEARTBEAT: Duration = Duration::from_secs(5);
/// Room for the events under way, in units of 16 KiB begun. When it is used up the pull waits: more bridges longer
/// pauses of Postgres, less holds less memory.
const ROOM: u32 = 1024;
const BYTES_PER_UNIT: usize = 16 * 1024;
/// How long an event waits for a slot of its callback before it is spilled. Longer rides out bursts without a detour
/// through Postgres, shorter keeps fewer events of slow endpoints in memory.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an event waits for its process to reach the bucket, which follows Postgres by a moment. Longer holds the
/// events of a process that was removed, shorter may pass over the callbacks of one that was just made.
const PROJECTION_GRACE: Duration = Duration::from_secs(5);
/// When to look again at what could not be decided now.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The same two for events that are only recorded. The order of all that comes later waits for them.
const RECORD_WAIT: Duration = Duration::from_secs(6);
const RECORD_PROGRESS: Duration = Duration::from_secs(2);
/// How long the consumer of what has an order stays when nobody pulls. Longer reads again what was recorded long ago.
const ORDER_CONSUMER_KEPT: Duration = Duration::from_secs(30);
/// How often it is looked whether a callback has an order.
const ORDER_INTERVAL: Duration = Duration::from_secs(1);

/// The readiness condition that is met while events are pulled.
pub(crate) const READY: &str = "events";

/// Which part of the work. Both read all events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Every callback is told, or its delivery recorded; so an event that is acked is done with.
    All,
    /// What callbacks with an order are to be told is recorded, and nothing is told: so it is known soon that it is
    /// recorded up to an event, however long it takes to tell others. Idle while no callback has an order.
    InOrder,
}

impl Lane {
    fn ready(self) -> &'static str {
        match self {
            Self::All => READY,
            Self::InOrder => "events in order",
        }
    }

    fn progress(self) -> Duration {
        match self {
            Self::All => PROGRESS_INTERVAL,
            Self::InOrder => RECORD_PROGRESS,
        }
    }
}

/// The task that dispatches events.
pub(crate) struct Dispatcher {
    lane: Lane,
    js: jetstream::Context,
    pool: PgPool,
    deliverer: Arc<Deliverer>,
    readiness: Readiness,
    room: Arc<Semaphore>,
}

/// Why an event is not acked: the decision, and its reason.
#[derive(Debug)]
enum Setback {
    /// It cannot be read; it is among the dead letters now, and does not come again.
    Dead(String),
    /// It comes again after a while.
    Later(String),
    /// It comes again at once, to another notifier.
    Stopping,
}

impl From<Stopping> for Setback {
    fn from(Stopping: Stopping) -> Self {
        Self::Stopping
    }
}

impl From<Unreadable> for Setback {
    fn from(error: Unreadable) -> Self {
        Self::Later(error.to_string())
    }
}

impl From<sqlx::Error> for Setback {
    fn from(error: sqlx::Error) -> Self {
        Self::Later(error_chain(&error))
    }
}

impl Dispatcher {
    /// A dispatcher with all its room.
    pub(crate) fn new(
        lane: Lane,
        js: jetstream::Context,
        pool: PgPool,
        deliverer: Arc<Deliverer>,
        readiness: Readiness,
    ) -> Arc<Self> {
        Arc::new(Self { lane, js, pool, deliverer, readiness, room: Arc::new(Semaphore::new(ROOM as usize)) })
    }

    /// Dispatches events until shutdown, then lets those under way finish.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut events = JoinSet::new();
        let dispatched = tokio::select! {
            dispatched = self.pull(&mut events) => dispatched,
            () = shutdown.cancelled() => Ok(()),
        };
        drain(events).await?;
        dispatched
    }

    /// Pulls for ever; after an error from a new consumer or stream.
    async fn pull(self: &Arc<Self>, events: &mut JoinSet<()>) -> anyhow::Result<()> {
        let mut delays = retry_backoff();
        let mut highest = 0;
        loop {
            if !self.is_wanted() {
                self.readiness.ready(self.lane.ready());
                tokio::time::sleep(ORDER_INTERVAL).await;
                continue;
            }
            let pulled = self.pull_stream(events, &mut highest, || delays = retry_backoff()).await;
            match pulled {
                Ok(_) if !self.is_wanted() => continue,
                Ok(broken) => {
                    tracing::warn!("pulling events anew: {broken}");
                    self.readiness.not_ready(self.lane.ready(), broken);
                }
                Err(e) => return Err(e),
            }
            tokio::time::sleep(delays.next().unwrap_or(PULL_HEARTBEAT)).await;
        }
    }

    /// Pulls until the pull breaks; says why. Fails only when an event's task died.
    async fn pull_stream(
        self: &Arc<Self>,
        events: &mut JoinSet<()>,
        highest: &mut u64,
        mut on_message: impl FnMut(),
    ) -> anyhow::Result<String> {
        let (mut messages, stream) = match self.messages().await {
            Ok(messages) => messages,
            Err(e) => return Ok(format!("{e:#}")),
        };
        self.readiness.ready(self.lane.ready());
        let mut look = tokio::time::interval(ORDER_INTERVAL);
        loop {
            let message = tokio::select! {
                Some(ended) = events.join_next() => {
                    ended.context("an event's task died")?;
                    continue;
                }
                message = messages.next() => message,
                _ = look.tick() => match self.is_wanted() {
                    true => continue,
                    false => return Ok("no callback has an order any more".into()),
                },
            };
            let message = match message {
                Some(Ok(message)) => message,
                Some(Err(e)) => return Ok(error_chain(&e)),
                None => return Ok("the pull ended".into()),
            };
            on_message();
            let about = match About::of(&message, highest) {
                Ok(about) => about,
                Err(e) => {
                    tracing::error!("a message that is not JetStream's came with the events: {e}");
                    continue;
                }
            };
            let units = (1 + (message.payload.len() / BYTES_PER_UNIT) as u32).min(ROOM);
            let room = self.room.clone().acquire_many_owned(units).await?;
            let (dispatcher, stream) = (self.clone(), stream.clone());
            // Boxed: the runtime would move all of it several times.
            events.spawn(Box::pin(async move { dispatcher.handle(message, about, stream, room).await }));
        }
    }

    /// Whether there is anything to do for this lane.
    fn is_wanted(&self) -> bool {
        self.lane == Lane::All || self.deliverer.callbacks.any_in_order()
    }

    /// Makes the consumer, or brings it up to date, and begins to pull. Also the stream's identity.
    async fn messages(&self) -> anyhow::Result<(pull::Stream, Arc<str>)> {
        let stream = self.js.get_stream(LEAD_EVENTS).await.context("cannot find the stream of events")?;
        let consumer = match self.lane {
            Lane::All => Self::consumer(&stream).await?,
            Lane::InOrder => Self::order_consumer(&stream).await?,
        };
        let messages = consumer
            .stream()
            .max_messages_per_batch(PULL_MESSAGES)
            .max_bytes_per_batch(PULL_BYTES)
            .expires(PULL_EXPIRES)
            .heartbeat(PULL_HEARTBEAT)
            .messages();
        Ok((messages.await.context("cannot pull")?, streams::identity(stream.cached_info()).into()))
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
        stream.create_consumer(config).await.context("cannot make the consumer")
    }

    /// The consumer of what has an order begins with what is not acked by the other: all before is recorded.
    async fn order_consumer(stream: &Stream) -> anyhow::Result<PullConsumer> {
        if stream.consumer_info(ORDER_CONSUMER).await.is_ok() {
            let found = stream.get_consumer(ORDER_CONSUMER).await;
            return found.map_err(|e| anyhow::anyhow!("cannot find the consumer of what has an order: {e}"));
        }
        let main = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read how far events are told")?;
        let config = pull::Config {
            durable_name: Some(ORDER_CONSUMER.into()),
            description: Some(
                "Records what callbacks with an order are to be told; shared by all webhook-notifiers".into(),
            ),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: main.ack_floor.stream_sequence + 1 },
            ack_policy: AckPolicy::Explicit,
            ack_wait: RECORD_WAIT,
            max_ack_pending: MAX_ACK_PENDING,
            inactive_threshold: ORDER_CONSUMER_KEPT,
            ..Default::default()
        };
        stream.create_consumer(config).await.context("cannot make the consumer of what has an order")
    }

    /// Sees an event through, and settles it with JetStream.
    async fn handle(&self, message: jetstream::Message, about: About, stream: Arc<str>, _room: OwnedSemaphorePermit) {
        let (message, acker) = message.split();
        let kind = match keep(&acker, self.lane.progress(), self.tell(message, about, stream)).await {
            Ok(()) => AckKind::Ack,
            Err(setback) => {
                let sequence = about.sequence;
                match setback {
                    Setback::Dead(why) => {
                        tracing::error!(sequence, "an event is among the dead letters now: {why}");
                        AckKind::Term
                    }
                    Setback::Later(why) => {
                        tracing::warn!(sequence, "an event is put off: {why}");
                        AckKind::Nak(Some(LOOK_AGAIN))
                    }
                    Setback::Stopping => AckKind::Nak(None),
                }
            }
        };
        if let Err(e) = acker.ack_with(kind).await {
            // It comes again, and what is recorded of it is found then.
            tracing::warn!(sequence = about.sequence, "cannot ack an event: {e}");
        }
    }

    /// Tells every callback of the event, or has it recorded why not.
    async fn tell(&self, message: async_nats::Message, about: About, stream: Arc<str>) -> Result<(), Setback> {
        let arrived = clock::precise();
        let event = match read(&message.payload) {
            Ok(event) => event,
            // The other lane buries it.
            Err(_) if self.lane == Lane::InOrder => return Ok(()),
            Err((reason, error)) => return Err(self.bury(message, about, reason, error).await),
        };
        let Some(mut targets) = self.targets(&event, about).await? else {
            return Err(Setback::Later("its process is not in the configuration yet".into()));
        };
        if self.lane == Lane::InOrder {
            targets.retain(|target| target.ordering == Ordering::Lead);
        } else if about.redelivered {
            let recorded = store::query::recorded(&self.pool, event.update_id).await?;
            targets.retain(|target| !recorded.contains(&target.callback_id));
        }
        if targets.is_empty() {
            return Ok(());
        }
        let header = message.headers.as_ref().and_then(|headers| headers.get(headers::TRACEPARENT));
        let came = header.map(|value| value.as_str()).filter(|text| is_traceparent(text));
        // The other lane only sees to the order: the event is one span, not two.
        let mut span = (self.lane == Lane::All).then(|| self.deliverer.traces.begin_at(Step::Deliver, came, arrived));
        if let Some(span) = &mut span {
            span.update(event.update_id);
            span.note(|| [("leadrelay.deliveries", (targets.len() as i64).into())]);
        }
        let own = span.as_ref().and_then(Span::traceparent);
        let traceparent: Option<Arc<str>> = own.as_deref().or(came).map(Arc::from);
        let body = serde_json::to_string(&WebhookPayload::from(&event)).map_err(|e| Setback::Later(e.to_string()))?;
        let body = Arc::<str>::from(body);
        let (update_id, project_id) = (event.update_id, event.project_id);
        let order = order(&message, &event, about, stream).map(Arc::new);
        // Not needed any more, and the attempts may take long.
        drop((message, event));
        let told = targets.into_iter().map(|target| {
            let delivery = Delivery {
                update_id,
                callback_id: target.callback_id,
                project_id,
                process_id: target.process_id(),
                body: body.clone(),
                traceparent: traceparent.clone(),
                order: order.clone().filter(|_| target.ordering == Ordering::Lead),
            };
            self.tell_one(target, delivery)
        });
        let told = try_join_all(told).await;
        if let (Some(span), Err(e)) = (&mut span, &told) {
            span.fail("stopping", e);
        }
        told?;
        Ok(())
    }

    /// Who is to be told; none while it cannot be known yet.
    async fn targets(&self, event: &CompletionEvent, about: About) -> Result<Option<Vec<Target>>, Setback> {
        let callbacks = &self.deliverer.callbacks;
        match callbacks.of_event(event).await? {
            Some(targets) => Ok(Some(targets)),
            None if event.process_id.is_none() => Ok(Some(Vec::new())),
            None if may_still_come(about.published, clock::now()) => Ok(None),
            None => Ok(Some(callbacks.fallback(event).await?)),
        }
    }

    async fn tell_one(&self, target: Target, delivery: Delivery) -> Result<(), Stopping> {
        if let Some(reason) = self.deliverer.callbacks.health.disabled(target.callback_id) {
            return self.deliverer.give_up(delivery, Origin::Event, reason).await;
        }
        if delivery.order.is_some() {
            return self.deliverer.line_up(delivery).await;
        }
        let endpoint = target.endpoint();
        // What cannot be signed waits in Postgres, where the retries find it as soon as it can.
        let Ok(callback) = self.deliverer.callbacks.open(&target) else {
            return self.deliverer.spill(delivery, &endpoint).await;
        };
        match self.deliverer.slots.take(&endpoint, delivery.body.len(), PATIENCE).await {
            Some(slot) => self.deliverer.attempt(callback, delivery, Origin::Event, 1, slot).await,
            None => self.deliverer.spill(delivery, &endpoint).await,
        }
    }

    /// Puts an event that cannot be read among the dead letters.
    async fn bury(
        &self,
        message: async_nats::Message,
        about: About,
        reason: DeadLetterReason,
        error: String,
    ) -> Setback {
        let letter = DeadLetter { message, sequence: about.sequence, logged_at: about.published, reason, error };
        match dead_letter::publish(&self.js, &letter).await {
            Ok(()) => Setback::Dead(letter.error),
            Err(e) => Setback::Later(format!("it cannot be read, nor put among the dead letters: {}", error_chain(&e))),
        }
    }
}

/// Where an event stands in its stream.
#[derive(Debug, Clone, Copy)]
struct About {
    sequence: u64,
    published: Timestamp,
    /// It may have come before, so that some of its deliveries may be recorded.
    redelivered: bool,
}

impl About {
    /// Reads it off a message; `highest` is the highest sequence that came so far.
    fn of(message: &jetstream::Message, highest: &mut u64) -> Result<Self, async_nats::Error> {
        let info = message.info()?;
        let sequence = info.stream_sequence;
        // A server that lost its consumer counts anew, and sends everything as if for the first time.
        let redelivered = info.delivered > 1 || sequence <= *highest;
        *highest = sequence.max(*highest);
        Ok(Self { sequence, published: info.published.into(), redelivered })
    }
}

/// Asks for more time as long as the work goes on.
async fn keep<T>(acker: &Acker, interval: Duration, work: impl Future<Output = T>) -> T {
    let ask = async {
        loop {
            tokio::time::sleep(interval).await;
            if let Err(e) = acker.ack_with(AckKind::Progress).await {
                tracing::debug!("cannot ask for more time: {e}");
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = ask => unreachable!("asks for ever"),
    }
}

/// Where an event comes among those of its lead; what names no lead has no order.
fn order(
    message: &async_nats::Message,
    event: &CompletionEvent,
    About { sequence, .. }: About,
    stream: Arc<str>,
) -> Option<Order> {
    let position = message.headers.as_ref().and_then(|headers| headers.get(headers::POSITION));
    let position = position.and_then(|value| value.as_str().parse().ok());
    // An event without one is of before all that have one.
    let position = position.unwrap_or(EventPosition { generation: 0, log: LogPosition::default() });
    Some(Order::new(event.lead_id?, position, stream, sequence))
}

/// Reads an event.
fn read(payload: &[u8]) -> Result<CompletionEvent, (DeadLetterReason, String)> {
    serde_json::from_slice(payload).map_err(|e| match json::check(payload) {
        Ok(_) => (DeadLetterReason::InvalidCommand, format!("not a completion event: {e}")),
        Err(fault) => (DeadLetterReason::InvalidJson, fault.to_string()),
    })
}

/// Whether the process of an event may still be on its way to the bucket.
fn may_still_come(published: Timestamp, now: Timestamp) -> bool {
    now < published.plus(PROJECTION_GRACE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_be_read_says_why() {
        let reason = |payload: &[u8]| read(payload).unwrap_err().0;
        assert_eq!(reason(b"nonsense"), DeadLetterReason::InvalidJson);
        assert_eq!(reason(b"\xff"), DeadLetterReason::InvalidJson);
        assert_eq!(reason(b"{}"), DeadLetterReason::InvalidCommand);
        assert_eq!(reason(br#"{"updateId":"short"}"#), DeadLetterReason::InvalidCommand);
    }

    #[test]
    fn a_process_has_a_while_to_come() {
        let published = Timestamp::from_millis(1_768_193_759_000);
        assert!(may_still_come(published, published.plus(Duration::from_secs(4))));
        assert!(!may_still_come(published, published.plus(PROJECTION_GRACE)));
        assert!(may_still_come(published, published.minus(Duration::from_secs(60))), "clocks differ");
    }
    proptest! {
        /// Nothing panics, and what is not even JSON that may enter is called that.
        #[test]
        fn arbitrary_events_are_read_or_named(
            payload in prop_oneof![
                any::<Vec<u8>>(),
                r#"\{"updateId":("[0-9a-f]{24}"|null|7),"projectId":"[0-9a-f]{24}","success":(true|1),"timestamp":-?[0-9]{1,20}\}"#
                    .prop_map(String::into_bytes),
            ]
        ) {
            match read(&payload) {
                Ok(_) | Err((DeadLetterReason::InvalidCommand, _)) => prop_assert!(json::check(&payload).is_ok()),
                Err((reason, _)) => prop_assert_eq!(reason, DeadLetterReason::InvalidJson),
            }
        }
    }
}

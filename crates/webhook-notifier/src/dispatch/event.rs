//! 7 Deliver: from a completion event to its deliveries. The first attempts start at once.
//!
//! An event whose process cannot be read is parked in Postgres (`dispatch/parked.rs` releases it).
//!
//! An attempt that gets no permit soon, exceeds its callback's rate limit or meets an open breaker is deferred:
//! recorded as due now, for the retries. So are the deliveries of a project whose share of the memory is used up.
//! Deliveries of a callback that is off, paused or disabled are recorded as due, too, and wait until it may be called.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream;
use contract::{
    Timestamp,
    event::{CompletionEvent, OutcomeKind},
    event_kind::DeliveryKind,
    headers, json,
    position::{EventPosition, LogPosition},
    process::Ordering,
    subject::DeadLetterReason,
    trace::is_traceparent,
};
use futures::future::try_join_all;
use service_kit::{
    clock,
    nats::error_chain,
    postgres::Pool,
    traces::{Span, Step},
};

use super::{
    dead_letter::{self, DeadLetter},
    erasures,
    memory::EventMemory,
};
use crate::{
    callbacks::{ProcessUnreadable, Subscription, Target},
    core::delivery::{DeliverySource, LeadOrder, PendingDelivery},
    deliver::Deliverer,
    recorder::Stopping,
    store::{
        self,
        erasures::PendingErasure,
        error::StoreError,
        parked::{EventKey, ParkedEvent},
    },
};

/// How long a first attempt waits for a permit before it is deferred. A longer wait bridges bursts without a detour
/// through Postgres; a shorter one keeps fewer events of slow endpoints in memory.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an event waits for its process to reach the bucket, which follows Postgres by a moment. A longer wait
/// delays the events of removed processes; a shorter one may skip the callbacks of a process that was just created.
const PROCESS_GRACE: Duration = Duration::from_secs(5);
/// How long an event waits for NATS to answer with its process before it is parked. A longer wait lets these events use
/// up the consumer's limit of unacknowledged ones; a shorter one parks more events.
const PARK_GRACE: Duration = Duration::from_secs(5);

/// The two consumers. Both read all events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConsumerRole {
    /// Starts or records every delivery of an event.
    Deliver,
    /// Only records the deliveries of ordered callbacks, without waiting for any endpoint: this moves the watermark
    /// that ordered deliveries wait for. Idle while no callback is ordered.
    RecordOrdered,
}

impl ConsumerRole {
    /// The readiness condition that is met while events are pulled.
    pub(crate) fn readiness(self) -> &'static str {
        match self {
            Self::Deliver => "events",
            Self::RecordOrdered => "ordered events",
        }
    }
}

/// How an event's message is acknowledged.
#[derive(Debug)]
pub(crate) enum AckDecision {
    Ack,
    /// The event cannot be parsed and was published as a dead letter: it is not redelivered.
    DeadLettered(String),
    /// The event is redelivered after a while.
    RetryLater(String),
    /// The event is redelivered at once, to another notifier.
    Stopping,
}

impl From<Stopping> for AckDecision {
    fn from(Stopping: Stopping) -> Self {
        Self::Stopping
    }
}

impl From<StoreError> for AckDecision {
    fn from(error: StoreError) -> Self {
        Self::RetryLater(error_chain(&error))
    }
}

impl From<serde_json::Error> for AckDecision {
    fn from(error: serde_json::Error) -> Self {
        Self::RetryLater(error.to_string())
    }
}

/// Why the deliveries of an event cannot be determined.
#[derive(Debug, thiserror::Error)]
enum Undecided {
    #[error("its process is not in the configuration yet")]
    ProcessMayArrive,
    #[error(transparent)]
    Unreadable(#[from] ProcessUnreadable),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Undecided> for AckDecision {
    fn from(undecided: Undecided) -> Self {
        Self::RetryLater(error_chain(&undecided))
    }
}

/// JetStream's metadata of an event.
#[derive(Debug, Clone)]
pub(crate) struct EventMeta {
    /// The identity of the stream.
    stream: Arc<str>,
    pub(crate) sequence: u64,
    published_at: Timestamp,
    /// Whether the event may have been received before, so that some of its deliveries may be recorded.
    may_be_recorded: bool,
}

impl EventMeta {
    /// Reads a message; `highest_sequence` is the highest sequence received so far.
    pub(crate) fn read(
        message: &jetstream::Message,
        stream: &Arc<str>,
        highest_sequence: &mut u64,
    ) -> Result<Self, async_nats::Error> {
        let info = message.info()?;
        let sequence = info.stream_sequence;
        // A server that lost its consumer counts deliveries from 1 again, and sends every event again.
        let may_be_recorded = info.delivered > 1 || sequence <= *highest_sequence;
        *highest_sequence = sequence.max(*highest_sequence);
        Ok(Self { stream: stream.clone(), sequence, published_at: info.published.into(), may_be_recorded })
    }
}

pub(crate) struct EventDispatcher {
    pub(crate) role: ConsumerRole,
    pub(crate) js: jetstream::Context,
    pub(crate) pool: Pool,
    pub(crate) deliverer: Arc<Deliverer>,
    pub(crate) memory: EventMemory,
}

impl EventDispatcher {
    /// Starts or records every delivery of the event.
    pub(crate) async fn dispatch(&self, message: async_nats::Message, meta: EventMeta) -> AckDecision {
        match self.deliver(message, meta).await {
            Ok(()) => AckDecision::Ack,
            Err(decision) => decision,
        }
    }

    async fn deliver(&self, message: async_nats::Message, meta: EventMeta) -> Result<(), AckDecision> {
        let received_at = clock::precise();
        let event = match parse(&message.payload) {
            Ok(event) => event,
            // The other consumer publishes the dead letter.
            Err(_) if self.role == ConsumerRole::RecordOrdered => return Ok(()),
            Err((reason, error)) => return Err(self.publish_dead_letter(message, &meta, reason, error).await),
        };
        let header = message.headers.as_ref().and_then(|headers| headers.get(headers::TRACEPARENT));
        let parent = header.map(|value| value.as_str()).filter(|text| is_traceparent(text));
        let order = lead_order(&message, &event, &meta);
        if self.role == ConsumerRole::Deliver {
            self.record_erasure(&event, &meta).await?;
        }
        let targets = match self.targets(&event, meta.published_at, meta.may_be_recorded).await {
            Ok(targets) => targets,
            Err(Undecided::Unreadable(e)) if must_park(&e, meta.published_at, clock::now()) => {
                self.park(&message, &meta, &event, order.as_ref(), parent, &e).await?;
                return Ok(());
            }
            Err(undecided) => return Err(undecided.into()),
        };
        if targets.is_empty() {
            return Ok(());
        }
        // One span per event: the other consumer makes none.
        let is_traced = self.role == ConsumerRole::Deliver;
        let mut span = is_traced.then(|| self.deliverer.traces.begin_at(Step::Deliver, parent, received_at));
        if let Some(span) = &mut span {
            span.update(event.update_id);
            span.note(|| [("leadrelay.deliveries", (targets.len() as i64).into())]);
        }
        let own = span.as_ref().and_then(Span::traceparent);
        let traceparent = own.as_deref().or(parent).map(Arc::from);
        let deliveries = pending_deliveries(targets, &event, order.as_ref(), traceparent)?;
        // Held until the deliveries are recorded.
        let attempted = self.memory.attempt(event.project_id, message.payload.len());
        // Frees the memory: the attempts may take long.
        drop((message, event));
        let may_attempt = attempted.is_some();
        let deliveries =
            deliveries.into_iter().map(|(target, delivery)| self.deliver_to(target, delivery, may_attempt));
        let delivered = try_join_all(deliveries).await;
        if let (Some(span), Err(e)) = (&mut span, &delivered) {
            span.fail("stopping", e);
        }
        delivered?;
        Ok(())
    }

    /// Makes the erasure of the lead's deliveries pending, if this is the event of an erasure.
    async fn record_erasure(&self, event: &CompletionEvent, meta: &EventMeta) -> Result<(), StoreError> {
        let (OutcomeKind::Erase, true, Some(lead_id)) = (event.kind, event.success, event.lead_id) else {
            return Ok(());
        };
        let CompletionEvent { project_id, update_id, .. } = *event;
        let event = EventKey { stream: meta.stream.to_string(), sequence: meta.sequence };
        let erasure = PendingErasure { lead_id, project_id, update_id, event };
        store::erasures::insert(&self.pool, &erasure, clock::now().plus(erasures::DELAY)).await
    }

    /// Records the deliveries of a parked event whose process can be read again. Their first attempts are left to the
    /// retries, which alternate between callbacks.
    pub(crate) async fn release(&self, parked: &ParkedEvent) -> Result<(), AckDecision> {
        let event = parse(parked.payload.as_bytes()).map_err(|(_, error)| AckDecision::RetryLater(error))?;
        let targets = self.targets(&event, parked.published_at, true).await?;
        let traceparent = parked.traceparent.as_deref().map(Arc::from);
        let deliveries = pending_deliveries(targets, &event, parked.order.as_ref(), traceparent)?;
        let deliveries = deliveries.into_iter().map(|(target, delivery)| self.record_only(target, delivery));
        try_join_all(deliveries).await?;
        Ok(())
    }

    async fn park(
        &self,
        message: &async_nats::Message,
        meta: &EventMeta,
        event: &CompletionEvent,
        order: Option<&LeadOrder>,
        traceparent: Option<&str>,
        error: &ProcessUnreadable,
    ) -> Result<(), StoreError> {
        let update_id = event.update_id;
        let parked = ParkedEvent {
            event: EventKey { stream: meta.stream.to_string(), sequence: meta.sequence },
            project_id: event.project_id,
            process_id: event.process_id,
            update_id,
            order: order.cloned(),
            published_at: meta.published_at,
            reason: error.to_string(),
            traceparent: traceparent.map(str::to_owned),
            // It was parsed, so it is UTF-8.
            payload: String::from_utf8_lossy(&message.payload).into_owned(),
        };
        store::parked::insert(&self.pool, &parked, clock::now()).await?;
        tracing::debug!(%update_id, sequence = meta.sequence, "an event is parked: {error}");
        Ok(())
    }

    /// The event's deliveries that this consumer starts or records.
    async fn targets(
        &self,
        event: &CompletionEvent,
        published_at: Timestamp,
        may_be_recorded: bool,
    ) -> Result<Vec<Subscription>, Undecided> {
        let callbacks = &self.deliverer.callbacks;
        let mut targets = match callbacks.for_event(event).await? {
            Some(targets) => targets,
            None if event.process_id.is_none() => Vec::new(),
            None if process_may_arrive(published_at, clock::now()) => return Err(Undecided::ProcessMayArrive),
            None => callbacks.fallback(event).await?,
        };
        if self.role == ConsumerRole::RecordOrdered {
            targets.retain(|(target, _)| target.ordering == Ordering::Lead);
        } else if may_be_recorded {
            let recorded = store::deliveries::recorded(&self.pool, event.update_id).await?;
            targets.retain(|(target, kind)| !recorded.contains(&(target.callback_id, *kind)));
        }
        Ok(targets)
    }

    async fn deliver_to(&self, target: Target, delivery: PendingDelivery, may_attempt: bool) -> Result<(), Stopping> {
        if !may_attempt || delivery.order.is_some() || self.deliverer.callbacks.health.hold(&target).is_some() {
            return self.record_only(target, delivery).await;
        }
        let endpoint = target.endpoint();
        // A delivery that cannot be signed waits in Postgres until the retries can sign it.
        let Ok(callback) = self.deliverer.callbacks.prepare(&target) else {
            return self.deliverer.defer_to_retry(delivery, &endpoint).await;
        };
        match self.deliverer.limiter.acquire(&endpoint, delivery.body.len(), PERMIT_TIMEOUT).await {
            Some(permit) => self.deliverer.attempt(callback, delivery, DeliverySource::Event, 1, permit).await,
            None => self.deliverer.defer_to_retry(delivery, &endpoint).await,
        }
    }

    /// Records a delivery without an attempt.
    async fn record_only(&self, target: Target, delivery: PendingDelivery) -> Result<(), Stopping> {
        if delivery.order.is_some() {
            self.deliverer.enqueue_ordered(delivery).await
        } else if self.deliverer.callbacks.health.hold(&target).is_some() {
            self.deliverer.record_due(delivery).await
        } else {
            self.deliverer.defer_to_retry(delivery, &target.endpoint()).await
        }
    }

    async fn publish_dead_letter(
        &self,
        message: async_nats::Message,
        meta: &EventMeta,
        reason: DeadLetterReason,
        error: String,
    ) -> AckDecision {
        let letter = DeadLetter { message, sequence: meta.sequence, logged_at: meta.published_at, reason, error };
        match dead_letter::publish(&self.js, &letter).await {
            Ok(()) => AckDecision::DeadLettered(letter.error),
            Err(e) => AckDecision::RetryLater(format!(
                "it cannot be parsed, nor published to LEAD_DEAD_LETTERS: {}",
                error_chain(&e)
            )),
        }
    }
}

/// The deliveries of an event. Those of a kind share their body.
pub(crate) fn pending_deliveries(
    targets: Vec<Subscription>,
    event: &CompletionEvent,
    order: Option<&LeadOrder>,
    traceparent: Option<Arc<str>>,
) -> serde_json::Result<Vec<(Target, PendingDelivery)>> {
    let mut bodies: Vec<(DeliveryKind, Arc<str>)> = Vec::new();
    let mut deliveries = Vec::with_capacity(targets.len());
    for (target, kind) in targets {
        let known = bodies.iter().find(|(known, _)| *known == kind).map(|(_, body)| body.clone());
        let body = match known {
            Some(body) => body,
            None => {
                let body = kind.body(event)?;
                // An event has a body only for the kinds that it causes.
                let Some(body) = body.map(Arc::<str>::from) else { continue };
                bodies.push((kind, body.clone()));
                body
            }
        };
        let is_ordered = target.ordering == Ordering::Lead;
        let delivery = PendingDelivery {
            update_id: event.update_id,
            callback_id: target.callback_id,
            kind,
            project_id: event.project_id,
            process_id: target.process_id(),
            body,
            traceparent: traceparent.clone(),
            order: order.as_ref().filter(|_| is_ordered).map(|order| Arc::new(order.of_kind(kind))),
        };
        deliveries.push((target, delivery));
    }
    Ok(deliveries)
}

/// The order of an event among those of its lead; none without a lead.
fn lead_order(message: &async_nats::Message, event: &CompletionEvent, meta: &EventMeta) -> Option<LeadOrder> {
    let position = message.headers.as_ref().and_then(|headers| headers.get(headers::POSITION));
    let position = position.and_then(|value| value.as_str().parse().ok());
    // An event without a position comes before all that have one.
    let position = position.unwrap_or(EventPosition { generation: 0, log: LogPosition::default() });
    Some(LeadOrder::new(event.lead_id?, position, meta.stream.clone(), meta.sequence))
}

fn parse(payload: &[u8]) -> Result<CompletionEvent, (DeadLetterReason, String)> {
    serde_json::from_slice(payload).map_err(|e| match json::check(payload) {
        Ok(_) => (DeadLetterReason::InvalidCommand, format!("not a completion event: {e}")),
        Err(fault) => (DeadLetterReason::InvalidJson, fault.to_string()),
    })
}

/// Whether an event whose process cannot be read is parked in Postgres. In its stream it would use up the consumer's
/// limit of unacknowledged messages, which all tenants share. A malformed entry is not repaired within moments; NATS
/// may answer again.
fn must_park(error: &ProcessUnreadable, published_at: Timestamp, now: Timestamp) -> bool {
    error.is_malformed || now >= published_at.plus(PARK_GRACE)
}

/// Whether the process of an event may still be on its way to the bucket.
fn process_may_arrive(published_at: Timestamp, now: Timestamp) -> bool {
    now < published_at.plus(PROCESS_GRACE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unreadable_events_have_a_reason() {
        let reason = |payload: &[u8]| parse(payload).unwrap_err().0;
        assert_eq!(reason(b"nonsense"), DeadLetterReason::InvalidJson);
        assert_eq!(reason(b"\xff"), DeadLetterReason::InvalidJson);
        assert_eq!(reason(b"{}"), DeadLetterReason::InvalidCommand);
        assert_eq!(reason(br#"{"updateId":"short"}"#), DeadLetterReason::InvalidCommand);
    }

    #[test]
    fn a_missing_process_may_arrive_within_the_grace_period() {
        let published = Timestamp::from_millis(1_768_193_759_000);
        assert!(process_may_arrive(published, published.plus(Duration::from_secs(4))));
        assert!(!process_may_arrive(published, published.plus(PROCESS_GRACE)));
        assert!(process_may_arrive(published, published.minus(Duration::from_secs(60))), "a clock that is ahead");
    }

    #[test]
    fn an_event_is_parked_at_once_for_a_malformed_process_and_after_a_while_without_an_answer() {
        let published = Timestamp::from_millis(1_768_193_759_000);
        let after = |seconds| published.plus(Duration::from_secs(seconds));
        for (is_malformed, now, parked) in
            [(true, published, true), (false, published, false), (false, after(4), false), (false, after(5), true)]
        {
            let error = ProcessUnreadable::new("k", "c", is_malformed);
            assert_eq!(must_park(&error, published, now), parked, "{is_malformed} {now:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_events_are_parsed_or_rejected_by_reason(
            payload in prop_oneof![
                any::<Vec<u8>>(),
                r#"\{"updateId":("[0-9a-f]{24}"|null|7),"projectId":"[0-9a-f]{24}","success":(true|1),"timestamp":-?[0-9]{1,20}\}"#
                    .prop_map(String::into_bytes),
            ]
        ) {
            match parse(&payload) {
                Ok(_) | Err((DeadLetterReason::InvalidCommand, _)) => prop_assert!(json::check(&payload).is_ok()),
                Err((reason, _)) => prop_assert_eq!(reason, DeadLetterReason::InvalidJson),
            }
        }
    }
}

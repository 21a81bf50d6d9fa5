//! 7 Deliver, 8 Retry: makes an attempt, decides the delivery's next state and has it recorded.

use std::sync::Arc;

use service_kit::{
    clock,
    traces::{Span, Step, Traces},
};

use crate::{
    admission::{
        endpoint::Endpoint,
        limiter::{AttemptPermit, ConcurrencyLimiter},
    },
    callbacks::Callbacks,
    core::{
        delivery::{DeliveryRecord, DeliverySource, DeliveryState, PendingDelivery},
        ordering::LeadQueue,
        outcome::Attempt,
        schedule::Schedule,
    },
    http::{client::CallbackClient, request::PreparedCallback},
    metrics::Metrics,
    recorder::{Recorder, Stopping},
};

#[derive(Debug)]
pub(crate) struct Deliverer {
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) limiter: Arc<ConcurrencyLimiter>,
    pub(crate) client: CallbackClient,
    pub(crate) schedule: Schedule,
    pub(crate) recorder: Recorder,
    pub(crate) metrics: Metrics,
    pub(crate) lead_queue: Arc<LeadQueue>,
    pub(crate) traces: Traces,
}

impl Deliverer {
    /// Makes an attempt and records it. `number` is 1 for the first.
    pub(crate) async fn attempt(
        &self,
        callback: &PreparedCallback,
        delivery: PendingDelivery,
        source: DeliverySource,
        number: u32,
        mut permit: AttemptPermit,
    ) -> Result<(), Stopping> {
        permit.start();
        let started = clock::precise();
        let mut span = self.traces.begin_at(Step::Attempt, delivery.traceparent.as_deref(), started);
        let own = span.traceparent();
        let traceparent = own.as_deref().or(delivery.traceparent.as_deref());
        let mut attempt = self.client.send(callback, &delivery, traceparent).await;
        describe(&mut span, callback, &delivery, number, &attempt);
        // The span ends with the head of the response. Reading the body is not the endpoint's time.
        span.end_at(started + attempt.duration);
        permit.finish(attempt.outcome.endpoint_health(), rand::random());
        self.metrics.attempt(&attempt);
        let health = &self.callbacks.health;
        // An operational event must not cause another one.
        let is_operational = delivery.kind.is_operational();
        let disable_callback = match attempt.outcome.error() {
            None => {
                if !is_operational {
                    health.note_success(delivery.callback_id, clock::now());
                }
                // The response of a successful attempt is not kept.
                attempt.response = None;
                None
            }
            Some(_) if is_operational => None,
            Some(error) => health.note_failure(delivery.callback_id, clock::now(), error),
        };
        let disable_callback = match attempt.outcome.error() {
            // The receiver unsubscribes this URL only.
            Some(error) if attempt.outcome.is_gone() && self.has_url(&delivery, callback) => Some(error.to_owned()),
            _ => disable_callback,
        };
        // A first attempt frees its permit before it is recorded, because the events in flight limit how many records
        // wait. A claimed delivery keeps its permit, which is the only limit for records of claims.
        let _held = source.lease().map(|_| permit);
        self.record_attempt(delivery, source, number, attempt, disable_callback).await
    }

    /// Whether the callback still has the URL that was attempted. A callback that memory lacks may still have the URL.
    fn has_url(&self, delivery: &PendingDelivery, attempted: &PreparedCallback) -> bool {
        let process = self.callbacks.process_in_memory(delivery.project_id, delivery.process_id);
        let mut callbacks = process.iter().flat_map(|process| &process.callbacks);
        let configured = callbacks.find(|callback| callback.callback_id == delivery.callback_id);
        configured.is_none_or(|configured| configured.url == attempted.callback.url)
    }

    /// Decides the delivery's next state after an attempt and records both. `disable_callback` is the reason to disable
    /// the callback: it unsubscribed, or failed for long.
    pub(crate) async fn record_attempt(
        &self,
        delivery: PendingDelivery,
        source: DeliverySource,
        number: u32,
        attempt: Attempt,
        disable_callback: Option<String>,
    ) -> Result<(), Stopping> {
        let now = clock::now();
        let state = self.schedule.next_state(number, &attempt.outcome, now, rand::random());
        let PendingDelivery { update_id, callback_id, kind, .. } = delivery;
        let error = attempt.outcome.error().map(str::to_owned);
        let message = error.as_deref().unwrap_or_default();
        let is_gone = attempt.outcome.is_gone();
        match state {
            DeliveryState::RetryAt(at) => {
                tracing::debug!(%update_id, %callback_id, %kind, number, next = at.to_iso(), "attempt failed: {message}");
            }
            DeliveryState::Exhausted if !is_gone => {
                tracing::warn!(%update_id, %callback_id, %kind, number, "delivery exhausted: {message}");
            }
            DeliveryState::Exhausted | DeliveryState::Queued => {}
            DeliveryState::Delivered => tracing::debug!(%update_id, %callback_id, %kind, number, "delivered"),
        }
        let _disabling = disable_callback.as_ref().map(|reason| {
            tracing::warn!(%update_id, %callback_id, %kind, number, "callback disabled: {reason}");
            self.callbacks.health.disable(callback_id, reason)
        });
        let attempt = Some(attempt);
        self.record(DeliveryRecord { delivery, source, state, attempt, error, disable_callback, at: now }).await
    }

    /// Records a delivery of an ordered callback. It becomes due once it is the lead's next one.
    pub(crate) async fn enqueue_ordered(&self, delivery: PendingDelivery) -> Result<(), Stopping> {
        self.record(DeliveryRecord::new(delivery, DeliverySource::Event, DeliveryState::Queued, clock::now())).await
    }

    /// Records a delivery as due now and leaves its first attempt to the retries.
    pub(crate) async fn defer_to_retry(&self, delivery: PendingDelivery, endpoint: &Endpoint) -> Result<(), Stopping> {
        self.metrics.delivery_deferred();
        self.record_due(delivery).await?;
        self.limiter.note_deferred(endpoint);
        Ok(())
    }

    /// Records a delivery as due now. The retries find it once its callback may be called.
    pub(crate) async fn record_due(&self, delivery: PendingDelivery) -> Result<(), Stopping> {
        let now = clock::now();
        self.record(DeliveryRecord::new(delivery, DeliverySource::Event, DeliveryState::RetryAt(now), now)).await
    }

    /// Records that a delivery is not attempted (again), because its callback was removed.
    pub(crate) async fn mark_exhausted(
        &self,
        delivery: PendingDelivery,
        source: DeliverySource,
        error: String,
    ) -> Result<(), Stopping> {
        tracing::debug!(update_id = %delivery.update_id, callback_id = %delivery.callback_id, kind = %delivery.kind, "exhausted: {error}");
        let now = clock::now();
        self.callbacks.health.note_removal(delivery.callback_id, now);
        let record = DeliveryRecord::new(delivery, source, DeliveryState::Exhausted, now);
        self.record(DeliveryRecord { error: Some(error), ..record }).await
    }

    async fn record(&self, record: DeliveryRecord) -> Result<(), Stopping> {
        let (state, lead) = (record.state, record.delivery.ordered_lead());
        self.metrics.delivery_state(state);
        self.recorder.record(record).await?;
        // A new ordered delivery may be the lead's next one; a completed one makes room for the next.
        if let Some(lead) = lead
            && (state.is_final() || state == DeliveryState::Queued)
        {
            self.lead_queue.push(lead);
        }
        Ok(())
    }
}

/// Describes the attempt in its span. The URL is left out, because it may contain secrets.
fn describe(span: &mut Span, callback: &PreparedCallback, delivery: &PendingDelivery, number: u32, attempt: &Attempt) {
    span.update(delivery.update_id);
    span.note(|| {
        [
            ("leadrelay.callback_id", delivery.callback_id.to_string().into()),
            ("leadrelay.delivery_kind", delivery.kind.as_str().into()),
            ("leadrelay.attempt", i64::from(number).into()),
        ]
    });
    if let Some((host, port)) = callback.server() {
        span.note(|| [("server.address", host.to_owned().into()), ("server.port", i64::from(port).into())]);
    }
    if number > 1 {
        span.note(|| [("http.request.resend_count", i64::from(number - 1).into())]);
    }
    let status = attempt.outcome.status();
    if let Some(status) = status {
        span.note(|| [("http.response.status_code", i64::from(status).into())]);
    }
    if let Some(error) = attempt.outcome.error() {
        span.fail(status.map_or("no_answer".into(), |status| status.to_string()), error);
    }
}

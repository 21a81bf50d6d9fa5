//! 7 Deliver, 8 Retry: an attempt, its decision, its record: what straight deliveries and retries have in common.

use std::sync::Arc;

use service_kit::{
    clock,
    traces::{Span, Step, Traces},
};

use crate::{
    admission::breaker::Sign,
    admission::limiter::{Endpoint, Slot, Slots},
    callbacks::Callbacks,
    core::delivery::{Attempt, Delivery, Origin, Report, Standing},
    core::schedule::{Decision, Reply, Schedule},
    dispatch::ordering::{Lead, Turns},
    http::client::{Poster, Prepared},
    metrics::{Counted, Metrics},
    recorder::{Recorder, Stopping},
};

/// What it takes to deliver.
#[derive(Debug)]
pub(crate) struct Deliverer {
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) poster: Poster,
    pub(crate) schedule: Schedule,
    pub(crate) recorder: Recorder,
    pub(crate) metrics: Metrics,
    pub(crate) turns: Arc<Turns>,
    pub(crate) traces: Traces,
}

impl Deliverer {
    /// Makes an attempt, decides what comes of it and has it recorded. `number` is 1 for the first.
    pub(crate) async fn attempt(
        &self,
        to: &Prepared,
        delivery: Delivery,
        origin: Origin,
        number: u32,
        mut slot: Slot,
    ) -> Result<(), Stopping> {
        slot.begin();
        let begun = clock::precise();
        let mut span = self.traces.begin_at(Step::Attempt, delivery.traceparent.as_deref(), begun);
        let own = span.traceparent();
        let traceparent = own.as_deref().or(delivery.traceparent.as_deref());
        let mut attempt = self.poster.post(to, &delivery, traceparent).await;
        describe(&mut span, to, &delivery, number, &attempt);
        // Until the answer's head was there; reading what follows is the notifier's own affair.
        span.end_at(begun + attempt.duration);
        if attempt.error.is_none() {
            // What an endpoint says of what it took is not kept.
            attempt.response = None;
        }
        slot.end(Sign::of(attempt.status), rand::random());
        self.metrics.attempt(attempt.status, attempt.duration);
        let health = &self.callbacks.health;
        let worn_out = match &attempt.error {
            None => {
                health.succeeded(delivery.callback_id, clock::now());
                None
            }
            Some(error) => health.failed(delivery.callback_id, clock::now(), error),
        };
        // While a first attempt is recorded its slot is free for the next one: how many wait is bounded by the events
        // under way. Of claims the slots are the only bound.
        let _held = (origin == Origin::Claim).then_some(slot);
        self.settle(delivery, origin, number, attempt, worn_out).await
    }

    /// Decides what comes of an attempt and has it recorded. `worn_out` says why the callback is to be disabled after this
    /// and all the failures before it, if it is.
    pub(crate) async fn settle(
        &self,
        delivery: Delivery,
        origin: Origin,
        number: u32,
        attempt: Attempt,
        worn_out: Option<String>,
    ) -> Result<(), Stopping> {
        let reply = match attempt.status {
            Some(code) => Reply::Status { code, retry_after: attempt.retry_after.as_deref() },
            None => Reply::Nothing,
        };
        let now = clock::now();
        let decision = self.schedule.decide(number, reply, now, rand::random());
        let standing = match decision {
            Decision::Delivered => Standing::Delivered,
            Decision::RetryAt(due) => Standing::Pending { due },
            Decision::Exhausted | Decision::Disabled => Standing::Exhausted,
        };
        let (update_id, callback_id) = (delivery.update_id, delivery.callback_id);
        let error = attempt.error.clone();
        match (decision, error.as_deref()) {
            (Decision::Delivered, _) | (_, None) => tracing::debug!(%update_id, %callback_id, number, "delivered"),
            (Decision::RetryAt(at), Some(error)) => {
                tracing::debug!(%update_id, %callback_id, number, next = at.to_iso(), "attempt failed: {error}");
            }
            (Decision::Exhausted, Some(error)) => {
                tracing::warn!(%update_id, %callback_id, number, "delivery exhausted: {error}");
            }
            (Decision::Disabled, Some(_)) => {}
        }
        match standing {
            Standing::Delivered => self.metrics.delivery(Counted::Delivered),
            Standing::Exhausted => self.metrics.delivery(Counted::Exhausted),
            Standing::Pending { .. } | Standing::Waiting => {}
        }
        let disable = if decision == Decision::Disabled { error.clone() } else { worn_out };
        if let Some(reason) = &disable {
            tracing::warn!(%update_id, %callback_id, number, "callback disabled: {reason}");
            self.callbacks.health.disable(callback_id, reason);
        }
        let next = next_of(&delivery).filter(|_| matches!(standing, Standing::Delivered | Standing::Exhausted));
        let report = Report { delivery, origin, standing, attempt: Some(attempt), error, disable, at: now };
        self.recorder.record(report).await?;
        if let Some(next) = next {
            self.turns.ask(next);
        }
        Ok(())
    }

    /// Has a delivery of a callback with an order recorded; it begins when its turn comes.
    pub(crate) async fn line_up(&self, delivery: Delivery) -> Result<(), Stopping> {
        let lead = next_of(&delivery);
        let (origin, standing) = (Origin::Event, Standing::Waiting);
        let report = Report { delivery, origin, standing, attempt: None, error: None, disable: None, at: clock::now() };
        self.recorder.record(report).await?;
        if let Some(lead) = lead {
            self.turns.ask(lead);
        }
        Ok(())
    }

    /// Has it recorded that a delivery is due now.
    pub(crate) async fn spill(&self, delivery: Delivery, endpoint: &Endpoint) -> Result<(), Stopping> {
        self.metrics.delivery(Counted::Spilled);
        let now = clock::now();
        let standing = Standing::Pending { due: now };
        let report =
            Report { delivery, origin: Origin::Event, standing, attempt: None, error: None, disable: None, at: now };
        self.recorder.record(report).await?;
        self.slots.note_spilled(endpoint);
        Ok(())
    }

    /// Has it recorded that a delivery will not be tried (again), and why.
    pub(crate) async fn give_up(&self, delivery: Delivery, origin: Origin, error: String) -> Result<(), Stopping> {
        tracing::debug!(update_id = %delivery.update_id, callback_id = %delivery.callback_id, "given up: {error}");
        self.metrics.delivery(Counted::Exhausted);
        let now = clock::now();
        let standing = Standing::Exhausted;
        let next = next_of(&delivery);
        let report = Report { delivery, origin, standing, attempt: None, error: Some(error), disable: None, at: now };
        self.recorder.record(report).await?;
        if let Some(next) = next {
            self.turns.ask(next);
        }
        Ok(())
    }
}

/// Notes in an attempt's span what it was and how it went. Not the URL: it may hold secrets.
fn describe(span: &mut Span, to: &Prepared, delivery: &Delivery, number: u32, attempt: &Attempt) {
    span.update(delivery.update_id);
    span.note(|| {
        [
            ("leadrelay.callback_id", delivery.callback_id.to_string().into()),
            ("leadrelay.attempt", i64::from(number).into()),
        ]
    });
    if let Some((host, port)) = to.server() {
        span.note(|| [("server.address", host.to_owned().into()), ("server.port", i64::from(port).into())]);
    }
    if number > 1 {
        span.note(|| [("http.request.resend_count", i64::from(number - 1).into())]);
    }
    if let Some(status) = attempt.status {
        span.note(|| [("http.response.status_code", i64::from(status).into())]);
    }
    if let Some(error) = &attempt.error {
        let kind = attempt.status.map_or("no_answer".into(), |status| status.to_string());
        span.fail(kind, error);
    }
}

/// Whose next delivery waits for this one, if it has an order.
fn next_of(delivery: &Delivery) -> Option<Lead> {
    let order = delivery.order.as_ref()?;
    Some(Lead { callback_id: delivery.callback_id, lead_id: order.lead_id })
}

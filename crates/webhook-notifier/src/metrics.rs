//! The metrics of webhook-notifier. Each replica counts its own work. The backlog is shared, so all replicas report the
//! same values.

use std::time::Duration;

use service_kit::metrics::{
    Counter, Family, Gauge, Histogram, Label, Register, Registry, Seconds, Unit, durations, messages, sizes,
};

use crate::core::{
    delivery::DeliveryState,
    outcome::{Attempt, AttemptOutcome},
};

const DELIVERED: &str = "delivered";
const EXHAUSTED: &str = "exhausted";
const DEFERRED: &str = "deferred";

#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    attempts: Family<Label, Counter>,
    attempt_duration: Family<Label, Histogram>,
    deliveries: Family<Label, Counter>,
    open_breakers: Gauge,
    disabled_callbacks: Gauge,
    paused_callbacks: Gauge,
    record_batch: Histogram,
    record_duration: Histogram,
    pub(crate) backlog: Backlog,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Backlog {
    pub(crate) pending: Gauge,
    pub(crate) oldest_pending: Seconds,
    pub(crate) held: Gauge,
    pub(crate) parked: Gauge,
    pub(crate) events: Gauge,
    pub(crate) oldest_event: Seconds,
    /// When the backlog was last measured.
    pub(crate) seen: Seconds,
}

impl Backlog {
    fn new(registry: &mut Registry) -> Self {
        let pending = "Deliveries in Postgres that wait for their next attempt; at most 100000 are counted";
        let oldest_pending = "How long ago the oldest delivery that waits for its next attempt was recorded";
        let held = "Deliveries of callbacks that are off, paused or disabled; at most 100000 are counted";
        let parked = "Events whose process cannot be read, which wait in Postgres; at most 100000 are counted";
        let oldest_event = "How long ago the oldest event that is not acknowledged was announced";
        let seen = "When the backlog was last measured";
        Self {
            pending: registry.add("pending_deliveries", pending, Gauge::default()),
            oldest_pending: registry.add_unit("oldest_pending_age", Unit::Seconds, oldest_pending, Seconds::default()),
            held: registry.add("held_deliveries", held, Gauge::default()),
            parked: registry.add("parked_events", parked, Gauge::default()),
            events: registry.add_unit("events_lag", messages(), "Events that are not acknowledged", Gauge::default()),
            oldest_event: registry.add_unit("events_lag", Unit::Seconds, oldest_event, Seconds::default()),
            seen: registry.add_unit("backlog_seen_timestamp", Unit::Seconds, seen, Seconds::default()),
        }
    }
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let attempts = "Attempts, by result: the class of the status, or none without a response";
        let deliveries = "Deliveries that ended, and first attempts that were left to the retries (deferred)";
        let record_duration = "How long it took to write a batch of delivery records";
        let durations_by_class = Family::new_with_constructor(durations as fn() -> Histogram);
        let records = Unit::Other("records".into());
        let metrics = Self {
            attempts: registry.add("attempts", attempts, Family::default()),
            attempt_duration: registry.add_unit(
                "attempt_duration",
                Unit::Seconds,
                "How long attempts took, by result",
                durations_by_class,
            ),
            deliveries: registry.add("deliveries", deliveries, Family::default()),
            open_breakers: registry.add("open_breakers", "Callbacks whose circuit breaker is open", Gauge::default()),
            disabled_callbacks: registry.add("disabled_callbacks", "Callbacks that are disabled", Gauge::default()),
            paused_callbacks: registry.add("paused_callbacks", "Callbacks that are paused", Gauge::default()),
            record_batch: registry.add_unit("record_batch", records, "Delivery records per transaction", sizes()),
            record_duration: registry.add_unit("record_duration", Unit::Seconds, record_duration, durations()),
            backlog: Backlog::new(registry),
        };
        // Created at the start: a series that appears with its first event has no rate before it.
        for class in AttemptOutcome::CLASSES {
            drop(metrics.attempts.get_or_create(&[("result", class)]));
        }
        for outcome in [DELIVERED, EXHAUSTED, DEFERRED] {
            drop(metrics.deliveries.get_or_create(&[("outcome", outcome)]));
        }
        metrics
    }

    pub(crate) fn recorded(&self, records: usize, duration: Duration) {
        self.record_batch.observe(records as f64);
        self.record_duration.observe(duration.as_secs_f64());
    }

    pub(crate) fn attempt(&self, attempt: &Attempt) {
        let label = [("result", attempt.outcome.class())];
        self.attempts.get_or_create(&label).inc();
        self.attempt_duration.get_or_create(&label).observe(attempt.duration.as_secs_f64());
    }

    /// Counts a delivery that ended.
    pub(crate) fn delivery_state(&self, state: DeliveryState) {
        match state {
            DeliveryState::Delivered => self.count_delivery(DELIVERED),
            DeliveryState::Exhausted => self.count_delivery(EXHAUSTED),
            DeliveryState::RetryAt(_) | DeliveryState::Queued => {}
        }
    }

    pub(crate) fn delivery_deferred(&self) {
        self.count_delivery(DEFERRED);
    }

    fn count_delivery(&self, outcome: &'static str) {
        self.deliveries.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub(crate) fn callbacks(&self, open_breakers: usize, disabled: usize, paused: usize) {
        self.open_breakers.set(i64::try_from(open_breakers).unwrap_or(i64::MAX));
        self.disabled_callbacks.set(i64::try_from(disabled).unwrap_or(i64::MAX));
        self.paused_callbacks.set(i64::try_from(paused).unwrap_or(i64::MAX));
    }
}

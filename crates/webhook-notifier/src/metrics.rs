//! 7 Deliver, 8 Retry: what is counted of deliveries.

use std::time::Duration;

use service_kit::metrics::{Counter, Family, Gauge, Histogram, Label, Registry, Seconds, Unit, durations, sizes};

/// The metrics of webhook-notifier. Each replica counts what it does itself; what waits in Postgres and in the stream of
/// events is all replicas' work, and each of them sees the same of it.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    attempts: Family<Label, Counter>,
    durations: Family<Label, Histogram>,
    deliveries: Family<Label, Counter>,
    open_breakers: Gauge,
    disabled_callbacks: Gauge,
    records: Histogram,
    recorded: Histogram,
    pub(crate) backlog: Backlog,
}

/// What waits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backlog {
    pub(crate) pending: Gauge,
    pub(crate) oldest_pending: Seconds,
    pub(crate) events: Gauge,
    pub(crate) oldest_event: Seconds,
    /// When the above was last seen.
    pub(crate) seen: Seconds,
}

impl Backlog {
    fn new(registry: &mut Registry) -> Self {
        let backlog = Self::default();
        registry.register(
            "pending_deliveries",
            "Deliveries that wait in Postgres, to be tried or tried again; more than 100000 are not counted",
            backlog.pending.clone(),
        );
        registry.register_with_unit(
            "oldest_pending_age",
            "How long ago the oldest delivery that waits in Postgres came",
            Unit::Seconds,
            backlog.oldest_pending.clone(),
        );
        registry.register_with_unit(
            "events_lag",
            "Events that are not settled: not read yet, or under way",
            Unit::Other("messages".into()),
            backlog.events.clone(),
        );
        registry.register_with_unit(
            "events_lag",
            "How long ago the oldest event that is not settled was announced",
            Unit::Seconds,
            backlog.oldest_event.clone(),
        );
        registry.register_with_unit(
            "backlog_seen_timestamp",
            "When what waits was last seen",
            Unit::Seconds,
            backlog.seen.clone(),
        );
        backlog
    }
}

/// What an attempt is counted under.
const RESULTS: [&str; 6] = ["2xx", "3xx", "4xx", "5xx", "other", "none"];

/// What became of a delivery, of those outcomes that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    Delivered,
    Exhausted,
    Spilled,
}

impl Counted {
    fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Exhausted => "exhausted",
            Self::Spilled => "spilled",
        }
    }
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            attempts: Family::default(),
            durations: Family::new_with_constructor(durations),
            deliveries: Family::default(),
            open_breakers: Gauge::default(),
            disabled_callbacks: Gauge::default(),
            records: sizes(),
            recorded: durations(),
            backlog: Backlog::new(registry),
        };
        registry.register_with_unit(
            "attempt_duration",
            "How long POSTs to callbacks took, by result",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register_with_unit(
            "record_batch",
            "Reports of attempts that were recorded in one transaction",
            Unit::Other("reports".into()),
            metrics.records.clone(),
        );
        registry.register_with_unit(
            "record_duration",
            "How long it took to record a batch of reports",
            Unit::Seconds,
            metrics.recorded.clone(),
        );
        registry.register(
            "attempts",
            "POSTs to callbacks, by result: the class of the status, or none without an answer",
            metrics.attempts.clone(),
        );
        registry.register(
            "deliveries",
            "Deliveries that came to an end, and first attempts that were left to the retries (spilled)",
            metrics.deliveries.clone(),
        );
        registry.register("open_breakers", "Callbacks that only get probes for now", metrics.open_breakers.clone());
        registry.register(
            "disabled_callbacks",
            "Callbacks that get nothing until they are enabled again",
            metrics.disabled_callbacks.clone(),
        );
        // There from the start: what appears with its first event has no rate before it.
        for result in RESULTS {
            drop(metrics.attempts.get_or_create(&[("result", result)]));
        }
        for outcome in [Counted::Delivered, Counted::Exhausted, Counted::Spilled] {
            drop(metrics.deliveries.get_or_create(&[("outcome", outcome.as_str())]));
        }
        metrics
    }

    /// Notes that a batch of reports was recorded.
    pub(crate) fn recorded(&self, reports: usize, took: Duration) {
        self.records.observe(reports as f64);
        self.recorded.observe(took.as_secs_f64());
    }

    /// Counts an attempt by the status that it was answered with.
    pub(crate) fn attempt(&self, status: Option<u16>, took: Duration) {
        let result = match status {
            Some(200..=299) => "2xx",
            Some(300..=399) => "3xx",
            Some(400..=499) => "4xx",
            Some(500..=599) => "5xx",
            Some(_) => "other",
            None => "none",
        };
        self.attempts.get_or_create(&[("result", result)]).inc();
        self.durations.get_or_create(&[("result", result)]).observe(took.as_secs_f64());
    }

    /// Counts a delivery.
    pub(crate) fn delivery(&self, counted: Counted) {
        self.deliveries.get_or_create(&[("outcome", counted.as_str())]).inc();
    }

    /// Says how many callbacks are held back now.
    pub(crate) fn callbacks(&self, open_breakers: usize, disabled: usize) {
        self.open_breakers.set(i64::try_from(open_breakers).unwrap_or(i64::MAX));
        self.disabled_callbacks.set(i64::try_from(disabled).unwrap_or(i64::MAX));
    }
}

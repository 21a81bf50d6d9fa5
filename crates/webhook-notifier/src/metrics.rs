//! 7 Deliver, 8 Retry: what is counted of deliveries.

use service_kit::metrics::{Counter, Family, Gauge, Label, Registry};

/// The metrics of webhook-notifier.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    attempts: Family<Label, Counter>,
    deliveries: Family<Label, Counter>,
    open_breakers: Gauge,
    disabled_callbacks: Gauge,
}

/// What became of a delivery, of those outcomes that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    Delivered,
    Exhausted,
    Spilled,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
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
        metrics
    }

    /// Counts an attempt by the status that it was answered with.
    pub(crate) fn attempt(&self, status: Option<u16>) {
        let result = match status {
            Some(200..=299) => "2xx",
            Some(300..=399) => "3xx",
            Some(400..=499) => "4xx",
            Some(500..=599) => "5xx",
            Some(_) => "other",
            None => "none",
        };
        self.attempts.get_or_create(&[("result", result)]).inc();
    }

    /// Counts a delivery.
    pub(crate) fn delivery(&self, counted: Counted) {
        let outcome = match counted {
            Counted::Delivered => "delivered",
            Counted::Exhausted => "exhausted",
            Counted::Spilled => "spilled",
        };
        self.deliveries.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Says how many callbacks are held back now.
    pub(crate) fn callbacks(&self, open_breakers: usize, disabled: usize) {
        self.open_breakers.set(i64::try_from(open_breakers).unwrap_or(i64::MAX));
        self.disabled_callbacks.set(i64::try_from(disabled).unwrap_or(i64::MAX));
    }
}

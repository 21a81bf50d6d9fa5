//! Metrics, in Prometheus' words. A service makes one registry, registers its own metrics there, and the health port shows
//! them at `/metrics`.
//!
//! Labels have few values that are known beforehand: a reason, an outcome. Never a tenant, a lead or a URL; those belong in
//! logs.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::metrics::{histogram::exponential_buckets, info::Info};
pub use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// A label's name and its value: what a [`Family`] with one label is told apart by.
pub type Label = [(&'static str, &'static str); 1];
/// The same of a [`Family`] with two labels.
pub type Labels = [(&'static str, &'static str); 2];

/// A gauge of what is no whole number, as seconds are.
pub type Seconds = Gauge<f64, AtomicU64>;

/// A histogram of durations, from half a millisecond to half a minute, each bound twice the one before. More bounds tell
/// more, and each is a series of every route or result.
pub fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 17))
}

/// A histogram of how many messages went together: 1, 2, 4 … 1024.
pub fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 11))
}

/// What a [`Publisher`](crate::batch::Publisher) notes.
#[derive(Debug, Clone)]
pub struct Publishing {
    /// How long the stream took to have what it was given, acks included.
    pub(crate) acks: Histogram,
    /// How many messages went together, for each atomic batch.
    pub(crate) batches: Histogram,
}

impl Default for Publishing {
    fn default() -> Self {
        Self { acks: durations(), batches: sizes() }
    }
}

impl Publishing {
    /// Registers both.
    pub fn new(registry: &mut Registry) -> Self {
        let publishing = Self::default();
        registry.register_with_unit(
            "publish_duration",
            "How long the stream took to acknowledge what was published, one message or several at once",
            Unit::Seconds,
            publishing.acks.clone(),
        );
        registry.register_with_unit(
            "publish_batch",
            "Messages of each atomic batch; what goes alone is not counted here",
            Unit::Other("messages".into()),
            publishing.batches.clone(),
        );
        publishing
    }
}

/// How long ago something was, and 0 where that is in the future: clocks differ.
pub fn age(now: contract::Timestamp, then: contract::Timestamp) -> f64 {
    let millis = now.millis().saturating_sub(then.millis());
    Duration::from_millis(u64::try_from(millis).unwrap_or_default()).as_secs_f64()
}

/// Content type of the text that [`render`] makes (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An empty registry whose metrics are named `leadrelay_{service}_…`; `service` in snake case.
pub fn registry(service: &str) -> Registry {
    let mut registry = Registry::with_prefix(format!("leadrelay_{service}"));
    registry.register("build", "Which version this is", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    registry
}

/// All metrics as text.
pub(crate) fn render(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail, and every metric here encodes.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_on_the_wire() {
        let mut registry = registry("lead_state");
        let counter = Counter::<u64>::default();
        registry.register("updates", "Updates that were applied", counter.clone());
        counter.inc_by(3);
        insta::assert_snapshot!(render(&registry), @r#"
        # HELP leadrelay_lead_state_build Which version this is.
        # TYPE leadrelay_lead_state_build info
        leadrelay_lead_state_build_info{version="0.1.0"} 1
        # HELP leadrelay_lead_state_updates Updates that were applied.
        # TYPE leadrelay_lead_state_updates counter
        leadrelay_lead_state_updates_total 3
        # EOF
        "#);
    }
}

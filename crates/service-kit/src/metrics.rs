//! Prometheus metrics. A service makes one registry, registers its metrics there, and the health port shows them at
//! `/metrics`.
//!
//! Labels have few values, all known in advance, such as a reason or an outcome. A tenant, a lead or a URL is never a
//! label; those belong in logs.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::metrics::{histogram::exponential_buckets, info::Info};
pub use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry, Unit},
};

/// The name and value of the label of a [`Family`] with one label.
pub type Label = [(&'static str, &'static str); 1];
/// The names and values of the labels of a [`Family`] with two labels.
pub type Labels = [(&'static str, &'static str); 2];

/// A gauge of seconds and other fractions.
pub type Seconds = Gauge<f64, AtomicU64>;

/// A histogram of durations from half a millisecond to half a minute, each bound twice the one before. More bounds are
/// more precise, but each is one more series per route or result.
pub fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 17))
}

/// A histogram of messages per batch: 1, 2, 4 … 1024.
pub fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 11))
}

/// Registers a metric and returns it, in one line.
pub trait Register {
    /// Registers a metric without a unit.
    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M;
    /// Registers a metric whose name ends with its unit.
    fn add_unit<M: Metric + Clone>(&mut self, name: &str, unit: Unit, help: &str, metric: M) -> M;
}

impl Register for Registry {
    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.register(name, help, metric.clone());
        metric
    }

    fn add_unit<M: Metric + Clone>(&mut self, name: &str, unit: Unit, help: &str, metric: M) -> M {
        self.register_with_unit(name, help, unit, metric.clone());
        metric
    }
}

/// The unit of metrics that count messages.
pub fn messages() -> Unit {
    Unit::Other("messages".into())
}

/// What a [`Publisher`](crate::publisher::Publisher) measures.
#[derive(Debug, Clone)]
pub struct Publishing {
    /// Time until the stream acknowledged.
    pub(crate) acks: Histogram,
    /// Messages per atomic batch.
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
        let acks = "Time until the stream acknowledged a message, or several messages that were published together";
        let batches = "Messages per atomic batch; messages published singly are not counted";
        Self {
            acks: registry.add_unit("publish_duration", Unit::Seconds, acks, durations()),
            batches: registry.add_unit("publish_batch", messages(), batches, sizes()),
        }
    }
}

/// Seconds since `then`; 0 if it is in the future, because clocks differ.
pub fn age(now: contract::Timestamp, then: contract::Timestamp) -> f64 {
    let millis = now.millis().saturating_sub(then.millis());
    Duration::from_millis(u64::try_from(millis).unwrap_or_default()).as_secs_f64()
}

/// Content type of the text that [`render`] makes (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An empty registry whose metrics are named `leadrelay_{service}_…`; `service` in snake case.
pub fn registry(service: &str) -> Registry {
    let mut registry = Registry::with_prefix(format!("leadrelay_{service}"));
    registry.register("build", "Version of the service", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
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
    fn metrics_are_rendered_as_open_metrics() {
        let mut registry = registry("lead_state");
        let counter: Counter = registry.add("updates", "Updates that were applied", Counter::default());
        counter.inc_by(3);
        insta::assert_snapshot!(render(&registry), @r#"
        # HELP leadrelay_lead_state_build Version of the service.
        # TYPE leadrelay_lead_state_build info
        leadrelay_lead_state_build_info{version="0.1.0"} 1
        # HELP leadrelay_lead_state_updates Updates that were applied.
        # TYPE leadrelay_lead_state_updates counter
        leadrelay_lead_state_updates_total 3
        # EOF
        "#);
    }
}

//! Metrics, in Prometheus' words. A service makes one registry, registers its own metrics there, and the health port shows
//! them at `/metrics`.
//!
//! Labels have few values that are known beforehand: a reason, an outcome. Never a tenant, a lead or a URL; those belong in
//! logs.

pub use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// A label's name and its value: what a [`Family`] with one label is told apart by.
pub type Label = [(&'static str, &'static str); 1];

/// Content type of the text that [`render`] makes (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An empty registry whose metrics are named `leadrelay_{service}_…`; `service` in snake case.
pub fn registry(service: &str) -> Registry {
    Registry::with_prefix(format!("leadrelay_{service}"))
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
        insta::assert_snapshot!(render(&registry), @r"
        # HELP leadrelay_lead_state_updates Updates that were applied.
        # TYPE leadrelay_lead_state_updates counter
        leadrelay_lead_state_updates_total 3
        # EOF
        ");
    }
}

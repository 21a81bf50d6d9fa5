//! 1 Accept: what the gateway counts.

use service_kit::metrics::{Counter, Family, Label, Registry};

use crate::error::ApiError;

/// The metrics of the gateway.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    refused: Family<Label, Counter>,
}

impl Metrics {
    /// Registers them.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("requests_refused", "Requests that were refused, by code", metrics.refused.clone());
        metrics
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, error: &ApiError) {
        // The codes of other services are theirs to count, and no list known here.
        let code = error.own_code().unwrap_or("query");
        self.refused.get_or_create(&[("code", code)]).inc();
    }
}

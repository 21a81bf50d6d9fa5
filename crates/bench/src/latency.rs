//! Histograms of latencies.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longer latencies count as this one.
const MAX_US: u64 = 120_000_000;

/// An empty histogram of microseconds with three significant digits.
pub(crate) fn histogram() -> Histogram<u64> {
    #[allow(clippy::expect_used, reason = "the bounds are constants")]
    Histogram::new_with_bounds(1, MAX_US, 3).expect("bounds of a histogram")
}

pub(crate) fn record(histogram: &mut Histogram<u64>, latency: std::time::Duration) {
    histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(MAX_US).max(1));
}

/// Percentiles in milliseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Latency {
    pub(crate) count: u64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self { count: histogram.len(), p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: at(1.0) }
    }
}

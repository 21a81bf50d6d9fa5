//! How an attempt ended. One type for every consumer: schedule, circuit breaker, metrics, traces and the delivery log.

use std::time::Duration;

use contract::Timestamp;

/// One HTTP request to a callback.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) started_at: Timestamp,
    /// Until the head of the response was complete, or the attempt ended without one.
    pub(crate) duration: Duration,
    pub(crate) outcome: AttemptOutcome,
    /// The first bytes of the response's body.
    pub(crate) response: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AttemptOutcome {
    /// The endpoint responded with 2xx.
    Accepted { status: u16 },
    /// The endpoint responded with another status.
    Rejected { status: u16, error: String, retry_after: Option<String> },
    /// There was no response, or no request was sent.
    NoResponse { error: String },
}

impl AttemptOutcome {
    pub(crate) fn status(&self) -> Option<u16> {
        match self {
            Self::Accepted { status } | Self::Rejected { status, .. } => Some(*status),
            Self::NoResponse { .. } => None,
        }
    }

    pub(crate) fn error(&self) -> Option<&str> {
        match self {
            Self::Accepted { .. } => None,
            Self::Rejected { error, .. } | Self::NoResponse { error } => Some(error),
        }
    }

    /// Whether the receiver unsubscribes with 410 Gone (Standard Webhooks): the callback is then disabled.
    pub(crate) fn is_gone(&self) -> bool {
        self.status() == Some(410)
    }

    /// The wait that the endpoint requests with `Retry-After`, where the status means overload.
    pub(crate) fn retry_after(&self) -> Option<&str> {
        match self {
            Self::Rejected { status: 429 | 502 | 503 | 504, retry_after, .. } => retry_after.as_deref(),
            _ => None,
        }
    }

    pub(crate) fn endpoint_health(&self) -> EndpointHealth {
        match self.status() {
            None | Some(429 | 500..) => EndpointHealth::Failing,
            Some(_) => EndpointHealth::Responding,
        }
    }

    /// The label of the attempt in metrics.
    pub(crate) fn class(&self) -> &'static str {
        match self.status() {
            Some(200..=299) => "2xx",
            Some(300..=399) => "3xx",
            Some(400..=499) => "4xx",
            Some(500..=599) => "5xx",
            Some(_) => "other",
            None => "none",
        }
    }

    pub(crate) const CLASSES: [&str; 6] = ["2xx", "3xx", "4xx", "5xx", "other", "none"];
}

/// What an attempt says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndpointHealth {
    /// The endpoint responds. It may reject this delivery and accept others.
    Responding,
    /// There is no response, or one that says that the endpoint cannot accept anything now.
    Failing,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn outcome(status: u16) -> AttemptOutcome {
        match status {
            200..=299 => AttemptOutcome::Accepted { status },
            _ => {
                AttemptOutcome::Rejected { status, error: format!("the endpoint answered {status}"), retry_after: None }
            }
        }
    }

    #[test]
    fn overload_and_server_errors_count_against_the_endpoint() {
        for status in [429, 500, 503, 599] {
            assert_eq!(outcome(status).endpoint_health(), EndpointHealth::Failing, "{status}");
        }
        assert_eq!(AttemptOutcome::NoResponse { error: "timeout".into() }.endpoint_health(), EndpointHealth::Failing);
        for status in [200, 204, 301, 400, 401, 404, 410, 422] {
            assert_eq!(outcome(status).endpoint_health(), EndpointHealth::Responding, "{status}");
        }
    }
}

//! 1 Accept: the trace of a request, which its updates continue.

use axum::http::{HeaderMap, StatusCode};
use contract::{headers, trace::is_traceparent};
use service_kit::{
    clock,
    traces::{Span, Step},
};

use crate::{app::App, error::ApiError};

/// The span of a request, and the trace context for what follows from it.
pub(crate) struct RequestTrace {
    pub(crate) span: Span,
    /// The client's trace, or a new one.
    pub(crate) traceparent: String,
}

impl RequestTrace {
    pub(crate) fn begin(app: &App, route: &'static str, headers: &HeaderMap) -> Self {
        let client = client_traceparent(headers);
        let span = app.traces.begin(Step::Request { route }, client.as_deref());
        let traceparent = span.traceparent().or(client).unwrap_or_else(clock::new_traceparent);
        Self { span, traceparent }
    }

    /// Records the response in the span.
    pub(crate) fn record(&mut self, response: Result<StatusCode, &ApiError>) {
        let status = response.unwrap_or_else(ApiError::status);
        self.span.note(|| [("http.response.status_code", i64::from(status.as_u16()).into())]);
        if let Err(error) = response {
            self.span.note(|| [("leadrelay.error_code", error.code().to_owned().into())]);
            if status.is_server_error() {
                self.span.fail(status.as_str().to_owned(), error);
            }
        }
    }
}

/// The client's trace context, or a new one.
pub(crate) fn traceparent(headers: &HeaderMap) -> String {
    client_traceparent(headers).unwrap_or_else(clock::new_traceparent)
}

/// The client's trace context, if it is valid.
fn client_traceparent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(headers::TRACEPARENT)?.to_str().ok()?;
    is_traceparent(text).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_traceparent_is_kept() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let of = |text: &str| {
            client_traceparent(&HeaderMap::from_iter([("traceparent".parse().unwrap(), text.parse().unwrap())]))
        };
        assert_eq!(of(good).as_deref(), Some(good));
        assert_eq!(of("nonsense"), None);
        assert_eq!(client_traceparent(&HeaderMap::new()), None);
    }
}

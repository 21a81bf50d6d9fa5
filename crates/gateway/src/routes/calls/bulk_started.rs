//! 1 Accept: `POST /api/v1/calls/started/bulk`.

use std::sync::Arc;

use axum::extract::Request;
use contract::{event::OutcomeKind, key::ApiKey};

use crate::{app::App, bulk, response::HandlerResult};

/// Responds with a line per event.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    bulk::serve(app, key, request, OutcomeKind::CallStarted, "/api/v1/calls/started/bulk").await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{BulkUpdateResult, CallStartedRequest};
    crate::openapi::Operation::new("Calls", "startCalls", "Report up to 10 000 starts of calls")
        .description(
            "One event per line, or a JSON array of events. The response is streamed: a line for each event, in the same \
             order. Each line has its own result: 200 does not mean that every line succeeded.",
        )
        .header("Idempotency-Key")
        .header("traceparent")
        .body_lines::<CallStartedRequest>(bulk::MAX_LINES)
        .streams::<BulkUpdateResult>("application/x-ndjson", "A line per event", |result| format!("{result}\n"))
        .response_header("Idempotent-Replayed")
        .errors(&[422])
}

//! 1 Accept: `POST /api/v1/calls/ended/bulk`.

use std::sync::Arc;

use axum::extract::Request;
use contract::{event::OutcomeKind, key::ApiKey};

use crate::{app::App, bulk, response::HandlerResult};

/// Responds with a line per event.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    bulk::serve(app, key, request, OutcomeKind::CallEnded, "/api/v1/calls/ended/bulk").await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{BulkUpdateResult, CallEndedRequest};
    crate::openapi::Operation::new("Calls", "endCalls", "Report up to 10 000 ends of calls")
        .description(
            "One event per line, or a JSON array of events. The response is streamed: a line for each event, in the same \
             order. Each line has its own result: 200 does not mean that every line succeeded.",
        )
        .header("Idempotency-Key")
        .header("traceparent")
        .body_lines::<CallEndedRequest>(bulk::MAX_LINES)
        .streams::<BulkUpdateResult>("application/x-ndjson", "A line per event", |result| format!("{result}\n"))
        .response_header("Idempotent-Replayed")
        .errors(&[422])
}

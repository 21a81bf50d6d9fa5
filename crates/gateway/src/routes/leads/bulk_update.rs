//! 1 Accept: `POST /api/v1/leads/update/bulk`.

use std::sync::Arc;

use axum::extract::Request;
use contract::{event::OutcomeKind, key::ApiKey};

use crate::{app::App, bulk, response::HandlerResult};

/// Responds with a line per update.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    bulk::serve(app, key, request, OutcomeKind::Update, "/api/v1/leads/update/bulk").await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{BulkUpdateLine, BulkUpdateResult};
    crate::openapi::Operation::new("Updates", "updateLeads", "Update up to 10 000 leads")
        .description(
            "One update per line, or a JSON array of updates. The response is streamed: a line for each update, in the same \
             order. Each line has its own result: 200 does not mean that every line succeeded.",
        )
        .header("Idempotency-Key")
        .header("traceparent")
        .body_lines::<BulkUpdateLine>(bulk::MAX_LINES)
        .streams::<BulkUpdateResult>("application/x-ndjson", "A line per update", |result| format!("{result}\n"))
        .response_header("Idempotent-Replayed")
        .errors(&[422])
}

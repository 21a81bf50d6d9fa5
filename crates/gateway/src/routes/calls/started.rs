//! 1 Accept: `POST /api/v1/calls/started`.

use std::sync::Arc;

use axum::{extract::Request, response::Response};
use contract::{event::OutcomeKind, key::ApiKey};

use crate::{accept, app::App, request::trace::RequestTrace, response::HandlerResult};

/// Responds once the event is in the log.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, "/api/v1/calls/started", request.headers());
    let response = accept::call(&app, &key, request, OutcomeKind::CallStarted, &mut trace).await;
    trace.record(response.as_ref().map(Response::status));
    response
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::CallStartedRequest;
    crate::openapi::Operation::new("Calls", "startCall", "Report the start of a call")
        .description(
            "Until the call ends or expires, updates of the lead fail, or are queued if the process is configured so. Asynchronous, as an update: 200 means that the event is in the log, in the order of the updates. `GET /api/v1/updates/{updateId}` returns its outcome.",
        )
        .body::<CallStartedRequest>()
        .logs()
}

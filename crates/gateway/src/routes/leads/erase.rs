//! 1 Accept: `DELETE /api/v1/leads/{leadId}`: erases a lead.

use std::sync::Arc;

use axum::{extract::Request, response::Response};
use contract::key::ApiKey;

use crate::{
    accept,
    app::App,
    request::{path::LeadPath, trace::RequestTrace},
    response::HandlerResult,
};

/// Responds once the erasure is in the log.
pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    LeadPath(lead_id): LeadPath,
    request: Request,
) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, "/api/v1/leads/{leadId}", request.headers());
    let response = accept::erase(&app, &key, request, lead_id, &mut trace).await;
    trace.record(response.as_ref().map(Response::status));
    response
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Leads", "eraseLead", "Erase a lead")
        .description(
            "Erases the lead's name, phone, e-mail address, external id, metadata and disposition, and the content of its \
             updates, call events, activities and deliveries. Its ids, state, codes and times remain. Asynchronous, as an \
             update: 200 means that the erasure is in the log. Updates before it are applied and erased; updates after it \
             fail with `lead_erased`. It cannot be undone.",
        )
        .logs()
}

//! 1 Accept: `GET /api/v1/updates/{updateId}`: an update's whole story, from lead-state and webhook-notifier.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};
use contract::{
    JsonObject, ObjectId,
    event::WebhookPayload,
    key::Scope,
    rpc::{self, Attempt, Delivery, DeliveryStatus, GetUpdate, RpcError, Update, UpdateStatus},
};
use serde::Serialize;

use crate::{
    error::ApiError,
    routes::{Answer, json},
    server::App,
};

#[derive(Debug, Serialize)]
struct Found<'a> {
    success: bool,
    data: Data<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    update_id: ObjectId,
    status: UpdateStatus,
    command: Option<&'a JsonObject>,
    outcome: Option<WebhookPayload<'a>>,
    error_code: Option<&'a str>,
    warnings: &'a [String],
    from_state: Option<&'a str>,
    to_state: Option<&'a str>,
    version: Option<i64>,
    user_id: Option<&'a str>,
    api_key_id: Option<ObjectId>,
    logged_at: Option<String>,
    applied_at: Option<String>,
    /// Null where webhook-notifier did not answer.
    deliveries: Option<Vec<DeliveryView<'a>>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeliveryView<'a> {
    callback_id: ObjectId,
    status: DeliveryStatus,
    next_attempt_at: Option<String>,
    attempts: Vec<AttemptView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AttemptView<'a> {
    number: u32,
    started_at: String,
    duration_ms: u32,
    status_code: Option<u16>,
    error: Option<&'a str>,
    response: Option<&'a str>,
}

/// Answers with the update, its outcome and its deliveries.
pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    update_id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let key = app.authorize(request.headers(), Scope::LeadsRead)?;
    let update_id = update_id
        .ok()
        .and_then(|Path(text)| text.parse().ok())
        .ok_or_else(|| ApiError::field("updateId", "must be 24 hex digits"))?;
    let wanted = GetUpdate { project_id: key.project_id, update_id };
    let client = &app.broker()?.client;
    let (update, deliveries) = tokio::join!(
        service_kit::rpc::call::<_, Update>(client, rpc::UPDATE_GET, &wanted),
        service_kit::rpc::call::<_, Vec<Delivery>>(client, rpc::DELIVERY_OF_UPDATE, &wanted),
    );
    Ok(json(StatusCode::OK, &view(&update?, &deliveries)))
}

fn view<'a>(update: &'a Update, deliveries: &'a Result<Vec<Delivery>, RpcError>) -> Found<'a> {
    let outcome = (update.status != UpdateStatus::Pending).then_some(update.applied_at).flatten();
    let data = Data {
        update_id: update.update_id,
        status: update.status,
        command: update.command.as_ref(),
        outcome: outcome.map(|timestamp| WebhookPayload {
            action_type: "update",
            update_id: update.update_id,
            success: update.status == UpdateStatus::Succeeded,
            error: update.error.as_deref(),
            lead_id: update.lead_id,
            reference_id: update.reference_id.as_deref(),
            timestamp,
            data: update.data.as_ref(),
        }),
        error_code: update.error_code.as_deref(),
        warnings: &update.warnings,
        from_state: update.from_state.as_deref(),
        to_state: update.to_state.as_deref(),
        version: update.version,
        user_id: update.user_id.as_deref(),
        api_key_id: update.api_key_id,
        logged_at: update.logged_at.map(|at| at.to_iso()),
        applied_at: update.applied_at.map(|at| at.to_iso()),
        deliveries: deliveries.as_ref().ok().map(|deliveries| deliveries.iter().map(DeliveryView::from).collect()),
    };
    let warnings = deliveries.as_ref().err().map(|e| format!("deliveries are not known at the moment: {e}"));
    Found { success: true, data, warnings: warnings.into_iter().collect() }
}

impl<'a> From<&'a Delivery> for DeliveryView<'a> {
    fn from(delivery: &'a Delivery) -> Self {
        Self {
            callback_id: delivery.callback_id,
            status: delivery.status,
            next_attempt_at: delivery.next_attempt_at.map(|at| at.to_iso()),
            attempts: delivery.attempts.iter().map(AttemptView::from).collect(),
        }
    }
}

impl<'a> From<&'a Attempt> for AttemptView<'a> {
    fn from(attempt: &'a Attempt) -> Self {
        Self {
            number: attempt.number,
            started_at: attempt.started_at.to_iso(),
            duration_ms: attempt.duration_ms,
            status_code: attempt.status_code,
            error: attempt.error.as_deref(),
            response: attempt.response.as_deref(),
        }
    }
}

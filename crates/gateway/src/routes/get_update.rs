//! 1 Accept: `GET /api/v1/updates/{updateId}`: an update's whole story, from lead-state and webhook-notifier.

use std::sync::Arc;

use axum::{
    RequestExt,
    extract::{Path, Request},
    http::StatusCode,
};
use contract::{
    JsonObject, ObjectId,
    event::WebhookPayload,
    key::ApiKey,
    rpc::{self, Attempt, Delivery, DeliveryStatus, GetUpdate, RpcError, Update, UpdateStatus},
};
use serde::Serialize;

use crate::{
    error::ApiError,
    routes::{Answer, json},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "UpdateFound"))]
pub(crate) struct Found<'a> {
    success: bool,
    data: Data<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "UpdateStory"))]
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
    #[serde(skip_serializing_if = "Option::is_none")]
    queued_until: Option<String>,
    logged_at: Option<String>,
    applied_at: Option<String>,
    /// Null where webhook-notifier did not answer.
    deliveries: Option<Vec<DeliveryView<'a>>>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "UpdateDelivery"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeliveryView<'a> {
    callback_id: ObjectId,
    status: DeliveryStatus,
    next_attempt_at: Option<String>,
    attempts: Vec<AttemptView<'a>>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Attempt"))]
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
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let update_id = request
        .extract_parts::<Path<String>>()
        .await
        .ok()
        .and_then(|Path(text)| text.parse().ok())
        .ok_or_else(|| ApiError::field("updateId", "must be 24 hex digits"))?;
    let wanted = GetUpdate { project_id: key.project_id, update_id };
    let client = &app.broker()?.client;
    let (update, deliveries) = tokio::join!(
        service_kit::rpc::query::<_, Update>(client, rpc::UPDATE_GET, &wanted),
        service_kit::rpc::query::<_, Vec<Delivery>>(client, rpc::DELIVERY_OF_UPDATE, &wanted),
    );
    Ok(json(StatusCode::OK, &view(&update?, &deliveries)))
}

/// What webhooks say of an update; none while it is pending.
pub(crate) fn outcome(update: &Update) -> Option<WebhookPayload<'_>> {
    let decided_at = (update.status != UpdateStatus::Pending).then_some(update.applied_at).flatten();
    decided_at.map(|timestamp| WebhookPayload {
        action_type: "update",
        update_id: update.update_id,
        success: update.status == UpdateStatus::Succeeded,
        error: update.error.as_deref(),
        lead_id: update.lead_id,
        reference_id: update.reference_id.as_deref(),
        timestamp,
        data: update.data.as_ref(),
    })
}

fn view<'a>(update: &'a Update, deliveries: &'a Result<Vec<Delivery>, RpcError>) -> Found<'a> {
    let data = Data {
        update_id: update.update_id,
        status: update.status,
        command: update.command.as_ref(),
        outcome: outcome(update),
        error_code: update.error_code.as_deref(),
        warnings: &update.warnings,
        from_state: update.from_state.as_deref(),
        to_state: update.to_state.as_deref(),
        version: update.version,
        user_id: update.user_id.as_deref(),
        api_key_id: update.api_key_id,
        queued_until: update.queued_until.map(|at| at.to_iso()),
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

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    fn pending() -> Update {
        Update::pending(ObjectId::from_bytes([1; 12]))
    }

    fn shown(update: &Update, deliveries: Result<Vec<Delivery>, RpcError>) -> String {
        serde_json::to_string(&view(update, &deliveries)).unwrap()
    }

    #[test]
    fn an_update_that_is_still_in_the_log() {
        insta::assert_snapshot!(shown(&pending(), Ok(vec![])), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"pending","command":null,"outcome":null,"errorCode":null,"warnings":[],"fromState":null,"toState":null,"version":null,"userId":null,"apiKeyId":null,"loggedAt":null,"appliedAt":null,"deliveries":[]}}"#);
    }

    #[test]
    fn an_update_with_its_outcome_and_deliveries() {
        let object = |text: &str| JsonObject::from_text(text.into()).unwrap();
        let at = Timestamp::from_millis(1_768_193_759_048);
        let update = Update {
            status: UpdateStatus::Succeeded,
            command: Some(object(r#"{"leadId":"020202020202020202020202","metadata":{"n":1.50}}"#)),
            log_sequence: Some(7),
            logged_at: Some(at),
            lead_id: Some(ObjectId::from_bytes([2; 12])),
            process_id: Some(ObjectId::from_bytes([3; 12])),
            reference_id: Some("R".into()),
            from_state: Some("new".into()),
            to_state: Some("new".into()),
            version: Some(2),
            user_id: Some("u-1".into()),
            api_key_id: Some(ObjectId::from_bytes([4; 12])),
            warnings: vec!["disposition was ignored".into()],
            applied_at: Some(at),
            data: Some(object(r#"{"n":1.50}"#)),
            ..pending()
        };
        let deliveries = vec![Delivery {
            update_id: update.update_id,
            callback_id: ObjectId::from_bytes([5; 12]),
            status: DeliveryStatus::Pending,
            next_attempt_at: Some(at.plus(std::time::Duration::from_secs(5))),
            attempts: vec![Attempt {
                number: 1,
                started_at: at,
                duration_ms: 12,
                status_code: Some(500),
                error: Some("the endpoint answered 500".into()),
                response: Some("oops".into()),
            }],
        }];
        insta::assert_snapshot!(shown(&update, Ok(deliveries)), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"succeeded","command":{"leadId":"020202020202020202020202","metadata":{"n":1.50}},"outcome":{"action_type":"update","updateId":"010101010101010101010101","success":true,"error":null,"leadId":"020202020202020202020202","referenceId":"R","timestamp":1768193759048,"data":{"n":1.50}},"errorCode":null,"warnings":["disposition was ignored"],"fromState":"new","toState":"new","version":2,"userId":"u-1","apiKeyId":"040404040404040404040404","loggedAt":"2026-01-12T04:55:59.048Z","appliedAt":"2026-01-12T04:55:59.048Z","deliveries":[{"callbackId":"050505050505050505050505","status":"pending","nextAttemptAt":"2026-01-12T04:56:04.048Z","attempts":[{"number":1,"startedAt":"2026-01-12T04:55:59.048Z","durationMs":12,"statusCode":500,"error":"the endpoint answered 500","response":"oops"}]}]}}"#);
    }

    #[test]
    fn a_failed_update_while_the_notifier_is_away() {
        let update = Update {
            status: UpdateStatus::Failed,
            lead_id: Some(ObjectId::from_bytes([2; 12])),
            error: Some("Lead update is not allowed while a call is in progress for this lead".into()),
            error_code: Some("call_in_progress".into()),
            applied_at: Some(Timestamp::from_millis(1_768_193_759_048)),
            ..pending()
        };
        let away = RpcError::new(503, "unavailable", "no service answers webhooks.rpc.delivery.list_of_update");
        insta::assert_snapshot!(shown(&update, Err(away)), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"failed","command":null,"outcome":{"action_type":"update","updateId":"010101010101010101010101","success":false,"error":"Lead update is not allowed while a call is in progress for this lead","leadId":"020202020202020202020202","referenceId":null,"timestamp":1768193759048,"data":null},"errorCode":"call_in_progress","warnings":[],"fromState":null,"toState":null,"version":null,"userId":null,"apiKeyId":null,"loggedAt":null,"appliedAt":"2026-01-12T04:55:59.048Z","deliveries":null},"warnings":["deliveries are not known at the moment: no service answers webhooks.rpc.delivery.list_of_update"]}"#);
    }
}

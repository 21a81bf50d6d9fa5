//! 1 Accept: `GET /api/v1/deliveries`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{DeliveryStatus, InvalidDeliveryStatus, ListDeliveries},
};
use http_api::{ListResponse, ListedDelivery};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

impl FromQuery for ListDeliveries {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        Ok(Self {
            project_id: key.project_id,
            status: status(parameters)?,
            callback_id: parameters.id("callbackId")?,
            update_id: parameters.id("updateId")?,
            lead_id: parameters.id("leadId")?,
            since: parameters.time("since")?,
            until: parameters.time("until")?,
            process_id: parameters.id("processId")?,
            status_code: status_code(parameters)?,
            error: parameters.text("error")?,
            cursor,
            limit,
        })
    }
}

/// Takes the field `status`.
pub(crate) fn status(fields: &mut Fields<'_>) -> Result<Option<DeliveryStatus>, ApiError> {
    let status = fields.text("status")?.map(|text| text.parse());
    status.transpose().map_err(|e: InvalidDeliveryStatus| ApiError::field("status", e.to_string()))
}

fn status_code(fields: &mut Fields<'_>) -> Result<Option<u16>, ApiError> {
    let Some(text) = fields.text("statusCode")? else { return Ok(None) };
    let code = text.parse().ok().filter(|code| (100..=999).contains(code));
    code.map(Some).ok_or_else(|| ApiError::field("statusCode", "must be a status such as 503"))
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<ListDeliveries>,
) -> HandlerResult {
    let page = app.request(&query).await?;
    response::ok(&ListResponse::<ListedDelivery>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use crate::openapi::{date_time, delivery_status, id, text};
    crate::openapi::Operation::new("Deliveries", "listDeliveries", "List deliveries")
        .description(
            "A delivery is an update on its way to one callback. Deliveries of the newest updates come first. All given \
             filters must match.",
        )
        .query("status", "Only deliveries with this status", delivery_status())
        .query("callbackId", "Only deliveries to this callback", id())
        .query("updateId", "Only deliveries of this update", id())
        .query("leadId", "Only deliveries of this lead's updates", id())
        .query("since", "Only deliveries of updates made at this time or later", date_time())
        .query("until", "Only deliveries of updates made before this time", date_time())
        .query("processId", "Only deliveries to callbacks of this process", id())
        .query(
            "statusCode",
            "Only deliveries whose last attempt was answered with this status",
            serde_json::json!({"type": "integer", "minimum": 100, "maximum": 999}),
        )
        .query("error", "Only deliveries whose last attempt failed with an error that contains this text", text())
        .page_parameters()
        .query_example("status=exhausted&statusCode=503")
        .returns::<ListResponse<ListedDelivery>>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn filters_are_parsed() {
        let queries = [
            "",
            "status=exhausted&callbackId=696102a4b8c1d2e3f4a5b6c7&since=2026-01-12T04:55:59Z&limit=7&cursor=x",
            "leadId=696102a4b8c1d2e3f4a5b6c7&updateId=6b0426971c73026dafa27e40&other=1",
            "processId=696102a4b8c1d2e3f4a5b6c7&statusCode=503&error=timed%20out&until=2026-01-12T04:55:59Z",
            "status=lost",
            "since=soon",
            "statusCode=5xx",
        ]
        .map(|query| match Query::<ListDeliveries>::parse(query, &key()) {
            Ok(Query { query: deliveries, warnings }) => {
                let deliveries = serde_json::to_string(&deliveries).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("?{query}\n    {deliveries} {warnings:?}")
            }
            Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        });
        insta::assert_snapshot!(queries.join("\n"), @r#"
        ?
            {"projectId":"OURS","status":null,"callbackId":null,"updateId":null,"leadId":null,"since":null,"cursor":null,"limit":50} []
        ?status=exhausted&callbackId=696102a4b8c1d2e3f4a5b6c7&since=2026-01-12T04:55:59Z&limit=7&cursor=x
            {"projectId":"OURS","status":"exhausted","callbackId":"696102a4b8c1d2e3f4a5b6c7","updateId":null,"leadId":null,"since":1768193759000,"cursor":"x","limit":7} []
        ?leadId=696102a4b8c1d2e3f4a5b6c7&updateId=6b0426971c73026dafa27e40&other=1
            {"projectId":"OURS","status":null,"callbackId":null,"updateId":"6b0426971c73026dafa27e40","leadId":"696102a4b8c1d2e3f4a5b6c7","since":null,"cursor":null,"limit":50} ["ignored as unknown: other"]
        ?processId=696102a4b8c1d2e3f4a5b6c7&statusCode=503&error=timed%20out&until=2026-01-12T04:55:59Z
            {"projectId":"OURS","status":null,"callbackId":null,"updateId":null,"leadId":null,"since":null,"until":1768193759000,"processId":"696102a4b8c1d2e3f4a5b6c7","statusCode":503,"error":"timed out","cursor":null,"limit":50} []
        ?status=lost
            400 invalid_field: status must be pending, delivered or exhausted
        ?since=soon
            400 invalid_field: since must be a time such as 2026-01-12T04:55:59Z
        ?statusCode=5xx
            400 invalid_field: statusCode must be a status such as 503
        "#);
    }
}

//! 1 Accept: `/api/v1/deliveries…`: what was told to whom, and telling it again; webhook-notifier knows and does it.

use std::sync::Arc;

use axum::{extract::Request, http::StatusCode};
use contract::{
    ObjectId,
    key::ApiKey,
    rpc::{
        self, Cursor, Delivery, DeliveryId, DeliveryStatus, GetDelivery, ListDeliveries, ListedDelivery,
        MAX_PER_SECOND, Page, RecoverDeliveries, RecoveredDeliveries,
    },
};
use serde::Serialize;

use crate::{
    body,
    error::ApiError,
    fields::Fields,
    routes::{Answer, get_update::DeliveryView, json, list},
    server::App,
};

/// How many deliveries a recovery makes due in a second where nobody says.
const PER_SECOND: u32 = 10;

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ListedDelivery"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedView<'a> {
    delivery_id: String,
    update_id: ObjectId,
    callback_id: ObjectId,
    process_id: Option<ObjectId>,
    status: DeliveryStatus,
    attempts: u32,
    next_attempt_at: Option<String>,
    created_at: String,
    updated_at: String,
    error: Option<&'a str>,
}

impl<'a> From<&'a ListedDelivery> for ListedView<'a> {
    fn from(delivery: &'a ListedDelivery) -> Self {
        Self {
            delivery_id: delivery.id.to_string(),
            update_id: delivery.id.update_id,
            callback_id: delivery.id.callback_id,
            process_id: delivery.process_id,
            status: delivery.status,
            attempts: delivery.attempts,
            next_attempt_at: delivery.next_attempt_at.map(|at| at.to_iso()),
            created_at: delivery.created_at.to_iso(),
            updated_at: delivery.updated_at.to_iso(),
            error: delivery.error.as_deref(),
        }
    }
}

/// An answer that is one thing.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "{T}Found"))]
pub(crate) struct Found<T> {
    success: bool,
    data: T,
}

impl<T> Found<T> {
    pub(crate) fn new(data: T) -> Self {
        Self { success: true, data }
    }
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Delivery"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct Shown<'a> {
    delivery_id: String,
    update_id: ObjectId,
    #[serde(flatten)]
    delivery: DeliveryView<'a>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Recovered"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct RecoveredView<'a> {
    deliveries: u64,
    dry_run: bool,
    until: Option<String>,
    next: Option<&'a str>,
}

/// Answers with a page of deliveries.
pub(crate) async fn list(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let (wanted, warnings) = parse(request.uri().query().unwrap_or_default(), &key)?;
    let page: Page<ListedDelivery> =
        service_kit::rpc::query(&app.broker()?.client, rpc::DELIVERY_LIST, &wanted).await?;
    Ok(list::Listed::new(&page, ListedView::from, &warnings).answer())
}

fn parse(query: &str, key: &ApiKey) -> Result<(ListDeliveries, Vec<String>), ApiError> {
    let mut fields = Fields::from_query(query)?;
    let (cursor, limit) = list::page(&mut fields)?;
    let wanted = ListDeliveries {
        project_id: key.project_id,
        status: status(&mut fields)?,
        callback_id: fields.id("callbackId")?,
        update_id: fields.id("updateId")?,
        lead_id: fields.id("leadId")?,
        since: list::time(&mut fields, "since")?,
        cursor,
        limit,
    };
    fields.ignore_rest("as unknown");
    Ok((wanted, fields.warnings))
}

fn status(fields: &mut Fields<'_>) -> Result<Option<DeliveryStatus>, ApiError> {
    Ok(match fields.text("status")?.as_deref() {
        None => None,
        Some("pending") => Some(DeliveryStatus::Pending),
        Some("delivered") => Some(DeliveryStatus::Delivered),
        Some("exhausted") => Some(DeliveryStatus::Exhausted),
        Some(_) => return Err(ApiError::field("status", "must be pending, delivered or exhausted")),
    })
}

async fn named(key: &ApiKey, request: &mut Request) -> Result<GetDelivery, ApiError> {
    let fault = "must be an updateId and a callbackId with a hyphen between";
    let id: DeliveryId = list::path(request, "deliveryId", fault).await?;
    Ok(GetDelivery { project_id: key.project_id, id })
}

/// Answers with a delivery and its attempts.
pub(crate) async fn get(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let wanted = named(&key, &mut request).await?;
    let delivery: Delivery = service_kit::rpc::query(&app.broker()?.client, rpc::DELIVERY_GET, &wanted).await?;
    let data = Shown {
        delivery_id: wanted.id.to_string(),
        update_id: wanted.id.update_id,
        delivery: DeliveryView::from(&delivery),
    };
    Ok(json(StatusCode::OK, &Found { success: true, data }))
}

/// Has a settled delivery made again, and answers with it as it stands.
pub(crate) async fn redeliver(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let wanted = named(&key, &mut request).await?;
    let delivery: ListedDelivery =
        service_kit::rpc::call(&app.broker()?.client, rpc::DELIVERY_REDELIVER, &wanted).await?;
    Ok(json(StatusCode::OK, &Found { success: true, data: ListedView::from(&delivery) }))
}

/// Has settled deliveries made again, and answers how many.
pub(crate) async fn recover(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let body = body::read(request, app.max_body_bytes).await?;
    let wanted = parse_recovery(&body, &key)?;
    let done: RecoveredDeliveries =
        service_kit::rpc::call(&app.broker()?.client, rpc::DELIVERY_RECOVER, &wanted).await?;
    let data = RecoveredView {
        deliveries: done.deliveries,
        dry_run: wanted.dry_run,
        until: done.until.map(|at| at.to_iso()),
        next: done.next.as_ref().map(Cursor::as_str),
    };
    Ok(json(StatusCode::OK, &Found { success: true, data }))
}

/// What is not known is refused: ignoring a misspelt filter would tell more again than was meant.
fn parse_recovery(body: &[u8], key: &ApiKey) -> Result<RecoverDeliveries, ApiError> {
    let mut fields = Fields::from_json(body)?;
    let wanted = RecoverDeliveries {
        project_id: key.project_id,
        since: list::time(&mut fields, "since")?.ok_or(ApiError::MissingField("since is required"))?,
        status: status(&mut fields)?.unwrap_or(DeliveryStatus::Exhausted),
        callback_id: fields.id("callbackId")?,
        per_second: match fields.take("perSecond") {
            None => PER_SECOND,
            Some(raw) => serde_json::from_str(raw.get())
                .ok()
                .filter(|pace| (1..=MAX_PER_SECOND).contains(pace))
                .ok_or_else(|| ApiError::field("perSecond", format!("must be a number from 1 to {MAX_PER_SECOND}")))?,
        },
        dry_run: match fields.take("dryRun") {
            None => false,
            Some(raw) => {
                serde_json::from_str(raw.get()).map_err(|_| ApiError::field("dryRun", "must be true or false"))?
            }
        },
        cursor: fields.text("cursor")?.map(Cursor::from_text),
    };
    match fields.rest().keys().next() {
        None => Ok(wanted),
        Some(unknown) => Err(ApiError::field(unknown.chars().take(64).collect::<String>(), "is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    fn told<T: Serialize>(asked: &str, answer: Result<T, ApiError>) -> String {
        match answer {
            Ok(wanted) => {
                let wanted = serde_json::to_string(&wanted).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("{asked}\n    {wanted}")
            }
            Err(e) => format!("{asked}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        }
    }

    #[test]
    fn what_is_asked() {
        let lists = [
            "",
            "status=exhausted&callbackId=696102a4b8c1d2e3f4a5b6c7&since=2026-01-12T04:55:59Z&limit=7&cursor=x",
            "leadId=696102a4b8c1d2e3f4a5b6c7&updateId=6b0426971c73026dafa27e40&other=1",
            "status=lost",
            "since=soon",
        ]
        .map(|query| told(&format!("?{query}"), parse(query, &key())));
        let recoveries = [
            r#"{"since":"2026-01-12T04:55:59Z"}"#,
            r#"{"since":"2026-01-12T04:55:59Z","status":"delivered","callbackId":"696102a4b8c1d2e3f4a5b6c7","perSecond":1000,"dryRun":true}"#,
            "{}",
            r#"{"since":"2026-01-12T04:55:59Z","perSecond":0}"#,
            r#"{"since":"2026-01-12T04:55:59Z","dryRun":"yes"}"#,
            r#"{"since":"2026-01-12T04:55:59Z","callback":"696102a4b8c1d2e3f4a5b6c7"}"#,
        ]
        .map(|body| told(body, parse_recovery(body.as_bytes(), &key())));
        insta::assert_snapshot!([lists.join("\n"), recoveries.join("\n")].join("\n"), @r#"
        ?
            [{"projectId":"OURS","status":null,"callbackId":null,"updateId":null,"leadId":null,"since":null,"cursor":null,"limit":50},[]]
        ?status=exhausted&callbackId=696102a4b8c1d2e3f4a5b6c7&since=2026-01-12T04:55:59Z&limit=7&cursor=x
            [{"projectId":"OURS","status":"exhausted","callbackId":"696102a4b8c1d2e3f4a5b6c7","updateId":null,"leadId":null,"since":1768193759000,"cursor":"x","limit":7},[]]
        ?leadId=696102a4b8c1d2e3f4a5b6c7&updateId=6b0426971c73026dafa27e40&other=1
            [{"projectId":"OURS","status":null,"callbackId":null,"updateId":"6b0426971c73026dafa27e40","leadId":"696102a4b8c1d2e3f4a5b6c7","since":null,"cursor":null,"limit":50},["ignored as unknown: other"]]
        ?status=lost
            400 invalid_field: status must be pending, delivered or exhausted
        ?since=soon
            400 invalid_field: since must be a time such as 2026-01-12T04:55:59Z
        {"since":"2026-01-12T04:55:59Z"}
            {"projectId":"OURS","since":1768193759000,"status":"exhausted","callbackId":null,"perSecond":10,"dryRun":false,"cursor":null}
        {"since":"2026-01-12T04:55:59Z","status":"delivered","callbackId":"696102a4b8c1d2e3f4a5b6c7","perSecond":1000,"dryRun":true}
            {"projectId":"OURS","since":1768193759000,"status":"delivered","callbackId":"696102a4b8c1d2e3f4a5b6c7","perSecond":1000,"dryRun":true,"cursor":null}
        {}
            400 missing_field: since is required
        {"since":"2026-01-12T04:55:59Z","perSecond":0}
            400 invalid_field: perSecond must be a number from 1 to 1000
        {"since":"2026-01-12T04:55:59Z","dryRun":"yes"}
            400 invalid_field: dryRun must be true or false
        {"since":"2026-01-12T04:55:59Z","callback":"696102a4b8c1d2e3f4a5b6c7"}
            400 invalid_field: callback is not known here
        "#);
    }

    #[test]
    fn a_page_of_deliveries() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        let delivery = ListedDelivery {
            id: DeliveryId { update_id: ObjectId::from_bytes([1; 12]), callback_id: ObjectId::from_bytes([2; 12]) },
            process_id: Some(ObjectId::from_bytes([3; 12])),
            status: DeliveryStatus::Exhausted,
            attempts: 10,
            next_attempt_at: None,
            created_at: at,
            updated_at: at,
            error: Some("the endpoint answered 500".into()),
        };
        let page = Page { items: vec![delivery], next: None };
        let listed = list::Listed::new(&page, ListedView::from, &[]);
        insta::assert_snapshot!(serde_json::to_string(&listed).unwrap(), @r#"{"success":true,"data":[{"deliveryId":"010101010101010101010101-020202020202020202020202","updateId":"010101010101010101010101","callbackId":"020202020202020202020202","processId":"030303030303030303030303","status":"exhausted","attempts":10,"nextAttemptAt":null,"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","error":"the endpoint answered 500"}],"next":null}"#);
    }
}

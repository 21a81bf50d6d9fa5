//! 1 Accept: `POST /api/v1/deliveries/recover`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{Cursor, DeliveryStatus, MAX_PER_SECOND, RecoverDeliveries},
};
use http_api::{DataResponse, RecoverResult};

use crate::{
    app::App,
    error::ApiError,
    request::{Body, FromBody, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
    routes::deliveries::list::status,
};

/// How many deliveries become due in a second by default.
const PER_SECOND: u32 = 10;

impl FromBody for RecoverDeliveries {
    /// Unknown fields are refused: ignoring a misspelt filter would repeat more deliveries than intended.
    fn from_body(body: &[u8], key: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?.refusing_empty();
        let query = Self {
            project_id: key.project_id,
            since: fields.time("since")?.ok_or_else(|| ApiError::missing("since is required"))?,
            status: status(&mut fields)?.unwrap_or(DeliveryStatus::Exhausted),
            callback_id: fields.id("callbackId")?,
            per_second: per_second(&mut fields)?,
            dry_run: fields.flag("dryRun")?,
            cursor: fields.text("cursor")?.map(Cursor::from_text),
        };
        fields.refuse_rest()?;
        Ok(query)
    }
}

/// How many deliveries become due in a second.
pub(in crate::routes) fn per_second(fields: &mut Fields<'_>) -> Result<u32, ApiError> {
    let Some(raw) = fields.take("perSecond") else { return Ok(PER_SECOND) };
    let rate = serde_json::from_str(raw.get()).ok().filter(|rate| (1..=MAX_PER_SECOND).contains(rate));
    rate.ok_or_else(|| ApiError::field("perSecond", format!("must be a number from 1 to {MAX_PER_SECOND}")))
}

pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, Body(query): Body<RecoverDeliveries>) -> HandlerResult {
    let recovered = app.request(&query).await?;
    response::ok(&DataResponse::new(RecoverResult::new(recovered, query.dry_run)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Deliveries", "recoverDeliveries", "Repeat many deliveries")
        .description(
            "Repeats all exhausted deliveries, after an endpoint was down for too long; or all delivered ones, for a \
             receiver that lost data. The oldest become due first, `perSecond` of them a second.",
        )
        .body::<http_api::RecoverRequest>()
        .returns::<DataResponse<RecoverResult>>()
        .errors(&[404, 409, 410])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn bodies_are_parsed_strictly() {
        let bodies = [
            r#"{"since":"2026-01-12T04:55:59Z"}"#,
            r#"{"since":"2026-01-12T04:55:59Z","status":"delivered","callbackId":"696102a4b8c1d2e3f4a5b6c7","perSecond":1000,"dryRun":true}"#,
            "{}",
            r#"{"since":"2026-01-12T04:55:59Z","perSecond":0}"#,
            r#"{"since":"2026-01-12T04:55:59Z","dryRun":"yes"}"#,
            r#"{"since":"2026-01-12T04:55:59Z","callback":"696102a4b8c1d2e3f4a5b6c7"}"#,
            r#"{"since":"2026-01-12T04:55:59Z","callbackId":""}"#,
            r#"{"since":"2026-01-12T04:55:59Z","status":""}"#,
            r#"{"since":"2026-01-12T04:55:59Z","cursor":""}"#,
            r#"{"since":""}"#,
        ]
        .map(|body| match RecoverDeliveries::from_body(body.as_bytes(), &key()) {
            Ok(query) => {
                let query = serde_json::to_string(&query).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("{body}\n    {query}")
            }
            Err(e) => format!("{body}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        });
        insta::assert_snapshot!(bodies.join("\n"), @r#"
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
            400 invalid_field: callback is unknown
        {"since":"2026-01-12T04:55:59Z","callbackId":""}
            400 invalid_field: callbackId must not be empty; leave it out instead
        {"since":"2026-01-12T04:55:59Z","status":""}
            400 invalid_field: status must not be empty; leave it out instead
        {"since":"2026-01-12T04:55:59Z","cursor":""}
            400 invalid_field: cursor must not be empty; leave it out instead
        {"since":""}
            400 invalid_field: since must not be empty; leave it out instead
        "#);
    }
}

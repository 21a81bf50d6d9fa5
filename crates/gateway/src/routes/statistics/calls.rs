//! 1 Accept: `POST /api/v1/analytics/customer/stats`: counts of the calls that ended with a result, from lead-state.

use std::sync::Arc;

use contract::{Timestamp, fields::BodyError, key::ApiKey, rpc::CountActivities};
use http_api::{CallStatistics, DataResponse};
use serde::de::DeserializeOwned;

use crate::{
    app::App,
    error::ApiError,
    request::{Body, FromBody, fields::Fields},
    response::{self, HandlerResult},
};

impl FromBody for CountActivities {
    /// Unknown fields are refused: ignoring a misspelt filter would count more calls than intended.
    fn from_body(body: &[u8], key: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?.refusing_empty();
        if fields.id("projectId")?.is_some_and(|project_id| project_id != key.project_id) {
            return Err(BodyError::ProjectMismatch.into());
        }
        let start = number(&mut fields, "start")?.ok_or_else(|| ApiError::missing("start is required"))?;
        let end = number(&mut fields, "end")?.ok_or_else(|| ApiError::missing("end is required"))?;
        let query = Self {
            project_id: key.project_id,
            from: Timestamp::from_millis(start),
            to: Timestamp::from_millis(end),
            process_id: fields.id("processId")?,
            group_id: fields.text("groupId")?,
            offset_minutes: number(&mut fields, "timezoneOffsetMinutes")?.unwrap_or(0),
            include_leads: fields.flag("includeUniqueLeads")?,
        };
        fields.refuse_rest()?;
        query.check().map_err(ApiError::Query)?;
        Ok(query)
    }
}

fn number<T: DeserializeOwned>(fields: &mut Fields<'_>, name: &str) -> Result<Option<T>, ApiError> {
    let Some(raw) = fields.take(name) else { return Ok(None) };
    serde_json::from_str(raw.get()).map(Some).map_err(|_| ApiError::field(name, "must be a whole number"))
}

pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, Body(query): Body<CountActivities>) -> HandlerResult {
    response::ok(&DataResponse::new(CallStatistics::from(app.request(&query).await?)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Statistics", "countCalls", "Count calls")
        .description(
            "Exact counts of the calls that ended with a result, the activities, of a range of at most 32 days. A call counts \
             when its result was accepted. A range with more than 500 000 calls is refused.",
        )
        .body::<http_api::CallStatisticsRequest>()
        .returns::<DataResponse<CallStatistics>>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn bodies_are_parsed_strictly() {
        let bodies = [
            r#"{"start":1768176000000,"end":1768262400000}"#,
            r#"{"start":1768176000000,"end":1768262400000,"projectId":"OURS","processId":"696102a4b8c1d2e3f4a5b602","groupId":"spring","timezoneOffsetMinutes":-300,"includeUniqueLeads":true}"#,
            "{}",
            r#"{"start":1768176000000}"#,
            r#"{"start":"2026-01-12T00:00:00Z","end":1768262400000}"#,
            r#"{"start":1768262400000,"end":1768262400000}"#,
            r#"{"start":1768176000000,"end":1770940800001}"#,
            r#"{"start":1768176000000,"end":1768262400000,"timezoneOffsetMinutes":841}"#,
            r#"{"start":1768176000000,"end":1768262400000,"timezoneOffsetMinutes":"IST"}"#,
            r#"{"start":1768176000000,"end":1768262400000,"process":"696102a4b8c1d2e3f4a5b602"}"#,
            r#"{"start":1768176000000,"end":1768262400000,"groupId":""}"#,
            r#"{"start":1768176000000,"end":1768262400000,"projectId":"696102a4b8c1d2e3f4a5b602"}"#,
        ]
        .map(|body| {
            let ours = body.replace("OURS", &PROJECT.to_string());
            match CountActivities::from_body(ours.as_bytes(), &key()) {
                Ok(query) => {
                    let query = serde_json::to_string(&query).unwrap().replace(&PROJECT.to_string(), "OURS");
                    format!("{body}\n    {query}")
                }
                Err(e) => format!("{body}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        });
        insta::assert_snapshot!(bodies.join("\n"), @r#"
        {"start":1768176000000,"end":1768262400000}
            {"projectId":"OURS","from":1768176000000,"to":1768262400000,"processId":null,"groupId":null,"offsetMinutes":0,"includeLeads":false}
        {"start":1768176000000,"end":1768262400000,"projectId":"OURS","processId":"696102a4b8c1d2e3f4a5b602","groupId":"spring","timezoneOffsetMinutes":-300,"includeUniqueLeads":true}
            {"projectId":"OURS","from":1768176000000,"to":1768262400000,"processId":"696102a4b8c1d2e3f4a5b602","groupId":"spring","offsetMinutes":-300,"includeLeads":true}
        {}
            400 missing_field: start is required
        {"start":1768176000000}
            400 missing_field: end is required
        {"start":"2026-01-12T00:00:00Z","end":1768262400000}
            400 invalid_field: start must be a whole number
        {"start":1768262400000,"end":1768262400000}
            400 invalid_field: end must be later than start
        {"start":1768176000000,"end":1770940800001}
            400 invalid_field: the range is longer than 32 d: choose a shorter one
        {"start":1768176000000,"end":1768262400000,"timezoneOffsetMinutes":841}
            400 invalid_field: timezoneOffsetMinutes must be from -840 to 840
        {"start":1768176000000,"end":1768262400000,"timezoneOffsetMinutes":"IST"}
            400 invalid_field: timezoneOffsetMinutes must be a whole number
        {"start":1768176000000,"end":1768262400000,"process":"696102a4b8c1d2e3f4a5b602"}
            400 invalid_field: process is unknown
        {"start":1768176000000,"end":1768262400000,"groupId":""}
            400 invalid_field: groupId must not be empty; leave it out instead
        {"start":1768176000000,"end":1768262400000,"projectId":"696102a4b8c1d2e3f4a5b602"}
            403 project_mismatch: projectId does not match authenticated project
        "#);
    }
}

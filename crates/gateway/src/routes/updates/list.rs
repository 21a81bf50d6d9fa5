//! 1 Accept: `GET /api/v1/updates`: a project's updates, from the ledger.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::FindUpdates};
use http_api::{ListResponse, ListedUpdate};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

impl FromQuery for FindUpdates {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        let success = match parameters.text("status")?.as_deref() {
            None => None,
            Some("succeeded") => Some(true),
            Some("failed") => Some(false),
            Some(_) => return Err(ApiError::field("status", "must be succeeded or failed")),
        };
        Ok(Self {
            project_id: key.project_id,
            from: parameters.time("from")?,
            to: parameters.time("to")?,
            success,
            error_code: parameters.text("code")?,
            process_id: parameters.id("processId")?,
            api_key_id: parameters.id("apiKeyId")?,
            user_id: parameters.text("userId")?,
            cursor,
            limit,
        })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<FindUpdates>,
) -> HandlerResult {
    let page = app.request(&query).await?;
    response::ok(&ListResponse::<ListedUpdate>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use contract::command::MAX_TEXT_CHARS;

    use crate::openapi::{date_time, id, one_of, text, text_up_to};
    crate::openapi::Operation::new("Updates", "listUpdates", "List updates")
        .description(
            "The updates and call events of the project that were decided, the newest first. All given filters must match. The \
             range of time is the last 24 hours by default and 31 days at most.",
        )
        .query("status", "Only updates with this outcome", one_of(&["succeeded", "failed"]))
        .query("code", "Only updates that failed with this code", text())
        .query("processId", "Only updates to leads of this process", id())
        .query("apiKeyId", "Only updates of this API key", id())
        .query("userId", "Only updates that name this user", text_up_to(MAX_TEXT_CHARS))
        .query("from", "Only updates made at this time or later; by default 24 hours before `to`", date_time())
        .query("to", "Only updates made before this time; by default there is no end", date_time())
        .page_parameters()
        .query_example("status=failed&code=call_in_progress")
        .returns::<ListResponse<ListedUpdate>>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn filters_are_parsed() {
        let queries = [
            "",
            "status=failed&code=call_in_progress&from=2026-01-12T04:55:59Z&to=2026-01-12T05:00:00Z&limit=7&cursor=x",
            "processId=696102a4b8c1d2e3f4a5b6c7&apiKeyId=6b0426971c73026dafa27e40&userId=u-1&status=succeeded&key=1",
            "status=pending",
        ]
        .map(|query| match Query::<FindUpdates>::parse(query, &key()) {
            Ok(Query { query: updates, warnings }) => {
                let updates = serde_json::to_string(&updates).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("?{query}\n    {updates} {warnings:?}")
            }
            Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        });
        insta::assert_snapshot!(queries.join("\n"), @r#"
        ?
            {"projectId":"OURS","from":null,"to":null,"success":null,"errorCode":null,"processId":null,"apiKeyId":null,"userId":null,"cursor":null,"limit":50} []
        ?status=failed&code=call_in_progress&from=2026-01-12T04:55:59Z&to=2026-01-12T05:00:00Z&limit=7&cursor=x
            {"projectId":"OURS","from":1768193759000,"to":1768194000000,"success":false,"errorCode":"call_in_progress","processId":null,"apiKeyId":null,"userId":null,"cursor":"x","limit":7} []
        ?processId=696102a4b8c1d2e3f4a5b6c7&apiKeyId=6b0426971c73026dafa27e40&userId=u-1&status=succeeded&key=1
            {"projectId":"OURS","from":null,"to":null,"success":true,"errorCode":null,"processId":"696102a4b8c1d2e3f4a5b6c7","apiKeyId":"6b0426971c73026dafa27e40","userId":"u-1","cursor":null,"limit":50} ["ignored as unknown: key"]
        ?status=pending
            400 invalid_field: status must be succeeded or failed
        "#);
    }
}

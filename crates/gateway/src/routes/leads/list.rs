//! 1 Accept: `GET /api/v1/leads`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ListLeads};
use http_api::{ListResponse, ListedLead};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
    routes::leads::get::mask,
};

pub(crate) struct LeadsQuery {
    leads: ListLeads,
    /// Whether phone numbers are masked.
    masked: bool,
}

impl FromQuery for LeadsQuery {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        let leads = ListLeads {
            project_id: key.project_id,
            process_id: parameters.id("processId")?,
            state: parameters.text("state")?,
            updated_since: parameters.time("updatedSince")?,
            search: parameters.text("q")?,
            cursor,
            limit,
        };
        Ok(Self { leads, masked: parameters.query_flag("masked")? })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<LeadsQuery>,
) -> HandlerResult {
    let mut page = app.request(&query.leads).await?;
    if query.masked {
        for lead in &mut page.items {
            lead.phone = lead.phone.as_deref().map(mask);
        }
    }
    response::ok(&ListResponse::<ListedLead>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use contract::{process::MAX_NAME_CHARS, rpc::MAX_SEARCH_CHARS};

    use crate::openapi::{date_time, id, text_up_to};
    crate::openapi::Operation::new("Leads", "listLeads", "List leads")
        .description("The newest first. All given filters must match.")
        .query("processId", "Only leads of this process", id())
        .query("state", "Only leads in this state", text_up_to(MAX_NAME_CHARS))
        .query("updatedSince", "Only leads that changed at this time or later", date_time())
        .query(
            "q",
            "Only leads with this `leadId` or `referenceId`, this e-mail address, a phone number that ends with these \
             digits (6 at least), or a name that begins with this text (2 characters at least)",
            text_up_to(MAX_SEARCH_CHARS),
        )
        .query_parameter("masked")
        .page_parameters()
        .query_example("state=interested&limit=50")
        .returns::<ListResponse<ListedLead>>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn filters_are_parsed() {
        let answer = |query: &str| match Query::<LeadsQuery>::parse(query, &key()) {
            Ok(Query { query: LeadsQuery { leads, masked }, warnings }) => {
                let leads = serde_json::to_string(&leads).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("?{query}\n    {leads} masked={masked} {warnings:?}")
            }
            Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        };
        let answers = [
            "",
            "processId=696102a4b8c1d2e3f4a5b6c7&state=lost&limit=200&cursor=bGVhZHM6&masked=true",
            "updatedSince=2026-01-12T05:55:59.048+01:00&proccessId=7",
            "q=Ada%20Lovelace",
            "updatedSince=yesterday",
            "limit=0",
            "limit=201",
            "processId=7",
            "masked=1",
        ]
        .map(answer);
        insta::assert_snapshot!(answers.join("\n"), @r#"
        ?
            {"projectId":"OURS","processId":null,"state":null,"updatedSince":null,"search":null,"cursor":null,"limit":50} masked=false []
        ?processId=696102a4b8c1d2e3f4a5b6c7&state=lost&limit=200&cursor=bGVhZHM6&masked=true
            {"projectId":"OURS","processId":"696102a4b8c1d2e3f4a5b6c7","state":"lost","updatedSince":null,"search":null,"cursor":"bGVhZHM6","limit":200} masked=true []
        ?updatedSince=2026-01-12T05:55:59.048+01:00&proccessId=7
            {"projectId":"OURS","processId":null,"state":null,"updatedSince":1768193759048,"search":null,"cursor":null,"limit":50} masked=false ["ignored as unknown: proccessId"]
        ?q=Ada%20Lovelace
            {"projectId":"OURS","processId":null,"state":null,"updatedSince":null,"search":"Ada Lovelace","cursor":null,"limit":50} masked=false []
        ?updatedSince=yesterday
            400 invalid_field: updatedSince must be a time such as 2026-01-12T04:55:59Z
        ?limit=0
            400 invalid_field: limit must be a number from 1 to 200
        ?limit=201
            400 invalid_field: limit must be a number from 1 to 200
        ?processId=7
            400 invalid_field: processId must be 24 hex digits
        ?masked=1
            400 invalid_field: masked must be true or false
        "#);
    }
}

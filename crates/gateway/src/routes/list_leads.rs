//! 1 Accept: `GET /api/v1/leads`: a project's leads, as lead-state lists them.

use std::{borrow::Cow, sync::Arc};

use axum::extract::Request;
use contract::{
    key::ApiKey,
    rpc::{self, Lead, ListLeads, Page},
};
use serde::Serialize;

use crate::{
    error::ApiError,
    fields::Fields,
    routes::{Answer, LeadView, get_lead::mask, list},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedLead<'a> {
    #[serde(flatten)]
    lead: LeadView<'a>,
    last_disposition: Option<&'a str>,
    version: i64,
}

/// Answers with a page of leads.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let (wanted, masked, warnings) = parse(request.uri().query().unwrap_or_default(), &key)?;
    let page: Page<Lead> = service_kit::rpc::query(&app.broker()?.client, rpc::LEAD_LIST, &wanted).await?;
    Ok(list::Listed::new(&page, |lead| view(lead, masked), &warnings).answer())
}

fn parse(query: &str, key: &ApiKey) -> Result<(ListLeads, bool, Vec<String>), ApiError> {
    let mut fields = Fields::from_query(query)?;
    let (cursor, limit) = list::page(&mut fields)?;
    let wanted = ListLeads {
        project_id: key.project_id,
        process_id: fields.id("processId")?,
        state: fields.text("state")?,
        updated_since: list::time(&mut fields, "updatedSince")?,
        cursor,
        limit,
    };
    let masked = list::flag(&mut fields, "masked")?;
    fields.ignore_rest("as unknown");
    Ok((wanted, masked, fields.warnings))
}

fn view(lead: &Lead, masked: bool) -> ListedLead<'_> {
    let mut shown = LeadView::from(lead);
    if masked {
        shown.phone = shown.phone.map(|phone| Cow::Owned(mask(&phone)));
    }
    ListedLead { lead: shown, last_disposition: lead.disposition.as_deref(), version: lead.version }
}

#[cfg(test)]
mod tests {
    use contract::{JsonObject, ObjectId, Timestamp, rpc::Cursor};

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn what_is_asked() {
        let answer = |query: &str| match parse(query, &key()) {
            Ok((wanted, masked, warnings)) => {
                let wanted = serde_json::to_string(&wanted).unwrap().replace(&PROJECT.to_string(), "OURS");
                format!("?{query}\n    {wanted} masked={masked} {warnings:?}")
            }
            Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        };
        let answers = [
            "",
            "processId=696102a4b8c1d2e3f4a5b6c7&state=lost&limit=200&cursor=bGVhZHM6&masked=true",
            "updatedSince=2026-01-12T05:55:59.048+01:00&proccessId=7",
            "updatedSince=yesterday",
            "limit=0",
            "limit=201",
            "processId=7",
            "masked=1",
        ]
        .map(answer);
        insta::assert_snapshot!(answers.join("\n"), @r#"
        ?
            {"projectId":"OURS","processId":null,"state":null,"updatedSince":null,"cursor":null,"limit":50} masked=false []
        ?processId=696102a4b8c1d2e3f4a5b6c7&state=lost&limit=200&cursor=bGVhZHM6&masked=true
            {"projectId":"OURS","processId":"696102a4b8c1d2e3f4a5b6c7","state":"lost","updatedSince":null,"cursor":"bGVhZHM6","limit":200} masked=true []
        ?updatedSince=2026-01-12T05:55:59.048+01:00&proccessId=7
            {"projectId":"OURS","processId":null,"state":null,"updatedSince":1768193759048,"cursor":null,"limit":50} masked=false ["ignored as unknown: proccessId"]
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

    #[test]
    fn a_page_of_leads() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        let lead = Lead {
            lead_id: ObjectId::from_bytes([1; 12]),
            project_id: PROJECT,
            process_id: ObjectId::from_bytes([2; 12]),
            reference_id: Some("R".into()),
            name: Some("Ada".into()),
            phone: Some("+14155550123".into()),
            email: None,
            state: "interested".into(),
            disposition: Some("callback".into()),
            metadata: JsonObject::from_text(r#"{"n":1.50}"#.into()).unwrap(),
            version: 2,
            created_at: at,
            updated_at: at,
            activities: vec![],
        };
        let page = Page { items: vec![lead], next: Some(Cursor::new("leads", "x")) };
        let listed = list::Listed::new(&page, |lead| view(lead, true), &[]);
        insta::assert_snapshot!(serde_json::to_string(&listed).unwrap(), @r#"{"success":true,"data":[{"_id":"010101010101010101010101","name":"Ada","phone":"+*******0123","email":null,"projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":"R","currentState":"interested","metadata":{"n":1.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","lastDisposition":"callback","version":2}],"next":"bGVhZHM6eA"}"#);
    }
}

//! 1 Accept: `GET /api/v1/leads/get`: a lead as lead-state knows it, in the vendor's shape.

use std::{borrow::Cow, sync::Arc};

use axum::{
    extract::Request,
    http::{StatusCode, header::ETAG},
};
use contract::{
    ObjectId,
    key::ApiKey,
    rpc::{self, Activity, GetLead, Lead},
};
use serde::Serialize;

use crate::{
    error::ApiError,
    fields::{Address, Fields},
    if_match::etag,
    routes::{Answer, LeadView, json, list},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "LeadFound"))]
pub(crate) struct Found<'a> {
    success: bool,
    data: Data<'a>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "LeadDetails"))]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    #[serde(flatten)]
    lead: LeadView<'a>,
    last_disposition: Option<&'a str>,
    activities: Vec<ActivityView<'a>>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Activity"))]
#[serde(rename_all = "camelCase")]
struct ActivityView<'a> {
    update_id: ObjectId,
    success: bool,
    error: Option<&'a str>,
    from_state: Option<&'a str>,
    to_state: Option<&'a str>,
    disposition: Option<&'a str>,
    user_id: Option<&'a str>,
    timestamp: String,
}

impl<'a> From<&'a Activity> for ActivityView<'a> {
    fn from(activity: &'a Activity) -> Self {
        Self {
            update_id: activity.update_id,
            success: activity.success,
            error: activity.error.as_deref(),
            from_state: activity.from_state.as_deref(),
            to_state: activity.to_state.as_deref(),
            disposition: activity.disposition.as_deref(),
            user_id: activity.user_id.as_deref(),
            timestamp: activity.timestamp.to_iso(),
        }
    }
}

/// Answers with the lead and its last updates.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let (wanted, masked) = parse(request.uri().query().unwrap_or_default(), &key)?;
    let lead: Lead = service_kit::rpc::query(&app.broker()?.client, rpc::LEAD_GET, &wanted).await?;
    let mut response = json(StatusCode::OK, &view(&lead, masked));
    if let Some(etag) = etag(lead.version) {
        response.headers_mut().insert(ETAG, etag);
    }
    Ok(response)
}

/// Reads which lead a query string asks for, and whether its phone number is to be masked.
fn parse(query: &str, key: &ApiKey) -> Result<(GetLead, bool), ApiError> {
    let mut fields = Fields::from_query(query)?;
    let Address { lead_id, reference_id, process_id } = fields.address(key)?;
    let masked = list::flag(&mut fields, "masked")?;
    Ok((GetLead { project_id: key.project_id, lead_id, reference_id, process_id }, masked))
}

fn view(lead: &Lead, masked: bool) -> Found<'_> {
    let mut shown = LeadView::from(lead);
    if masked {
        shown.phone = shown.phone.map(|phone| Cow::Owned(mask(&phone)));
    }
    let data = Data {
        lead: shown,
        last_disposition: lead.disposition.as_deref(),
        activities: lead.activities.iter().map(ActivityView::from).collect(),
    };
    Found { success: true, data }
}

/// Hides every digit of a phone number but the last four.
pub(crate) fn mask(phone: &str) -> String {
    let mut hidden = phone.chars().filter(char::is_ascii_digit).count().saturating_sub(4);
    let mut mask = |c: char| {
        if c.is_ascii_digit() && hidden > 0 {
            hidden -= 1;
            return '*';
        }
        c
    };
    phone.chars().map(&mut mask).collect()
}

#[cfg(test)]
mod tests {
    use contract::{JsonObject, Timestamp};
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn what_is_asked() {
        let id = "696102a4b8c1d2e3f4a5b6c7";
        let answer = |query: &str| {
            let real = query.replace("OURS", &PROJECT.to_string()).replace("ID", id);
            match parse(&real, &key()) {
                Ok((wanted, masked)) => {
                    let wanted = serde_json::to_string(&wanted).unwrap();
                    let wanted = wanted.replace(id, "ID").replace(&PROJECT.to_string(), "OURS");
                    format!("?{query}\n    {wanted} masked={masked}")
                }
                Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        };
        let answers = [
            "",
            "leadId=",
            "leadId=7",
            "leadId=ID",
            "leadId=ID&masked=true&other=1",
            "leadId=ID&masked=yes",
            "leadId=ID&leadId=ID",
            "leadId=ID&projectId=ID",
            "referenceId=R",
            "referenceId=R%2F1&projectId=OURS&processId=ID&masked=false",
            "referenceId=R&projectId=ID&processId=ID",
        ]
        .map(answer);
        insta::assert_snapshot!(answers.join("\n"), @r#"
        ?
            400 missing_field: Either leadId or referenceId is required
        ?leadId=
            400 missing_field: Either leadId or referenceId is required
        ?leadId=7
            400 invalid_field: leadId must be 24 hex digits
        ?leadId=ID
            {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null} masked=false
        ?leadId=ID&masked=true&other=1
            {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null} masked=true
        ?leadId=ID&masked=yes
            400 invalid_field: masked must be true or false
        ?leadId=ID&leadId=ID
            400 invalid_field: leadId stands twice
        ?leadId=ID&projectId=ID
            403 project_mismatch: projectId does not match authenticated project
        ?referenceId=R
            400 missing_field: projectId and processId are required when using referenceId
        ?referenceId=R%2F1&projectId=OURS&processId=ID&masked=false
            {"projectId":"OURS","leadId":null,"referenceId":"R/1","processId":"ID"} masked=false
        ?referenceId=R&projectId=ID&processId=ID
            403 project_mismatch: projectId does not match authenticated project
        "#);
    }

    #[test]
    fn masking_leaves_four_digits() {
        for (phone, masked) in
            [("+14155550123", "+*******0123"), ("(0)30 / 1234-567", "(*)** / ***4-567"), ("123", "123"), ("", "")]
        {
            assert_eq!(mask(phone), masked);
        }
    }

    #[test]
    fn a_lead_in_the_vendors_shape() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        let lead = Lead {
            lead_id: ObjectId::from_bytes([1; 12]),
            project_id: PROJECT,
            process_id: ObjectId::from_bytes([2; 12]),
            reference_id: Some("R".into()),
            name: Some("Ada".into()),
            phone: Some("+14155550123".into()),
            email: Some("ada@example.com".into()),
            state: "interested".into(),
            disposition: Some("callback".into()),
            metadata: JsonObject::from_text(r#"{"n":100000000000000000000000000001.50}"#.into()).unwrap(),
            version: 2,
            created_at: at,
            updated_at: at,
            activities: vec![Activity {
                update_id: ObjectId::from_bytes([3; 12]),
                success: true,
                error: None,
                from_state: Some("new".into()),
                to_state: Some("interested".into()),
                disposition: Some("callback".into()),
                user_id: None,
                timestamp: at,
            }],
        };
        insta::assert_snapshot!(serde_json::to_string(&view(&lead, true)).unwrap(), @r#"{"success":true,"data":{"_id":"010101010101010101010101","name":"Ada","phone":"+*******0123","email":"ada@example.com","projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":"R","currentState":"interested","metadata":{"n":100000000000000000000000000001.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","lastDisposition":"callback","activities":[{"updateId":"030303030303030303030303","success":true,"error":null,"fromState":"new","toState":"interested","disposition":"callback","userId":null,"timestamp":"2026-01-12T04:55:59.048Z"}]}}"#);
    }

    proptest! {
        #[test]
        fn arbitrary_queries_never_panic(query: String, phone: String) {
            let _ = parse(&query, &key());
            prop_assert_eq!(mask(&phone).chars().count(), phone.chars().count());
        }
    }
}

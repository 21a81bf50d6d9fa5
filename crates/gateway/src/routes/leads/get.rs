//! 1 Accept: `GET /api/v1/leads/get`.

use std::sync::Arc;

use contract::{fields::Address, key::ApiKey, rpc::GetLead};
use http_api::{DataResponse, LeadDetails};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

pub(crate) struct LeadQuery {
    lead: GetLead,
    /// Whether the phone number is masked.
    masked: bool,
}

impl FromQuery for LeadQuery {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let Address { lead_id, reference_id, process_id } = parameters.address(Some(key.project_id))?;
        let masked = parameters.query_flag("masked")?;
        Ok(Self { lead: GetLead { project_id: key.project_id, lead_id, reference_id, process_id }, masked })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<LeadQuery>,
) -> HandlerResult {
    let mut lead = app.request(&query.lead).await?;
    if query.masked {
        lead.phone = lead.phone.as_deref().map(mask);
    }
    let version = lead.version;
    response::versioned(version, &DataResponse { warnings, ..DataResponse::new(LeadDetails::from(lead)) })
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
pub(crate) fn operation() -> crate::openapi::Operation {
    use crate::openapi::{id, text};
    crate::openapi::Operation::new("Leads", "getLead", "Read a lead and its last updates")
        .description("By `leadId`, or by `referenceId`, `projectId` and `processId`.")
        .query("leadId", "The lead", id())
        .query("referenceId", "Its external id", text())
        .query("projectId", "The API key's project", id())
        .query("processId", "The process of `referenceId`", id())
        .query_parameter("masked")
        .query_example("leadId=696102a4b8c1d2e3f4a5b6c7")
        .returns::<DataResponse<LeadDetails>>()
        .response_header("ETag")
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn a_lead_is_addressed_by_id_or_by_reference() {
        let id = "696102a4b8c1d2e3f4a5b6c7";
        let answer = |query: &str| {
            let real = query.replace("OURS", &PROJECT.to_string()).replace("ID", id);
            match Query::<LeadQuery>::parse(&real, &key()) {
                Ok(Query { query: LeadQuery { lead, masked }, .. }) => {
                    let lead = serde_json::to_string(&lead).unwrap();
                    let lead = lead.replace(id, "ID").replace(&PROJECT.to_string(), "OURS");
                    format!("?{query}\n    {lead} masked={masked}")
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
            400 address_missing: Either leadId or referenceId is required
        ?leadId=
            400 address_missing: Either leadId or referenceId is required
        ?leadId=7
            400 invalid_field: leadId must be 24 hex digits
        ?leadId=ID
            {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null} masked=false
        ?leadId=ID&masked=true&other=1
            {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null} masked=true
        ?leadId=ID&masked=yes
            400 invalid_field: masked must be true or false
        ?leadId=ID&leadId=ID
            400 invalid_field: leadId is given twice
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

    proptest! {
        #[test]
        fn arbitrary_queries_never_panic(query: String, phone: String) {
            let _ = Query::<LeadQuery>::parse(&query, &key());
            prop_assert_eq!(mask(&phone).chars().count(), phone.chars().count());
        }
    }
}

//! 1 Accept: `POST /api/v1/leads/initiate`: lead-state creates a lead or looks one up.
//!
//! Not through the command log: the client needs the new lead's id in the response. If a client hangs up, lead-state has
//! the whole request or nothing of it, and what it does stays.

use std::sync::Arc;

use contract::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    fields::BodyError,
    key::ApiKey,
    phone::{self, PhoneFault},
    rpc::{GetLead, InitiateLead, Lead},
};
use http_api::InitiateResponse;

use crate::{
    app::App,
    error::ApiError,
    request::{Body, FromBody, fields::Fields},
    response::{self, HandlerResult},
};

pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, Body(body): Body<InitiateBody>) -> HandlerResult {
    let lead = body.request.send(&app).await?;
    response::ok(&InitiateResponse { success: true, lead: lead.into(), warnings: body.warnings })
}

/// A lead to look up or to create.
#[derive(Debug)]
pub(crate) enum InitiateRequest {
    Existing(GetLead),
    New(InitiateLead),
}

impl InitiateRequest {
    pub(crate) async fn send(&self, app: &App) -> Result<Lead, ApiError> {
        match self {
            Self::Existing(lead) => app.request(lead).await,
            Self::New(lead) => app.request(lead).await,
        }
    }
}

/// A request and warnings about what its body contains and is ignored.
pub(crate) struct InitiateBody {
    request: InitiateRequest,
    warnings: Vec<String>,
}

impl FromBody for InitiateBody {
    /// `init` is the vendor's switch to start calling the lead. Any value is accepted, for Leadrelay makes no calls.
    fn from_body(body: &[u8], key: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?;
        fields.take("init");
        if let Some(lead_id) = fields.id("leadId")? {
            fields.ignore_rest("because leadId is given");
            let lead =
                GetLead { project_id: key.project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
            return Ok(Self { request: InitiateRequest::Existing(lead), warnings: fields.warnings });
        }
        let lead =
            fields.object("lead")?.ok_or_else(|| ApiError::missing("Either leadId or lead object is required"))?;
        fields.ignore_rest("as unknown");
        let (lead, warnings) = parse_lead(Fields::from_object("lead.", &lead), key)?;
        fields.warnings.extend(warnings);
        Ok(Self { request: InitiateRequest::New(lead), warnings: fields.warnings })
    }
}

/// Parses a new lead; also returns warnings about ignored fields.
pub(crate) fn parse_lead(mut fields: Fields<'_>, key: &ApiKey) -> Result<(InitiateLead, Vec<String>), ApiError> {
    let project_id = required_id(&mut fields, "projectId", "projectId is required in lead object")?;
    let process_id = required_id(&mut fields, "processId", "processId is required in lead object")?;
    if project_id != key.project_id {
        return Err(BodyError::ProjectMismatch.into());
    }
    let name = parse_name(&mut fields)?;
    let phone = fields.text("phone")?.map(parse_phone).transpose()?;
    let email = fields.text("email")?.map(parse_email).transpose()?;
    if phone.is_none() && email.is_none() {
        return Err(ApiError::missing("phone or email is required in lead object"));
    }
    let lead = InitiateLead {
        project_id,
        process_id,
        group_id: fields.text("groupId")?,
        reference_id: fields.text("referenceId")?,
        name: Some(name),
        phone,
        email,
        metadata: fields.object("metadata")?.unwrap_or_else(JsonObject::empty),
    };
    fields.ignore_rest("as unknown");
    Ok((lead, fields.warnings))
}

fn required_id(fields: &mut Fields<'_>, name: &str, missing: &'static str) -> Result<ObjectId, ApiError> {
    fields.id(name)?.ok_or_else(|| ApiError::missing(missing))
}

/// `name`, or else `firstName` and, where given, `lastName`.
fn parse_name(fields: &mut Fields<'_>) -> Result<String, ApiError> {
    if let Some(name) = fields.text("name")? {
        for part in ["firstName", "lastName"] {
            if fields.take(part).is_some() {
                fields.warnings.push(format!("lead.{part} is ignored because lead.name is given"));
            }
        }
        return Ok(name);
    }
    let first =
        fields.text("firstName")?.ok_or_else(|| ApiError::missing("name or firstName is required in lead object"))?;
    let name = match fields.text("lastName")? {
        Some(last) => format!("{first} {last}"),
        None => first,
    };
    if name.chars().nth(MAX_TEXT_CHARS).is_some() {
        return Err(ApiError::field(
            "lead.firstName",
            format!("and lead.lastName have more than {MAX_TEXT_CHARS} characters"),
        ));
    }
    Ok(name)
}

fn parse_phone(text: String) -> Result<String, ApiError> {
    phone::parse(&text).map_err(|fault| match fault {
        PhoneFault::Repeating => ApiError::InvalidVendorField("Phone number contains repeating digits pattern"),
        fault => ApiError::field("lead.phone", fault.to_string()),
    })
}

/// Lowers an e-mail address. Refuses only texts that no address can be; a mail server decides the rest.
fn parse_email(text: String) -> Result<String, ApiError> {
    let email = text.trim().to_lowercase();
    let sane = |local: &str, domain: &str| {
        !local.is_empty()
            && !domain.contains('@')
            && domain.split('.').count() > 1
            && domain.split('.').all(|label| !label.is_empty())
            && !email.contains(|c: char| c.is_whitespace() || c.is_control())
            // RFC 5321, 4.5.3.1.3: a path has at most 256 octets, angle brackets included.
            && email.len() <= 254
    };
    match email.split_once('@') {
        Some((local, domain)) if sane(local, domain) => Ok(email),
        _ => Err(ApiError::field("lead.email", "must be an e-mail address")),
    }
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Leads", "initiateLead", "Create a lead, or look one up")
        .description(
            "Creates a lead in the initial state of its process. With `leadId` instead of `lead`, looks one up.",
        )
        .body::<http_api::InitiateRequest>()
        .returns::<InitiateResponse>()
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    const ID: &str = "696102a4b8c1d2e3f4a5b6c7";

    fn parsed(inputs: &[&str]) -> String {
        let one = |input: &&str| {
            let body = input.replace("OURS", "1".repeat(24).as_str()).replace("ID", ID);
            match InitiateBody::from_body(body.as_bytes(), &key()) {
                Ok(InitiateBody { request, warnings }) => {
                    let request = match request {
                        InitiateRequest::Existing(lead) => format!("get {}", serde_json::to_string(&lead).unwrap()),
                        InitiateRequest::New(lead) => format!("new {}", serde_json::to_string(&lead).unwrap()),
                    };
                    let request = request.replace(ID, "ID").replace(&PROJECT.to_string(), "OURS");
                    let warnings = warnings.iter().map(|warning| format!("\n    warning: {warning}"));
                    format!("{input}\n    {request}{}", warnings.collect::<String>())
                }
                Err(e) => format!("{input}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        };
        inputs.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn bodies_are_parsed_with_warnings() {
        insta::assert_snapshot!(parsed(&[
            r#"{}"#,
            r#"{"init":true}"#,
            r#"{"lead":[]}"#,
            r#"{"leadId":"x"}"#,
            r#"{"leadId":"ID"}"#,
            r#"{"leadId":"ID","lead":{},"init":true}"#,
            r#"{"lead":{}}"#,
            r#"{"lead":{"projectId":"OURS"}}"#,
            r#"{"lead":{"projectId":"ID","processId":"ID"}}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID"}}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","lastName":"Lovelace"}}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada"}}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"+14155550123","metadata":[]}}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","firstName":"Ada","email":" Ada@Example.COM "},"init":false}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada","firstName":"A","phone":"+1 (415) 555-0123","email":"","timezone":"UTC"},"x":1}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","groupId":"g","firstName":"Ada","lastName":"Lovelace","phone":"4155550123","email":"a@b.co","referenceId":"R","metadata":{"n": 1.50}}}"#,
        ]), @r#"
        {}
            400 missing_field: Either leadId or lead object is required
        {"init":true}
            400 missing_field: Either leadId or lead object is required
        {"lead":[]}
            400 invalid_field: lead must be a JSON object
        {"leadId":"x"}
            400 invalid_field: leadId must be 24 hex digits
        {"leadId":"ID"}
            get {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null}
        {"leadId":"ID","lead":{},"init":true}
            get {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null}
            warning: ignored because leadId is given: lead
        {"lead":{}}
            400 missing_field: projectId is required in lead object
        {"lead":{"projectId":"OURS"}}
            400 missing_field: processId is required in lead object
        {"lead":{"projectId":"ID","processId":"ID"}}
            403 project_mismatch: projectId does not match authenticated project
        {"lead":{"projectId":"OURS","processId":"ID"}}
            400 missing_field: name or firstName is required in lead object
        {"lead":{"projectId":"OURS","processId":"ID","lastName":"Lovelace"}}
            400 missing_field: name or firstName is required in lead object
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada"}}
            400 missing_field: phone or email is required in lead object
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"+14155550123","metadata":[]}}
            400 invalid_field: lead.metadata must be a JSON object
        {"lead":{"projectId":"OURS","processId":"ID","firstName":"Ada","email":" Ada@Example.COM "},"init":false}
            new {"projectId":"OURS","processId":"ID","groupId":null,"referenceId":null,"name":"Ada","phone":null,"email":"ada@example.com","metadata":{}}
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada","firstName":"A","phone":"+1 (415) 555-0123","email":"","timezone":"UTC"},"x":1}
            new {"projectId":"OURS","processId":"ID","groupId":null,"referenceId":null,"name":"Ada","phone":"+1 (415) 555-0123","email":null,"metadata":{}}
            warning: ignored as unknown: x
            warning: lead.firstName is ignored because lead.name is given
            warning: lead.email is empty and was ignored
            warning: ignored as unknown: lead.timezone
        {"lead":{"projectId":"OURS","processId":"ID","groupId":"g","firstName":"Ada","lastName":"Lovelace","phone":"4155550123","email":"a@b.co","referenceId":"R","metadata":{"n": 1.50}}}
            new {"projectId":"OURS","processId":"ID","groupId":"g","referenceId":"R","name":"Ada Lovelace","phone":"4155550123","email":"a@b.co","metadata":{"n": 1.50}}
        "#);
    }

    #[test]
    fn a_phone_number_that_is_none_is_refused_by_field_or_in_the_words_of_the_vendor() {
        assert_eq!(parse_phone("+1 (415)\u{a0}555-0123".into()).unwrap(), "+1 (415) 555-0123");
        let refused = ["1234", "call me", "+91 1111111111"];
        insta::assert_snapshot!(refused.map(|text| parse_phone(text.into()).unwrap_err().to_string()).join("\n"), @r"
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        lead.phone must be a phone number, best in E.164 form such as +14155550123, and contains U+0063 'c'
        Phone number contains repeating digits pattern
        ");
    }

    #[test]
    fn impossible_email_addresses_are_refused() {
        assert_eq!(parse_email("Ada.Lovelace+x@Mail.Example.com".into()).unwrap(), "ada.lovelace+x@mail.example.com");
        for bad in ["ada", "@x.y", "ada@", "ada@x", "ada@x.", "ada@.y", "a@b@c.d", "a b@c.d", "a\n@c.d"] {
            assert!(parse_email(bad.into()).is_err(), "{bad:?}");
        }
        assert!(parse_email(format!("{}@x.yz", "a".repeat(250))).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>, phone: String, email: String) {
            let _ = InitiateBody::from_body(&body, &key());
            let _ = parse_phone(phone);
            let _ = parse_email(email);
        }
    }
}

//! 1 Accept: `POST /api/v1/leads/initiate`: lead-state creates a lead, or looks one up, and is waited for.
//!
//! Not through the command log: the client needs the new lead's id in the answer. When a client hangs up, lead-state
//! has been asked whole or not at all; what it did then stands.

use std::sync::Arc;

use async_nats::Client;
use axum::{extract::Request, http::StatusCode};
use contract::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    key::ApiKey,
    rpc::{self, GetLead, InitiateLead, Lead, RpcError},
};
use serde::Serialize;

use crate::{
    body,
    error::ApiError,
    fields::Fields,
    routes::{Answer, LeadView, json},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Initiated<'a> {
    success: bool,
    #[serde(flatten)]
    lead: LeadView<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Answers with the lead.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let body = body::read(request, app.max_body_bytes).await?;
    let (wanted, warnings) = parse(&body, &key)?;
    let lead = wanted.ask(&app.broker()?.client).await?;
    Ok(json(StatusCode::OK, &Initiated { success: true, lead: (&lead).into(), warnings }))
}

/// What is asked of lead-state.
#[derive(Debug)]
pub(crate) enum Wanted {
    Known(GetLead),
    New(InitiateLead),
}

impl Wanted {
    /// Asks it.
    pub(crate) async fn ask(&self, client: &Client) -> Result<Lead, RpcError> {
        match self {
            Self::Known(lead) => service_kit::rpc::query(client, rpc::LEAD_GET, lead).await,
            Self::New(lead) => service_kit::rpc::call(client, rpc::LEAD_INITIATE, lead).await,
        }
    }
}

/// Reads what a body asks for, and warns of what is ignored. `init` is the vendor's switch to start calling the lead;
/// it is accepted whatever it says, for Leadrelay makes no calls.
fn parse(body: &[u8], key: &ApiKey) -> Result<(Wanted, Vec<String>), ApiError> {
    let mut fields = Fields::from_json(body)?;
    fields.take("init");
    if let Some(lead_id) = fields.id("leadId")? {
        fields.ignore_rest("because leadId is given");
        let lead = GetLead { project_id: key.project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
        return Ok((Wanted::Known(lead), fields.warnings));
    }
    let lead = fields.object("lead")?.ok_or(ApiError::MissingField("Either leadId or lead object is required"))?;
    fields.ignore_rest("as unknown");
    let (lead, warnings) = parse_lead(Fields::from_object("lead.", &lead), key)?;
    fields.warnings.extend(warnings);
    Ok((Wanted::New(lead), fields.warnings))
}

/// Reads a new lead, and warns of what is ignored.
pub(crate) fn parse_lead(mut fields: Fields<'_>, key: &ApiKey) -> Result<(InitiateLead, Vec<String>), ApiError> {
    let project_id = required_id(&mut fields, "projectId", "projectId is required in lead object")?;
    let process_id = required_id(&mut fields, "processId", "processId is required in lead object")?;
    if project_id != key.project_id {
        return Err(ApiError::OtherProject);
    }
    let name = parse_name(&mut fields)?;
    let phone = fields.text("phone")?.map(parse_phone).transpose()?;
    let email = fields.text("email")?.map(parse_email).transpose()?;
    if phone.is_none() && email.is_none() {
        return Err(ApiError::MissingField("phone or email is required in lead object"));
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
    fields.id(name)?.ok_or(ApiError::MissingField(missing))
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
        fields.text("firstName")?.ok_or(ApiError::MissingField("name or firstName is required in lead object"))?;
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

/// A phone number as it was written: E.164 is recommended, not required. What cannot be one is refused.
fn parse_phone(text: String) -> Result<String, ApiError> {
    let fault = |fault: &str| Err(ApiError::field("lead.phone", fault));
    let phone = text.trim();
    let digits: Vec<char> = phone.chars().filter(char::is_ascii_digit).collect();
    let plain =
        phone.chars().enumerate().all(|(i, c)| c.is_ascii_digit() || " -.()/".contains(c) || (c == '+' && i == 0));
    // E.164 has at most 15 digits, and no country's numbers have fewer than 5.
    if !plain || !(5..=15).contains(&digits.len()) {
        return fault("must be a phone number, best in E.164 form such as +14155550123");
    }
    if digits.iter().all(|digit| *digit == digits[0]) {
        return Err(ApiError::UnfitField("Phone number contains repeating digits pattern"));
    }
    Ok(phone.to_owned())
}

/// An e-mail address in lower case. Only what cannot be one is refused: mail decides the rest.
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
mod tests {
    use contract::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    const ID: &str = "696102a4b8c1d2e3f4a5b6c7";

    fn answers(inputs: &[&str]) -> String {
        let answer = |input: &&str| {
            let body = input.replace("OURS", "1".repeat(24).as_str()).replace("ID", ID);
            match parse(body.as_bytes(), &key()) {
                Ok((wanted, warnings)) => {
                    let wanted = match wanted {
                        Wanted::Known(lead) => format!("get {}", serde_json::to_string(&lead).unwrap()),
                        Wanted::New(lead) => format!("new {}", serde_json::to_string(&lead).unwrap()),
                    };
                    let wanted = wanted.replace(ID, "ID").replace(&PROJECT.to_string(), "OURS");
                    let warnings = warnings.iter().map(|warning| format!("\n    warning: {warning}"));
                    format!("{input}\n    {wanted}{}", warnings.collect::<String>())
                }
                Err(e) => format!("{input}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        };
        inputs.iter().map(answer).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn what_is_asked() {
        insta::assert_snapshot!(answers(&[
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
    fn what_can_be_a_phone_number() {
        for good in ["+14155550123", "(0)30 / 1234-567", "030.1234", " 12345 "] {
            assert_eq!(parse_phone(good.into()).unwrap(), good.trim());
        }
        let refused =
            ["1234", "1234567890123456", "call me", "1+23456", "+14155550123x9", "0000000000", "+1 111 111 111"];
        insta::assert_snapshot!(refused.map(|text| parse_phone(text.into()).unwrap_err().to_string()).join("\n"), @r"
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        lead.phone must be a phone number, best in E.164 form such as +14155550123
        Phone number contains repeating digits pattern
        Phone number contains repeating digits pattern
        ");
    }

    #[test]
    fn what_can_be_an_email_address() {
        assert_eq!(parse_email("Ada.Lovelace+x@Mail.Example.com".into()).unwrap(), "ada.lovelace+x@mail.example.com");
        for bad in ["ada", "@x.y", "ada@", "ada@x", "ada@x.", "ada@.y", "a@b@c.d", "a b@c.d", "a\n@c.d"] {
            assert!(parse_email(bad.into()).is_err(), "{bad:?}");
        }
        assert!(parse_email(format!("{}@x.yz", "a".repeat(250))).is_err());
    }

    #[test]
    fn a_lead_in_the_vendors_shape() {
        let lead = Lead {
            lead_id: ObjectId::from_bytes([1; 12]),
            project_id: PROJECT,
            process_id: ObjectId::from_bytes([2; 12]),
            reference_id: None,
            name: Some("Ada".into()),
            phone: Some("+14155550123".into()),
            email: None,
            state: "new".into(),
            disposition: None,
            metadata: JsonObject::from_text(r#"{"n":100000000000000000000000000001.50}"#.into()).unwrap(),
            version: 1,
            created_at: Timestamp::from_millis(1_768_193_759_048),
            updated_at: Timestamp::from_millis(1_768_193_759_048),
            activities: vec![],
        };
        let initiated = Initiated { success: true, lead: (&lead).into(), warnings: vec![] };
        insta::assert_snapshot!(serde_json::to_string(&initiated).unwrap(), @r#"{"success":true,"_id":"010101010101010101010101","name":"Ada","phone":"+14155550123","email":null,"projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":null,"currentState":"new","metadata":{"n":100000000000000000000000000001.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z"}"#);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>, phone: String, email: String) {
            let _ = parse(&body, &key());
            let _ = parse_phone(phone);
            let _ = parse_email(email);
        }
    }
}

//! 1 Accept: `POST /api/v1/leads/initiate`: lead-state creates a lead, or looks one up, and is waited for.
//!
//! Not through the command log: the client needs the new lead's id in the answer. When a client hangs up, lead-state
//! has been asked whole or not at all; what it did then stands.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::StatusCode,
};
use contract::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    key::{ApiKey, Scope},
    rpc::{self, GetLead, InitiateLead, Lead},
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
struct Initiated<'a> {
    success: bool,
    #[serde(flatten)]
    lead: LeadView<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Answers with the lead.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Answer {
    let key = app.authorize(request.headers(), Scope::LeadsWrite)?;
    let body = body::read(request, app.max_body_bytes).await?;
    let (wanted, warnings) = parse(&body, &key)?;
    let client = &app.broker()?.client;
    let lead: Lead = match wanted {
        Wanted::Known(lead) => service_kit::rpc::call(client, rpc::LEAD_GET, &lead).await?,
        Wanted::New(lead) => service_kit::rpc::call(client, rpc::LEAD_INITIATE, &lead).await?,
    };
    Ok(json(StatusCode::OK, &Initiated { success: true, lead: (&lead).into(), warnings }))
}

/// What is asked of lead-state.
#[derive(Debug)]
enum Wanted {
    Known(GetLead),
    New(InitiateLead),
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
    fields.ignore_rest("because nothing is known of it");
    let (lead, warnings) = parse_lead(Fields::from_object("lead.", &lead), key)?;
    fields.warnings.extend(warnings);
    Ok((Wanted::New(lead), fields.warnings))
}

fn parse_lead(mut fields: Fields, key: &ApiKey) -> Result<(InitiateLead, Vec<String>), ApiError> {
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
    fields.ignore_rest("because nothing is known of it");
    Ok((lead, fields.warnings))
}

fn required_id(fields: &mut Fields, name: &str, missing: &'static str) -> Result<ObjectId, ApiError> {
    fields.id(name)?.ok_or(ApiError::MissingField(missing))
}

/// `name`, or else `firstName` and, where given, `lastName`.
fn parse_name(fields: &mut Fields) -> Result<String, ApiError> {
    if let Some(name) = fields.text("name")? {
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
        return fault("cannot be a phone number: all its digits are the same");
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

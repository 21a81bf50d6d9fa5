//! 1 Accept: `POST /api/v1/leads/initiate`: lead-state creates a lead or looks one up.
//!
//! A new lead does not go through the command log, because the client needs its id in the response. If a client hangs
//! up, lead-state has the whole request or nothing of it, and its changes stay.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{extract::Request, http::HeaderValue};
use contract::{
    JsonObject, ObjectId,
    command::{MAX_TEXT_CHARS, UpdateCommand},
    fields::BodyError,
    key::ApiKey,
    phone::{self, PhoneFault},
    rpc::{GetLead, InitiateLead, Lead},
    warning::Warning,
};
use http_api::{InitiateResponse, OnExisting, Outcome};
use service_kit::clock;
use tokio::time::sleep;

use crate::{
    accept::{self, Logged, Waiting},
    app::App,
    command::Command,
    error::ApiError,
    idempotency::Claim,
    request::{
        FromBody, body,
        fields::{self, Fields},
        prefer::PREFERENCE_APPLIED,
        trace,
    },
    response::{self, HandlerResult},
};

/// How long a lookup waits for the budget of reads. Longer lets a bulk request that reads large leads finish; shorter
/// holds fewer requests.
const READ_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    fields::refuse_query(&request)?;
    let (waiting, traceparent) = (Waiting::of(request.headers()), trace::traceparent(request.headers()));
    let body = body::read(request, app.max_body_bytes).await?;
    let InitiateBody { request, mut warnings } = InitiateBody::from_body(&body, &key)?;
    let Initiated { lead, existing, update_id, outcome, preference_applied, warnings: ignored } =
        request.send(&app, &key, waiting, &traceparent).await?;
    warnings.extend(ignored);
    let initiated = InitiateResponse { success: true, lead: lead.into(), existing, update_id, outcome, warnings };
    let mut response = response::ok(&initiated)?;
    if let Some(applied) = preference_applied {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    Ok(response)
}

/// A lead to look up or to create.
#[derive(Debug)]
pub(crate) enum InitiateRequest {
    Existing(GetLead),
    New { lead: InitiateLead, on_existing: OnExisting },
}

/// The result of a request.
pub(crate) struct Initiated {
    pub(crate) lead: Lead,
    /// Whether the lead existed before, although the request would create one.
    pub(crate) existing: bool,
    /// The update of the existing lead.
    pub(crate) update_id: Option<ObjectId>,
    outcome: Option<Outcome>,
    preference_applied: Option<HeaderValue>,
    pub(crate) warnings: Vec<String>,
}

impl Initiated {
    fn new(lead: Lead, existing: bool) -> Self {
        Self { lead, existing, update_id: None, outcome: None, preference_applied: None, warnings: Vec::new() }
    }
}

impl InitiateRequest {
    pub(crate) async fn send(
        &self,
        app: &App,
        key: &ApiKey,
        waiting: Waiting,
        traceparent: &str,
    ) -> Result<Initiated, ApiError> {
        let (lead, on_existing) = match self {
            Self::Existing(lead) => return Ok(Initiated::new(read(app, lead).await?, false)),
            Self::New { lead, on_existing } => (lead, *on_existing),
        };
        match app.request(lead).await {
            Err(ApiError::Query(error)) if error.code == "reference_exists" && on_existing != OnExisting::Refuse => {}
            created => return Ok(Initiated::new(created?, false)),
        }
        let known = GetLead {
            project_id: key.project_id,
            lead_id: None,
            reference_id: lead.reference_id.clone(),
            process_id: Some(lead.process_id),
        };
        let existing = Initiated::new(read(app, &known).await?, true);
        match on_existing {
            OnExisting::Update => update(app, key, existing, lead, waiting, traceparent).await,
            OnExisting::Return | OnExisting::Refuse => Ok(existing),
        }
    }
}

/// Reads a lead within its project's budget of reads. A bulk request reads many leads, so each lookup waits up to
/// [`READ_PATIENCE`].
async fn read(app: &App, lead: &GetLead) -> Result<Lead, ApiError> {
    let began = Instant::now();
    while let Err(wait) = app.read_budget.admit_read(lead.project_id, Instant::now()) {
        if began.elapsed() + wait > READ_PATIENCE {
            return Err(ApiError::WorkLimited(wait));
        }
        sleep(wait).await;
    }
    let found = app.request(lead).await?;
    app.read_budget.spend(lead.project_id, found.metadata.get().len() as u64, Instant::now());
    Ok(found)
}

/// Updates an existing lead through the command log, like every update: only the leader changes leads.
async fn update(
    app: &App,
    key: &ApiKey,
    existing: Initiated,
    given: &InitiateLead,
    waiting: Waiting,
    traceparent: &str,
) -> Result<Initiated, ApiError> {
    let mut warnings = unchanged(&existing.lead, given);
    let mut command = Command::Update(Box::new(UpdateCommand {
        lead_id: Some(existing.lead.lead_id),
        name: given.name.clone(),
        metadata: Some(given.metadata.clone()).filter(|metadata| !metadata.is_empty()),
        warnings: warnings.clone(),
        ..UpdateCommand::default()
    }));
    let claim = Claim { update_id: clock::new_id(), replayed: false };
    command.identify(claim.update_id, Some(key.key_id));
    let Logged { outcome, preference_applied, warning } =
        accept::log(app, key.project_id, &command, claim, waiting, traceparent, Instant::now()).await?;
    warnings.extend(warning.map(str::to_owned));
    let lead = match &outcome {
        Some(outcome) if outcome.success => {
            let (project_id, lead_id) = (key.project_id, Some(existing.lead.lead_id));
            app.request(&GetLead { project_id, lead_id, reference_id: None, process_id: None }).await?
        }
        _ => existing.lead,
    };
    Ok(Initiated { lead, existing: true, update_id: Some(claim.update_id), outcome, preference_applied, warnings })
}

/// Warnings about the given fields that an update of an existing lead does not change.
fn unchanged(existing: &Lead, given: &InitiateLead) -> Vec<String> {
    let differs = |own: &Option<String>, given: &Option<String>| given.is_some() && given != own;
    let fields = [
        ("phone", differs(&existing.phone, &given.phone)),
        ("email", differs(&existing.email, &given.email)),
        ("groupId", given.group_id.is_some()),
    ];
    let ignored = fields.into_iter().filter(|(_, is_ignored)| *is_ignored);
    ignored.map(|(field, _)| format!("lead.{field} is ignored: the lead exists and keeps its own")).collect()
}

/// A request, and warnings about ignored fields of its body.
pub(crate) struct InitiateBody {
    request: InitiateRequest,
    warnings: Vec<String>,
}

impl FromBody for InitiateBody {
    /// `init` is the vendor's switch to start calling the lead. Any value is accepted, because Leadrelay makes no
    /// calls.
    fn from_body(body: &[u8], key: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?;
        fields.take("init");
        if let Some(lead_id) = fields.id("leadId")? {
            fields.ignore_rest(Warning::BESIDE_LEAD_ID);
            let lead =
                GetLead { project_id: key.project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
            return Ok(Self { request: InitiateRequest::Existing(lead), warnings: fields.warnings });
        }
        let lead =
            fields.object("lead")?.ok_or_else(|| ApiError::missing("Either leadId or lead object is required"))?;
        let on_existing = parse_on_existing(&mut fields)?;
        fields.ignore_rest(Warning::UNKNOWN);
        let (request, warnings) = parse_new(Fields::from_object("lead.", &lead), on_existing, key)?;
        fields.warnings.extend(warnings);
        Ok(Self { request, warnings: fields.warnings })
    }
}

/// What to do with a lead that exists. By default the request is refused, as in the vendor's API.
pub(crate) fn parse_on_existing(fields: &mut Fields<'_>) -> Result<OnExisting, ApiError> {
    match fields.text_or_refuse_empty("onExisting")?.as_deref() {
        None | Some("refuse") => Ok(OnExisting::Refuse),
        Some("return") => Ok(OnExisting::Return),
        Some("update") => Ok(OnExisting::Update),
        Some(_) => Err(ApiError::field("onExisting", "must be return, update or refuse")),
    }
}

/// Parses a lead to create; also returns warnings about ignored fields.
pub(crate) fn parse_new(
    fields: Fields<'_>,
    on_existing: OnExisting,
    key: &ApiKey,
) -> Result<(InitiateRequest, Vec<String>), ApiError> {
    let (lead, warnings) = parse_lead(fields, key)?;
    if on_existing != OnExisting::Refuse && lead.reference_id.is_none() {
        return Err(ApiError::missing("referenceId is required in lead object when onExisting is return or update"));
    }
    Ok((InitiateRequest::New { lead, on_existing }, warnings))
}

/// Parses a new lead; also returns warnings about ignored fields.
fn parse_lead(mut fields: Fields<'_>, key: &ApiKey) -> Result<(InitiateLead, Vec<String>), ApiError> {
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
        reference_id: fields.reference_id()?,
        name: Some(name),
        phone,
        email,
        metadata: fields.object("metadata")?.unwrap_or_else(JsonObject::empty),
    };
    fields.ignore_rest(Warning::UNKNOWN);
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
                fields.warnings.push(Warning::BESIDE_NAME.with(&[&part]));
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

/// Converts an e-mail address to lower case. Refuses only texts that cannot be an address; a mail server decides the
/// rest.
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
            "Creates a lead in the initial state of its process. With `leadId` instead of `lead`, looks one up. If the process \
             has a lead with this `referenceId`, the request is refused; with `onExisting`, that lead is returned, or its name \
             and metadata are updated: the response has the `updateId`, and with `Prefer: wait` the outcome.",
        )
        .header("Prefer")
        .header("traceparent")
        .body::<http_api::InitiateRequest>()
        .returns::<InitiateResponse>()
        .response_header("Preference-Applied")
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
                        InitiateRequest::New { lead, on_existing } => {
                            let lead = serde_json::to_string(&lead).unwrap();
                            let on_existing = serde_json::to_value(on_existing).unwrap();
                            let on_existing = on_existing.as_str().filter(|text| *text != "refuse");
                            format!("new {lead}{}", on_existing.map(|text| format!(" or {text}")).unwrap_or_default())
                        }
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
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123","referenceId":"R"},"onExisting":"update"}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123"},"onExisting":"return"}"#,
            r#"{"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123"},"onExisting":"refuse"}"#,
            r#"{"lead":{},"onExisting":"merge"}"#,
            r#"{"lead":{},"onExisting":""}"#,
            r#"{"leadId":"ID","onExisting":"update"}"#,
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
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123","referenceId":"R"},"onExisting":"update"}
            new {"projectId":"OURS","processId":"ID","groupId":null,"referenceId":"R","name":"Ada","phone":"4155550123","email":null,"metadata":{}} or update
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123"},"onExisting":"return"}
            400 missing_field: referenceId is required in lead object when onExisting is return or update
        {"lead":{"projectId":"OURS","processId":"ID","name":"Ada","phone":"4155550123"},"onExisting":"refuse"}
            new {"projectId":"OURS","processId":"ID","groupId":null,"referenceId":null,"name":"Ada","phone":"4155550123","email":null,"metadata":{}}
        {"lead":{},"onExisting":"merge"}
            400 invalid_field: onExisting must be return, update or refuse
        {"lead":{},"onExisting":""}
            400 invalid_field: onExisting must not be empty; leave it out instead
        {"leadId":"ID","onExisting":"update"}
            get {"projectId":"OURS","leadId":"ID","referenceId":null,"processId":null}
            warning: ignored because leadId is given: onExisting
        "#);
    }

    #[test]
    fn invalid_phone_numbers_are_refused_by_field_or_with_the_vendors_text() {
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

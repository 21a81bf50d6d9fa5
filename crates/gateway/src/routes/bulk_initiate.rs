//! 1 Accept: `POST /api/v1/leads/bulk/initiate`: many leads in one request, each created or looked up by itself.
//!
//! The answer is written as the leads come, in their order, so that no more than a few of them are held. What failed comes
//! after what did not, as the vendor's shape has it.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::Response,
};
use contract::{
    JsonObject,
    key::ApiKey,
    rpc::{GetLead, Lead},
};
use futures::{Stream, StreamExt, stream};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    body,
    error::ApiError,
    fields::Fields,
    routes::{
        Answer, LeadView,
        initiate_lead::{Wanted, parse_lead},
    },
    server::App,
};

/// Most leads in a request: the vendor's bound, which a refusal names.
pub(crate) const MAX_LEADS: usize = 1000;
/// Longest body, unless single requests may be longer: a thousand leads of 4 KiB.
const MAX_BODY_BYTES: usize = 4 << 20;
/// How many leads of one request are asked of lead-state at once. More would crowd out the requests of others.
const AT_ONCE: usize = 16;
/// How many warnings an answer names.
const NAMED: usize = 10;

/// A lead that was asked for and is not there.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "LeadRefused"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct Failed {
    /// What was given: a lead, or an id.
    #[cfg_attr(test, schemars(with = "serde_json::Value"))]
    data: Box<RawValue>,
    reference_id: Option<String>,
    error: String,
    code: String,
}

/// What became of one of them, and what was ignored of it.
struct Done {
    lead: Result<Box<RawValue>, Failed>,
    warnings: Vec<String>,
}

/// What is asked.
#[derive(Debug)]
struct Asked {
    kind: Kind,
    entries: Vec<Box<RawValue>>,
    warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Leads,
    LeadIds,
}

/// Answers with the leads.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let slot = app.bulk_slot()?;
    let body = body::read(request, app.max_body_bytes.max(MAX_BODY_BYTES)).await?;
    let asked = parse(&body)?;
    app.broker()?;
    let Asked { kind, entries, warnings } = asked;
    let away = Arc::new(OnceLock::new());
    let done = stream::iter(entries).map(move |entry| {
        // Held until the answer is written, or nobody takes it.
        let _ = &slot;
        let (app, key, away) = (app.clone(), key.clone(), away.clone());
        async move { initiate(&app, &key, kind, entry, &away).await }
    });
    let writing = Writing::new(done.buffered(AT_ONCE), warnings);
    let mut response = Response::new(Body::from_stream(stream::unfold(writing, Writing::next)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Reads what a body asks for; what is wrong with one entry is that entry's.
fn parse(body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::from_json(body)?;
    fields.take("init");
    let (name, kind) = match fields.take("leadIds") {
        Some(ids) => (ids, Kind::LeadIds),
        None => {
            let leads = fields.take("leads");
            (leads.ok_or(ApiError::MissingField("Either leadIds or leads array is required"))?, Kind::Leads)
        }
    };
    let (field, why) = match kind {
        Kind::LeadIds => ("leadIds", "because leadIds is given"),
        Kind::Leads => ("leads", "as unknown"),
    };
    fields.ignore_rest(why);
    let entries: Vec<Box<RawValue>> =
        serde_json::from_str(name.get()).map_err(|_| ApiError::UnfitField("Input must be an array"))?;
    if entries.len() > MAX_LEADS {
        return Err(ApiError::UnfitField("Maximum of 1000 leads allowed per request"));
    }
    if entries.is_empty() {
        return Err(ApiError::field(field, "must have an entry"));
    }
    Ok(Asked { kind, entries, warnings: fields.warnings })
}

/// What an entry asks for, and what is ignored of it.
type Parsed = (Wanted, Vec<String>);

/// Reads an entry; also its external id, to name it by.
fn parse_entry(kind: Kind, entry: &RawValue, key: &ApiKey) -> (Option<String>, Result<Parsed, ApiError>) {
    if kind == Kind::LeadIds {
        let lead_id = serde_json::from_str(entry.get()).map_err(|_| ApiError::field("leadId", "must be 24 hex digits"));
        let known = |lead_id| {
            let lead =
                GetLead { project_id: key.project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
            (Wanted::Known(lead), Vec::new())
        };
        return (None, lead_id.map(known));
    }
    let Ok(lead) = JsonObject::from_raw(entry.to_owned()) else {
        return (None, Err(ApiError::field("lead", "must be a JSON object")));
    };
    let reference_id = lead.members().get("referenceId").and_then(|raw| serde_json::from_str(raw.get()).ok());
    let parsed = parse_lead(Fields::from_object("lead.", &lead), key);
    (reference_id, parsed.map(|(lead, warnings)| (Wanted::New(lead), warnings)))
}

/// Has an entry created or looked up. Once lead-state does not answer, the rest is not tried.
async fn initiate(app: &App, key: &ApiKey, kind: Kind, entry: Box<RawValue>, away: &OnceLock<ApiError>) -> Done {
    let (reference_id, parsed) = parse_entry(kind, &entry, key);
    let mut warnings = Vec::new();
    let asked = async {
        let (wanted, ignored) = parsed?;
        warnings = ignored;
        if let Some(error) = away.get() {
            return Err(error.clone());
        }
        let lead: Lead = wanted.ask(&app.broker()?.client).await?;
        serde_json::value::to_raw_value(&LeadView::from(&lead)).map_err(|_| ApiError::Internal)
    };
    let lead = asked.await.map_err(|error| {
        if error.status() == StatusCode::SERVICE_UNAVAILABLE {
            let _ = away.set(error.clone());
        }
        app.metrics.refused(&error);
        Failed { data: entry, reference_id, error: error.to_string(), code: error.code().to_owned() }
    });
    Done { lead, warnings }
}

/// An answer that is being written.
struct Writing {
    /// What became of the entries, in their order.
    done: Pin<Box<dyn Stream<Item = Done> + Send>>,
    /// How many of them were seen.
    count: usize,
    /// Whether one is written already.
    any: bool,
    errors: Vec<Failed>,
    warnings: Vec<String>,
    unnamed_warnings: usize,
    over: bool,
}

/// What comes behind the leads.
#[derive(Serialize)]
struct Rest<'a> {
    errors: &'a [Failed],
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

impl Writing {
    /// Begins an answer; it starts with warnings of the request as a whole.
    fn new(done: impl Stream<Item = Done> + Send + 'static, warnings: Vec<String>) -> Self {
        Self {
            done: Box::pin(done),
            count: 0,
            any: false,
            errors: Vec::new(),
            warnings,
            unnamed_warnings: 0,
            over: false,
        }
    }

    /// The next piece of the text, and what is still to be written.
    async fn next(mut self) -> Option<(Result<String, serde_json::Error>, Self)> {
        if self.over {
            return None;
        }
        while let Some(Done { lead, warnings }) = self.done.next().await {
            for warning in warnings {
                if self.warnings.len() < NAMED {
                    self.warnings.push(format!("leads[{}]: {warning}", self.count));
                } else {
                    self.unnamed_warnings += 1;
                }
            }
            self.count += 1;
            match lead {
                Ok(lead) => {
                    let before = if std::mem::replace(&mut self.any, true) { "," } else { r#"{"success":["# };
                    return Some((Ok(format!("{before}{lead}")), self));
                }
                Err(failed) => self.errors.push(failed),
            }
        }
        self.over = true;
        if self.unnamed_warnings > 0 {
            self.warnings.push(format!("{} more", self.unnamed_warnings));
        }
        let before = if self.any { "]," } else { r#"{"success":[],"# };
        let rest = serde_json::to_string(&Rest { errors: &self.errors, warnings: &self.warnings });
        // The rest is an object by itself; here it goes on in the one that was begun.
        Some((rest.map(|rest| format!("{before}{}", rest.trim_start_matches('{'))), self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    const ID: &str = "696102a4b8c1d2e3f4a5b6c7";

    #[test]
    fn what_is_asked() {
        let many = |count: usize| format!(r#"{{"leadIds":[{}]}}"#, vec!["1"; count].join(","));
        assert_eq!(parse(many(1000).as_bytes()).unwrap().entries.len(), 1000);
        let bodies = [
            "{}",
            r#"{"leads":{}}"#,
            r#"{"leads":[]}"#,
            &many(1001),
            r#"{"leadIds":["a"],"leads":[{}],"init":true}"#,
            r#"{"leads":[{},7],"x":1}"#,
        ];
        let told = bodies.map(|body| match parse(body.as_bytes()) {
            Ok(asked) => format!("{:.50}\n    {:?} of {} {:?}", body, asked.kind, asked.entries.len(), asked.warnings),
            Err(e) => format!("{:.50}\n    {} {}: {e}", body, e.status().as_u16(), e.code()),
        });
        insta::assert_snapshot!(told.join("\n"), @r#"
        {}
            400 missing_field: Either leadIds or leads array is required
        {"leads":{}}
            400 invalid_field: Input must be an array
        {"leads":[]}
            400 invalid_field: leads must have an entry
        {"leadIds":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,
            400 invalid_field: Maximum of 1000 leads allowed per request
        {"leadIds":["a"],"leads":[{}],"init":true}
            LeadIds of 1 ["ignored because leadIds is given: leads"]
        {"leads":[{},7],"x":1}
            Leads of 2 ["ignored as unknown: x"]
        "#);
    }

    #[test]
    fn what_an_entry_asks_for() {
        let project = key().project_id.to_string();
        let entry = |kind, text: &str| {
            let raw = RawValue::from_string(text.replace("OURS", &project).replace("ID", ID)).unwrap();
            let (reference_id, parsed) = parse_entry(kind, &raw, &key());
            let told = match parsed {
                Ok((Wanted::Known(lead), warnings)) => format!("get {} {warnings:?}", lead.lead_id.unwrap()),
                Ok((Wanted::New(lead), warnings)) => format!("new {:?} {warnings:?}", lead.name.unwrap()),
                Err(e) => format!("{} {}: {e}", e.status().as_u16(), e.code()),
            };
            format!("{text}\n    {reference_id:?} {told}")
        };
        let told = [
            entry(Kind::LeadIds, r#""ID""#),
            entry(Kind::LeadIds, r#""x""#),
            entry(Kind::LeadIds, "{}"),
            entry(Kind::Leads, r#""ID""#),
            entry(Kind::Leads, r#"{"referenceId":7}"#),
            entry(Kind::Leads, r#"{"projectId":"ID","processId":"ID","name":"Ada","referenceId":"R"}"#),
            entry(
                Kind::Leads,
                r#"{"projectId":"OURS","processId":"ID","name":"Ada","phone":"+14155550123","referenceId":"R","x":1}"#,
            ),
        ];
        insta::assert_snapshot!(told.join("\n"), @r#"
        "ID"
            None get 696102a4b8c1d2e3f4a5b6c7 []
        "x"
            None 400 invalid_field: leadId must be 24 hex digits
        {}
            None 400 invalid_field: leadId must be 24 hex digits
        "ID"
            None 400 invalid_field: lead must be a JSON object
        {"referenceId":7}
            None 400 missing_field: projectId is required in lead object
        {"projectId":"ID","processId":"ID","name":"Ada","referenceId":"R"}
            Some("R") 403 project_mismatch: projectId does not match authenticated project
        {"projectId":"OURS","processId":"ID","name":"Ada","phone":"+14155550123","referenceId":"R","x":1}
            Some("R") new "Ada" ["ignored as unknown: lead.x"]
        "#);
    }

    async fn written(done: Vec<Done>, warnings: Vec<String>) -> String {
        let pieces = stream::unfold(Writing::new(stream::iter(done), warnings), Writing::next);
        let text: String = pieces.map(Result::unwrap).collect().await;
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        text
    }

    #[tokio::test]
    async fn an_answer_in_the_vendors_shape() {
        let raw = |text: &str| RawValue::from_string(text.into()).unwrap();
        let lead = |n: usize, warnings: usize| Done {
            lead: Ok(raw(&format!("{{\"n\":{n}}}"))),
            warnings: vec!["odd".into(); warnings],
        };
        let failed = Done {
            lead: Err(Failed {
                data: raw(r#"{"referenceId":"R"}"#),
                reference_id: Some("R".into()),
                error: "projectId is required in lead object".into(),
                code: "missing_field".into(),
            }),
            warnings: vec![],
        };
        insta::assert_snapshot!(written(vec![], vec![]).await, @r#"{"success":[],"errors":[]}"#);
        insta::assert_snapshot!(written(vec![lead(0, 0), failed, lead(2, 1)], vec!["ignored as unknown: x".into()]).await, @r#"{"success":[{"n":0},{"n":2}],"errors":[{"data":{"referenceId":"R"},"referenceId":"R","error":"projectId is required in lead object","code":"missing_field"}],"warnings":["ignored as unknown: x","leads[2]: odd"]}"#);
        insta::assert_snapshot!(written(vec![lead(0, 12)], vec![]).await, @r#"{"success":[{"n":0}],"errors":[],"warnings":["leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","leads[0]: odd","2 more"]}"#);
    }
}

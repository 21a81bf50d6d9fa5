//! 1 Accept: `POST /api/v1/leads/bulk/initiate`: many leads in one request, each created or looked up independently.
//!
//! The response is streamed in the order of the request, so that only a few leads are in memory. Errors follow the
//! successes, as in the vendor's API.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
};

use axum::{
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::Response,
};
use contract::{JsonObject, key::ApiKey, rpc::GetLead, warning::Warning};
use futures::{Stream, StreamExt, stream};
use http_api::{InitiatedLead, OnExisting, RefusedLead, Upserted};
use serde::Serialize;
use serde_json::value::RawValue;
use service_kit::clock;

use crate::{
    accept::Waiting,
    app::App,
    auth::KeyCheck,
    error::ApiError,
    request::{Body, BulkPermit, FromBody, fields::Fields},
    response::HandlerResult,
    routes::leads::initiate::{InitiateRequest, Initiated, parse_new, parse_on_existing},
};

/// Most leads in a request: the vendor's limit, which the error names.
pub(crate) const MAX_LEADS: usize = 1000;
/// Longest body: a thousand leads of 4 KiB, or the limit of single requests if that is higher.
const MAX_BODY_BYTES: usize = 4 << 20;
/// How many leads of one request are sent to lead-state at once. More would crowd out other requests.
const CONCURRENCY: usize = 16;
/// How many warnings a response contains.
const MAX_WARNINGS: usize = 10;

/// The result of an entry.
struct InitiateResult {
    lead: Result<Box<RawValue>, RefusedLead>,
    warnings: Vec<String>,
}

/// The entries of a body.
#[derive(Debug)]
pub(crate) struct BulkInitiateRequest {
    kind: Kind,
    on_existing: OnExisting,
    entries: Vec<Box<RawValue>>,
    warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Leads,
    LeadIds,
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    key_check: KeyCheck,
    permit: BulkPermit,
    Body(request): Body<BulkInitiateRequest>,
) -> HandlerResult {
    app.connection()?;
    let BulkInitiateRequest { kind, on_existing, entries, warnings } = request;
    let outage = Arc::new(OnceLock::new());
    let results = stream::iter(entries).map(move |entry| {
        // Held until the response is written or dropped.
        let _ = &permit;
        let (app, key, outage) = (app.clone(), key.clone(), outage.clone());
        if let Err(error) = key_check.check(&app.keys, &app.key_uses) {
            let _ = outage.set(error);
        }
        async move { initiate(&app, &key, (kind, on_existing), entry, &outage).await }
    });
    let writer = ResponseWriter::new(results.buffered(CONCURRENCY), warnings);
    let mut response = Response::new(axum::body::Body::from_stream(stream::unfold(writer, ResponseWriter::next)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

impl FromBody for BulkInitiateRequest {
    fn max_bytes(app: &App) -> usize {
        app.max_body_bytes.max(MAX_BODY_BYTES)
    }

    /// An invalid entry is not an error of the request.
    fn from_body(body: &[u8], _: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?;
        fields.take("init");
        let (name, kind) = match fields.take("leadIds") {
            Some(ids) => (ids, Kind::LeadIds),
            None => {
                let leads = fields.take("leads");
                (leads.ok_or_else(|| ApiError::missing("Either leadIds or leads array is required"))?, Kind::Leads)
            }
        };
        let (field, warning, on_existing) = match kind {
            Kind::LeadIds => ("leadIds", Warning::BESIDE_LEAD_IDS, OnExisting::Refuse),
            Kind::Leads => ("leads", Warning::UNKNOWN, parse_on_existing(&mut fields)?),
        };
        fields.ignore_rest(warning);
        let entries: Vec<Box<RawValue>> =
            serde_json::from_str(name.get()).map_err(|_| ApiError::InvalidVendorField("Input must be an array"))?;
        if entries.len() > MAX_LEADS {
            return Err(ApiError::InvalidVendorField("Maximum of 1000 leads allowed per request"));
        }
        if entries.is_empty() {
            return Err(ApiError::field(field, "must have an entry"));
        }
        Ok(Self { kind, on_existing, entries, warnings: fields.warnings })
    }
}

/// An entry, and warnings about its ignored fields.
type Parsed = (InitiateRequest, Vec<String>);

/// Parses an entry; also returns its external id, for the error.
fn parse_entry(
    (kind, on_existing): (Kind, OnExisting),
    entry: &RawValue,
    key: &ApiKey,
) -> (Option<String>, Result<Parsed, ApiError>) {
    if kind == Kind::LeadIds {
        let lead_id = serde_json::from_str(entry.get()).map_err(|_| ApiError::field("leadId", "must be 24 hex digits"));
        let known = |lead_id| {
            let lead =
                GetLead { project_id: key.project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
            (InitiateRequest::Existing(lead), Vec::new())
        };
        return (None, lead_id.map(known));
    }
    let Ok(lead) = JsonObject::from_raw(entry.to_owned()) else {
        return (None, Err(ApiError::field("lead", "must be a JSON object")));
    };
    let reference_id = lead.members().get("referenceId").and_then(|raw| serde_json::from_str(raw.get()).ok());
    (reference_id, parse_new(Fields::from_object("lead.", &lead), on_existing, key))
}

/// Creates, looks up or updates the lead of an entry, without waiting for the outcome of an update. Once `outage` is
/// set, the remaining entries fail with it at once.
async fn initiate(
    app: &App,
    key: &ApiKey,
    kind: (Kind, OnExisting),
    entry: Box<RawValue>,
    outage: &OnceLock<ApiError>,
) -> InitiateResult {
    let (reference_id, parsed) = parse_entry(kind, &entry, key);
    let mut warnings = Vec::new();
    let created = async {
        let (request, ignored) = parsed?;
        warnings = ignored;
        if let Some(error) = outage.get() {
            return Err(error.clone());
        }
        let Initiated { lead, existing, update_id, warnings: unchanged, .. } =
            request.send(app, key, Waiting::NONE, &clock::new_traceparent()).await?;
        warnings.extend(unchanged);
        let initiated = InitiatedLead { lead: lead.into(), more: Upserted { existing, update_id } };
        serde_json::value::to_raw_value(&initiated).map_err(|_| ApiError::Internal)
    };
    let lead = created.await.map_err(|error| {
        if error.status() == StatusCode::SERVICE_UNAVAILABLE {
            let _ = outage.set(error.clone());
        }
        app.metrics.count_refusal(error.label());
        RefusedLead { data: entry, reference_id, error: error.to_string(), code: error.code().to_owned() }
    });
    InitiateResult { lead, warnings }
}

/// A response that is being written.
struct ResponseWriter {
    /// The results of the entries, in their order.
    results: Pin<Box<dyn Stream<Item = InitiateResult> + Send>>,
    /// The number of results so far.
    count: usize,
    /// Whether a lead is written already.
    any: bool,
    errors: Vec<RefusedLead>,
    warnings: Vec<String>,
    omitted_warnings: usize,
    done: bool,
}

/// The part of the response that follows the leads.
#[derive(Serialize)]
struct Rest<'a> {
    errors: &'a [RefusedLead],
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

impl ResponseWriter {
    /// `warnings` are about the request as a whole.
    fn new(results: impl Stream<Item = InitiateResult> + Send + 'static, warnings: Vec<String>) -> Self {
        Self {
            results: Box::pin(results),
            count: 0,
            any: false,
            errors: Vec::new(),
            warnings,
            omitted_warnings: 0,
            done: false,
        }
    }

    /// The next chunk of the body.
    async fn next(mut self) -> Option<(Result<String, serde_json::Error>, Self)> {
        if self.done {
            return None;
        }
        while let Some(InitiateResult { lead, warnings }) = self.results.next().await {
            for warning in warnings {
                if self.warnings.len() < MAX_WARNINGS {
                    self.warnings.push(Warning::IN_BULK.with(&[&self.count, &warning]));
                } else {
                    self.omitted_warnings += 1;
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
        self.done = true;
        if self.omitted_warnings > 0 {
            self.warnings.push(Warning::MORE.with(&[&self.omitted_warnings]));
        }
        let before = if self.any { "]," } else { r#"{"success":[],"# };
        let rest = serde_json::to_string(&Rest { errors: &self.errors, warnings: &self.warnings });
        // Continues the object that was begun.
        Some((rest.map(|rest| format!("{before}{}", rest.trim_start_matches('{'))), self))
    }
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Leads", "initiateLeads", "Create up to 1000 leads, or look them up")
        .description(
            "Each lead is handled independently: 200 does not mean that every lead succeeded. The body may have 4 MiB. `onExisting` is that of a \
             single lead, for all of them; an updated lead is shown as it was before the update.",
        )
        .body::<http_api::BulkInitiateRequest>()
        .returns::<http_api::BulkInitiateResponse>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    const ID: &str = "696102a4b8c1d2e3f4a5b6c7";

    #[test]
    fn a_body_has_1_to_1000_leads_or_ids() {
        let many = |count: usize| format!(r#"{{"leadIds":[{}]}}"#, vec!["1"; count].join(","));
        assert_eq!(BulkInitiateRequest::from_body(many(1000).as_bytes(), &key()).unwrap().entries.len(), 1000);
        let bodies = [
            "{}",
            r#"{"leads":{}}"#,
            r#"{"leads":[]}"#,
            &many(1001),
            r#"{"leadIds":["a"],"leads":[{}],"init":true}"#,
            r#"{"leads":[{},7],"x":1}"#,
            r#"{"leads":[{}],"onExisting":"always"}"#,
        ];
        let parsed = bodies.map(|body| match BulkInitiateRequest::from_body(body.as_bytes(), &key()) {
            Ok(request) => {
                format!("{:.50}\n    {:?} of {} {:?}", body, request.kind, request.entries.len(), request.warnings)
            }
            Err(e) => format!("{:.50}\n    {} {}: {e}", body, e.status().as_u16(), e.code()),
        });
        insta::assert_snapshot!(parsed.join("\n"), @r#"
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
        {"leads":[{}],"onExisting":"always"}
            400 invalid_field: onExisting must be return, update or refuse
        "#);
    }

    #[test]
    fn entries_are_parsed_independently() {
        let project = key().project_id.to_string();
        let entry = |kind, text: &str| {
            let raw = RawValue::from_string(text.replace("OURS", &project).replace("ID", ID)).unwrap();
            let (reference_id, parsed) = parse_entry((kind, OnExisting::Refuse), &raw, &key());
            let result = match parsed {
                Ok((InitiateRequest::Existing(lead), warnings)) => {
                    format!("get {} {warnings:?}", lead.lead_id.unwrap())
                }
                Ok((InitiateRequest::New { lead, .. }, warnings)) => {
                    format!("new {:?} {warnings:?}", lead.name.unwrap())
                }
                Err(e) => format!("{} {}: {e}", e.status().as_u16(), e.code()),
            };
            format!("{text}\n    {reference_id:?} {result}")
        };
        let parsed = [
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
        insta::assert_snapshot!(parsed.join("\n"), @r#"
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

    async fn written(results: Vec<InitiateResult>, warnings: Vec<String>) -> String {
        let chunks = stream::unfold(ResponseWriter::new(stream::iter(results), warnings), ResponseWriter::next);
        let text: String = chunks.map(Result::unwrap).collect().await;
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        text
    }

    #[tokio::test]
    async fn errors_and_warnings_follow_the_leads() {
        let raw = |text: &str| RawValue::from_string(text.into()).unwrap();
        let lead = |n: usize, warnings: usize| InitiateResult {
            lead: Ok(raw(&format!("{{\"n\":{n}}}"))),
            warnings: vec!["odd".into(); warnings],
        };
        let failed = InitiateResult {
            lead: Err(RefusedLead {
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

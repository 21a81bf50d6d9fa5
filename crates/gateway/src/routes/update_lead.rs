//! 1 Accept: `POST /api/v1/leads/update`: a body becomes a command in the log.

use std::sync::Arc;

use async_nats::Client;
use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::Response,
};
use contract::{
    JsonObject, ObjectId,
    command::UpdateCommand,
    event::{CompletionEvent, WebhookPayload},
    headers,
    idempotency::{IdempotencyRecord, idempotency_key},
    key::ApiKey,
    rpc::{self, GetUpdate, Update},
    trace::is_traceparent,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use service_kit::{
    clock,
    traces::{Span, Step},
};

use crate::{
    body,
    error::ApiError,
    fields::{Address, Fields},
    idempotency::{self, Claim, IDEMPOTENT_REPLAYED},
    if_match,
    outcomes::Waiter,
    prefer::{PREFERENCE_APPLIED, Wait},
    routes::{Answer, dry_run, get_update, json},
    server::App,
};

/// Where it is served.
pub(crate) const ROUTE: &str = "/api/v1/leads/update";

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "UpdateAccepted"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct Accepted {
    success: bool,
    message: &'static str,
    update_id: ObjectId,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    /// As the webhook tells it; only where it was waited for, and came in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<WebhookPayload<'static>>"))]
    outcome: Option<Box<RawValue>>,
}

/// Answers once the update is in the log.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let (mut span, traceparent) = begin_trace(&app, ROUTE, request.headers());
    let answer = accept(&app, &key, request, &traceparent, &mut span).await;
    note_answer(&mut span, answer.as_ref().map(Response::status));
    answer
}

async fn accept(app: &App, key: &ApiKey, request: Request, traceparent: &str, span: &mut Span) -> Answer {
    let client_key = idempotency::key(request.headers())?;
    let if_match = if_match::expected_version(request.headers())?;
    let wait = Wait::of(request.headers());
    let body = body::read(request, app.max_body_bytes).await?;
    let mut asked = parse(&body, key)?;
    asked.command.expected_version = agree(if_match, asked.command.expected_version)?;
    // Boxed, like all that most requests do without: the runtime moves the handler's whole state several times.
    if asked.dry_run {
        return Box::pin(dry_run::answer(app, key, asked)).await;
    }
    let Asked { mut command, warnings, .. } = asked;
    let broker = app.broker()?;
    let mut claim = Claim { update_id: clock::new_id(), replayed: false };
    if let Some(client_key) = client_key {
        let record = IdempotencyRecord::new(&body, if_match, claim.update_id);
        let record_key = idempotency_key(key.project_id, &client_key);
        claim = Box::pin(app.idempotency.claim(&broker.js, &record_key, &record)).await?;
    }
    let Claim { update_id, replayed } = claim;
    command.update_id = Some(update_id);
    span.update(update_id);
    let waiting = match wait {
        Some(wait) => Box::pin(Waiting::begin(app, &broker.client, wait, key.project_id, claim)).await,
        None => None,
    };
    // Also when it was asked for before: whether the first one's command reached the log is not known.
    app.command_log.append(&broker.commands, key.project_id, update_id, &command, traceparent).await?;
    let mut preference_applied = None;
    let mut outcome = None;
    if let Some(waiting) = waiting {
        preference_applied = waiting.wait.applied();
        outcome = Box::pin(waiting.outcome()).await;
    }
    let accepted = Accepted { success: true, message: "Lead update initiated", update_id, warnings, outcome };
    let mut response = json(StatusCode::OK, &accepted);
    if let Some(applied) = preference_applied.filter(|_| accepted.outcome.is_some()) {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    if replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// An answer that waits for the outcome.
struct Waiting<'a> {
    client: &'a Client,
    wait: Wait,
    waiter: Waiter,
    project_id: ObjectId,
    claim: Claim,
}

impl<'a> Waiting<'a> {
    /// Takes a place before the update is logged. None where there is none: then the answer does not wait.
    async fn begin(app: &App, client: &'a Client, wait: Wait, project_id: ObjectId, claim: Claim) -> Option<Self> {
        let waiter = app.outcomes.wait_for(client, project_id, claim.update_id).await?;
        Some(Self { client, wait, waiter, project_id, claim })
    }

    /// The outcome, as the webhook tells it, if it comes in time.
    async fn outcome(mut self) -> Option<Box<RawValue>> {
        let limit = self.wait.duration();
        tokio::time::timeout(limit, self.told_or_known()).await.ok().flatten()
    }

    async fn told_or_known(&mut self) -> Option<Box<RawValue>> {
        let wanted = GetUpdate { project_id: self.project_id, update_id: self.claim.update_id };
        let told = async {
            let event: CompletionEvent = serde_json::from_slice(&self.waiter.event().await?).ok()?;
            to_raw_value(&WebhookPayload::from(&event)).ok()
        };
        if !self.claim.replayed {
            return told.await;
        }
        // It may have been told before anybody waited here. Asked once: what is pending will be told.
        let known = async {
            let update: Update = service_kit::rpc::query(self.client, rpc::UPDATE_GET, &wanted).await.ok()?;
            to_raw_value(&get_update::outcome(&update)?).ok()
        };
        tokio::pin!(told);
        tokio::select! {
            Some(outcome) = known => Some(outcome),
            outcome = &mut told => outcome,
        }
    }
}

/// The version that is expected by the header, the body, or both.
fn agree(header: Option<u32>, body: Option<u32>) -> Result<Option<u32>, ApiError> {
    match (header, body) {
        (Some(header), Some(body)) if header != body => {
            Err(ApiError::field("expectedVersion", "is not the version that If-Match names"))
        }
        (header, body) => Ok(header.or(body)),
    }
}

/// The span of a request, and the trace of what goes on from it: the client's, or a new one.
pub(crate) fn begin_trace(app: &App, route: &'static str, headers: &HeaderMap) -> (Span, String) {
    let client = traceparent(headers);
    let span = app.traces.begin(Step::Request { route }, client.as_deref());
    let traceparent = span.traceparent().or(client).unwrap_or_else(clock::new_traceparent);
    (span, traceparent)
}

/// Notes in a request's span what was answered.
pub(crate) fn note_answer(span: &mut Span, answer: Result<StatusCode, &ApiError>) {
    let status = answer.unwrap_or_else(ApiError::status);
    span.note(|| [("http.response.status_code", i64::from(status.as_u16()).into())]);
    if let Err(error) = answer {
        span.note(|| [("leadrelay.error_code", error.code().to_owned().into())]);
        if status.is_server_error() {
            span.fail(status.as_str().to_owned(), error);
        }
    }
}

/// The trace that the client's request belongs to.
fn traceparent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(headers::TRACEPARENT)?.to_str().ok()?;
    is_traceparent(text).then(|| text.to_owned())
}

/// What a body asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Still without an id.
    pub(crate) command: UpdateCommand,
    /// What is ignored.
    pub(crate) warnings: Vec<String>,
    /// Whether it is only asked what would be.
    pub(crate) dry_run: bool,
}

/// Reads what a body asks for.
pub(crate) fn parse(body: &[u8], key: &ApiKey) -> Result<Asked, ApiError> {
    let mut fields = Fields::from_json(body)?;
    let Address { lead_id, reference_id, process_id } = fields.address(key)?;
    let name = fields.text("name")?;
    let target_state = fields.text("targetState")?;
    let disposition = fields.text("disposition")?;
    let user_id = fields.text("userId")?;
    let expected_version = fields.whole_number("expectedVersion")?;
    let expected_state = fields.text("expectedState")?;
    let dry_run = fields.flag("dryRun")?;
    let metadata = match fields.object("metadata")? {
        Some(metadata) => {
            fields.ignore_rest("because metadata is given");
            metadata
        }
        None => JsonObject::from_members(&fields.rest()),
    };
    let metadata = Some(metadata).filter(|metadata| !metadata.is_empty());
    // A disposition says why a state was entered and a user id who did it: alone they change nothing.
    if metadata.is_none() && name.is_none() && target_state.is_none() {
        return Err(ApiError::NothingToChange);
    }
    if disposition.is_some() && target_state.is_none() {
        fields.warnings.push("disposition is ignored without targetState".into());
    }
    let command = UpdateCommand {
        update_id: None,
        lead_id,
        reference_id,
        process_id,
        metadata,
        name,
        target_state,
        disposition,
        user_id,
        api_key_id: Some(key.key_id),
        expected_version,
        expected_state,
    };
    Ok(Asked { command, warnings: fields.warnings, dry_run })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use contract::json::{self, Members};
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::key;

    const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";

    /// Inputs with the answers that they get, in the words of the API.
    fn answers(inputs: &[&str]) -> String {
        let answer = |input: &&str| {
            // The ids that matter, by name.
            let body = input.replace("LEAD", LEAD).replace("OURS", "1".repeat(24).as_str()).replace("THEIRS", LEAD);
            match parse(body.as_bytes(), &key()) {
                Ok(Asked { mut command, warnings, dry_run }) => {
                    assert_eq!(command.api_key_id.take(), Some(key().key_id));
                    let command = serde_json::to_string(&command).unwrap().replace(LEAD, "LEAD");
                    let command = if dry_run { format!("dry run {command}") } else { command };
                    let warnings = warnings.iter().map(|warning| format!("\n    warning: {warning}"));
                    format!("{input}\n    {command}{}", warnings.collect::<String>())
                }
                Err(e) => format!("{input}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        };
        inputs.iter().map(answer).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn which_lead() {
        insta::assert_snapshot!(answers(&[
            r#"{"name":"Ada"}"#,
            r#"{"leadId":null,"referenceId":"","name":"Ada"}"#,
            r#"{"leadId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"OURS","name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"THEIRS","name":"Ada"}"#,
            r#"{"referenceId":"R","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"OURS","name":"Ada"}"#,
            r#"{"referenceId":"R","processId":"LEAD","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"THEIRS","processId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"LEAD","referenceId":"R","name":"Ada"}"#,
            r#"{"leadId":"LEAD","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
        ]), @r#"
        {"name":"Ada"}
            400 missing_field: Either leadId or referenceId is required
        {"leadId":null,"referenceId":"","name":"Ada"}
            400 missing_field: Either leadId or referenceId is required
        {"leadId":"LEAD","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","projectId":"OURS","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","projectId":"THEIRS","name":"Ada"}
            403 project_mismatch: projectId does not match authenticated project
        {"referenceId":"R","name":"Ada"}
            400 missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","projectId":"OURS","name":"Ada"}
            400 missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","processId":"LEAD","name":"Ada"}
            400 missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"referenceId":"R","processId":"LEAD","name":"Ada"}
        {"referenceId":"R","projectId":"THEIRS","processId":"LEAD","name":"Ada"}
            403 project_mismatch: projectId does not match authenticated project
        {"leadId":"LEAD","referenceId":"R","name":"Ada"}
            400 missing_field: projectId and processId are required when using referenceId
        {"leadId":"LEAD","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"leadId":"LEAD","referenceId":"R","processId":"LEAD","name":"Ada"}
        {"leadId":"","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"referenceId":"R","processId":"LEAD","name":"Ada"}
            warning: leadId is empty and was ignored
        "#);
    }

    #[test]
    fn what_fields_may_hold() {
        let long = format!(r#"{{"leadId":"LEAD","name":"{}"}}"#, "é".repeat(1025));
        assert!(answers(&[&long]).ends_with("400 invalid_field: name must have at most 1024 characters"));
        assert!(!answers(&[&long.replacen('é', "", 1)]).contains(" 400 "));
        insta::assert_snapshot!(answers(&[
            r#"{"leadId":"696102a4b8","name":"Ada"}"#,
            r#"{"leadId":"696102A4B8C1D2E3F4A5B6C7","name":"Ada"}"#,
            r#"{"leadId":7,"name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"p","name":"Ada"}"#,
            r#"{"leadId":"LEAD","processId":"p","name":"Ada"}"#,
            r#"{"referenceId":12,"name":"Ada"}"#,
            r#"{"leadId":"LEAD","name":["Ada"]}"#,
            r#"{"leadId":"LEAD","name":"","targetState":"","disposition":"","userId":"","make":"Toyota"}"#,
            r#"{"leadId":"LEAD","targetState":true}"#,
            r#"{"leadId":"LEAD","targetState":"lost","disposition":1}"#,
            r#"{"leadId":"LEAD","targetState":"lost","userId":1}"#,
            r#"{"leadId":"LEAD","name":null,"targetState":"lost","disposition":"price","userId":"u-1"}"#,
            r#"{"leadId":"LEAD","name":"Ada","disposition":"price"}"#,
        ]), @r#"
        {"leadId":"696102a4b8","name":"Ada"}
            400 invalid_field: leadId must be 24 hex digits
        {"leadId":"696102A4B8C1D2E3F4A5B6C7","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":7,"name":"Ada"}
            400 invalid_field: leadId must be a string
        {"leadId":"LEAD","projectId":"p","name":"Ada"}
            400 invalid_field: projectId must be 24 hex digits
        {"leadId":"LEAD","processId":"p","name":"Ada"}
            400 invalid_field: processId must be 24 hex digits
        {"referenceId":12,"name":"Ada"}
            400 invalid_field: referenceId must be a string
        {"leadId":"LEAD","name":["Ada"]}
            400 invalid_field: name must be a string
        {"leadId":"LEAD","name":"","targetState":"","disposition":"","userId":"","make":"Toyota"}
            {"leadId":"LEAD","metadata":{"make":"Toyota"}}
            warning: name is empty and was ignored
            warning: targetState is empty and was ignored
            warning: disposition is empty and was ignored
            warning: userId is empty and was ignored
        {"leadId":"LEAD","targetState":true}
            400 invalid_field: targetState must be a string
        {"leadId":"LEAD","targetState":"lost","disposition":1}
            400 invalid_field: disposition must be a string
        {"leadId":"LEAD","targetState":"lost","userId":1}
            400 invalid_field: userId must be a string
        {"leadId":"LEAD","name":null,"targetState":"lost","disposition":"price","userId":"u-1"}
            {"leadId":"LEAD","targetState":"lost","disposition":"price","userId":"u-1"}
        {"leadId":"LEAD","name":"Ada","disposition":"price"}
            {"leadId":"LEAD","name":"Ada","disposition":"price"}
            warning: disposition is ignored without targetState
        "#);
    }

    #[test]
    fn what_becomes_metadata() {
        insta::assert_snapshot!(answers(&[
            r#"{"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}"#,
            r#"{"leadId":"LEAD","metadata":{"a":1},"make":"Toyota","year":2024}"#,
            r#"{"leadId":"LEAD","metadata":{},"make":"Toyota"}"#,
            r#"{"leadId":"LEAD","metadata":[]}"#,
            r#"{"leadId":"LEAD","metadata":"{}"}"#,
            r#"{"z":123456789012345678901234567890,"leadId":"LEAD","a":{"x": null},"metadata":null,"m":null,"name":"Ada","b":1e2}"#,
            r#"{"leadId":"LEAD","make":"Toyota","model":"Camry"}"#,
        ]), @r#"
        {"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}
            {"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}
        {"leadId":"LEAD","metadata":{"a":1},"make":"Toyota","year":2024}
            {"leadId":"LEAD","metadata":{"a":1}}
            warning: ignored because metadata is given: make, year
        {"leadId":"LEAD","metadata":{},"make":"Toyota"}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","metadata":[]}
            400 invalid_field: metadata must be a JSON object
        {"leadId":"LEAD","metadata":"{}"}
            400 invalid_field: metadata must be a JSON object
        {"z":123456789012345678901234567890,"leadId":"LEAD","a":{"x": null},"metadata":null,"m":null,"name":"Ada","b":1e2}
            {"leadId":"LEAD","metadata":{"z":123456789012345678901234567890,"a":{"x": null},"m":null,"b":1e2},"name":"Ada"}
        {"leadId":"LEAD","make":"Toyota","model":"Camry"}
            {"leadId":"LEAD","metadata":{"make":"Toyota","model":"Camry"}}
        "#);
    }

    #[test]
    fn a_change_must_be_asked_for() {
        insta::assert_snapshot!(answers(&[
            r#"{"leadId":"LEAD"}"#,
            r#"{"leadId":"LEAD","metadata":{ }}"#,
            r#"{"leadId":"LEAD","name":null,"targetState":null,"metadata":null}"#,
            r#"{"leadId":"LEAD","disposition":"price","userId":"u-1"}"#,
        ]), @r#"
        {"leadId":"LEAD"}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","metadata":{ }}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","name":null,"targetState":null,"metadata":null}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","disposition":"price","userId":"u-1"}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        "#);
    }

    #[test]
    fn what_is_no_json_object() {
        insta::assert_snapshot!(answers(&[
            "",
            "null",
            "[]",
            r#""text""#,
            r#"{"leadId":"LEAD","name":"Ada""#,
            r#"{"leadId":"LEAD","name":"Ada"} {}"#,
            r#"{"leadId":"LEAD","name":"Ada","name":"Bob"}"#,
            r#"{"leadId":"LEAD","note":"a\u0000b"}"#,
            r#"{"leadId":"LEAD","note":"\ud800"}"#,
            r#"{"leadId":"LEAD","n":1e999}"#,
            r#"{"leadId":"LEAD","n":NaN}"#,
        ]), @r#"
            400 invalid_json: The body cannot be accepted as JSON: EOF while parsing a value at line 1 column 0
        null
            400 not_an_object: The body must be a JSON object
        []
            400 not_an_object: The body must be a JSON object
        "text"
            400 not_an_object: The body must be a JSON object
        {"leadId":"LEAD","name":"Ada"
            400 invalid_json: The body cannot be accepted as JSON: EOF while parsing an object at line 1 column 49
        {"leadId":"LEAD","name":"Ada"} {}
            400 invalid_json: The body cannot be accepted as JSON: trailing characters at line 1 column 52
        {"leadId":"LEAD","name":"Ada","name":"Bob"}
            400 invalid_json: The body cannot be accepted as JSON: the key "name" occurs twice in one object at line 1 column 63
        {"leadId":"LEAD","note":"a\u0000b"}
            400 invalid_json: The body cannot be accepted as JSON: a string holds the NUL character \u0000, which cannot be stored at line 1 column 54
        {"leadId":"LEAD","note":"\ud800"}
            400 invalid_json: The body cannot be accepted as JSON: unexpected end of hex escape at line 1 column 52
        {"leadId":"LEAD","n":1e999}
            400 invalid_json: The body cannot be accepted as JSON: number out of range at line 1 column 46
        {"leadId":"LEAD","n":NaN}
            400 invalid_json: The body cannot be accepted as JSON: expected value at line 1 column 42
        "#);
        let deep = format!(r#"{{"leadId":"{LEAD}","deep":{}{}}}"#, "[".repeat(64), "]".repeat(64));
        assert!(parse(deep.as_bytes(), &key()).unwrap_err().to_string().contains("nested deeper than 64"));
        assert!(parse(b"{\"a\":\"\xff\"}", &key()).unwrap_err().to_string().contains("not valid UTF-8"));
    }

    #[test]
    fn a_lead_as_the_client_saw_it() {
        insta::assert_snapshot!(answers(&[
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":4,"expectedState":"new"}"#,
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":null,"expectedState":""}"#,
            r#"{"leadId":"LEAD","expectedVersion":4}"#,
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":"4"}"#,
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":-1}"#,
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":4.0}"#,
            r#"{"leadId":"LEAD","name":"Ada","expectedState":["new"]}"#,
            r#"{"leadId":"LEAD","name":"Ada","dryRun":true}"#,
            r#"{"leadId":"LEAD","name":"Ada","dryRun":false}"#,
            r#"{"leadId":"LEAD","name":"Ada","dryRun":"yes"}"#,
        ]), @r#"
        {"leadId":"LEAD","name":"Ada","expectedVersion":4,"expectedState":"new"}
            {"leadId":"LEAD","name":"Ada","expectedVersion":4,"expectedState":"new"}
        {"leadId":"LEAD","name":"Ada","expectedVersion":null,"expectedState":""}
            {"leadId":"LEAD","name":"Ada"}
            warning: expectedState is empty and was ignored
        {"leadId":"LEAD","expectedVersion":4}
            400 nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","name":"Ada","expectedVersion":"4"}
            400 invalid_field: expectedVersion must be a whole number
        {"leadId":"LEAD","name":"Ada","expectedVersion":-1}
            400 invalid_field: expectedVersion must be a whole number
        {"leadId":"LEAD","name":"Ada","expectedVersion":4.0}
            400 invalid_field: expectedVersion must be a whole number
        {"leadId":"LEAD","name":"Ada","expectedState":["new"]}
            400 invalid_field: expectedState must be a string
        {"leadId":"LEAD","name":"Ada","dryRun":true}
            dry run {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","name":"Ada","dryRun":false}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","name":"Ada","dryRun":"yes"}
            400 invalid_field: dryRun must be true or false
        "#);
        assert_eq!(agree(None, None), Ok(None));
        assert_eq!(
            (agree(Some(4), None), agree(None, Some(4)), agree(Some(4), Some(4))),
            (Ok(Some(4)), Ok(Some(4)), Ok(Some(4)))
        );
        insta::assert_snapshot!(agree(Some(4), Some(5)).unwrap_err(), @"expectedVersion is not the version that If-Match names");
    }

    #[test]
    fn only_a_sane_trace_is_taken_over() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let of = |text: &str| {
            traceparent(
                &[("traceparent", text)].map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).into_iter().collect(),
            )
        };
        assert_eq!(of(good).as_deref(), Some(good));
        assert_eq!(of("nonsense"), None);
        assert_eq!(traceparent(&HeaderMap::new()), None);
    }

    /// Any JSON, as text, numbers of any length included.
    fn any_json() -> impl Strategy<Value = String> {
        let text = || any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap());
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?",
            text(),
        ];
        leaf.prop_recursive(4, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(|items| format!("[{}]", items.join(", "))),
                prop::collection::vec((text(), inner), 0..8).prop_map(|members| object(&members)),
            ]
        })
    }

    /// A body whose fields are named like those of the API, and others.
    fn any_body() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            prop::sample::select(vec![
                "referenceId",
                "projectId",
                "processId",
                "metadata",
                "name",
                "targetState",
                "disposition",
                "userId",
                "expectedVersion",
                "expectedState",
                "dryRun",
            ])
            .prop_map(str::to_owned),
            "[a-z]{1,3}",
        ];
        prop::collection::vec((name.prop_map(|name| format!("{name:?}")), any_json()), 0..8).prop_map(|mut members| {
            members.push((r#""leadId""#.into(), format!("{LEAD:?}")));
            object(&members)
        })
    }

    fn object(members: &[(String, String)]) -> String {
        let mut seen = HashSet::new();
        let members = members.iter().filter(|(name, _)| seen.insert(name));
        format!("{{{}}}", members.map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join(","))
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            let _ = parse(&body, &key());
        }

        #[test]
        fn arbitrary_json_never_panics(body in any_json()) {
            let _ = parse(body.as_bytes(), &key());
        }

        #[test]
        fn what_is_accepted_stays_what_it_is(body in any_body()) {
            let Ok(Asked { command, .. }) = parse(body.as_bytes(), &key()) else { return Ok(()) };
            let text = serde_json::to_string(&command).unwrap();
            prop_assert_eq!(json::check(text.as_bytes()), Ok(text.as_str()));
            prop_assert_eq!(serde_json::from_str::<UpdateCommand>(&text).unwrap(), command.clone());
            // Every value that is now metadata is, to the byte, what the client wrote.
            let given: Members = serde_json::from_str(&body).unwrap();
            let given = match given.get("metadata").filter(|raw| raw.get() != "null") {
                Some(metadata) => serde_json::from_str::<Members>(metadata.get()).unwrap(),
                None => given,
            };
            for (name, value) in command.metadata.iter().flat_map(JsonObject::members) {
                prop_assert_eq!(value.get(), given[&name].get());
            }
        }
    }
}

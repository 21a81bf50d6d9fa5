//! 1 Accept: `POST /api/v1/leads/update`: a body becomes a command in the log.

use std::sync::Arc;

use async_nats::Client;
use axum::{extract::Request, http::HeaderValue, response::Response};
use contract::{
    JsonObject, ObjectId, command::UpdateCommand, event::CompletionEvent, idempotency::IdempotencyRecord, key::ApiKey,
    rpc::GetUpdate,
};
use http_api::{Outcome, UpdateAccepted};
use service_kit::clock;

use crate::{
    app::App,
    auth::KeyCheck,
    error::ApiError,
    idempotency::{self, Claim, IDEMPOTENT_REPLAYED},
    outcome_waiters::OutcomeWaiter,
    request::{
        body,
        fields::{Address, Fields},
        if_match,
        prefer::{PREFERENCE_APPLIED, Wait},
        trace::RequestTrace,
    },
    response::{self, HandlerResult},
    routes::leads::dry_run,
};

/// The warning when a response does not wait for the outcome although the request prefers it.
const NOT_WAITED: &str = "Prefer: wait was ignored: too many requests wait already; read the update instead";

/// Responds once the update is in the log.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, "/api/v1/leads/update", request.headers());
    let response = accept(&app, &key, request, &mut trace).await;
    trace.record(response.as_ref().map(Response::status));
    response
}

async fn accept(app: &App, key: &ApiKey, request: Request, trace: &mut RequestTrace) -> HandlerResult {
    let client_key = idempotency::key(request.headers())?;
    let if_match = if_match::expected_version(request.headers())?;
    let wait = Wait::of(request.headers());
    let key_check = wait.map(|_| KeyCheck::of(request.headers()));
    let body = body::read(request, app.max_body_bytes).await?;
    let mut update = parse(&body, key)?;
    update.command.expected_version = agreed_version(if_match, update.command.expected_version)?;
    // Boxed, like everything that most requests do without: the runtime moves the handler's whole state several times.
    if update.dry_run {
        return Box::pin(dry_run::respond(app, key, update)).await;
    }
    let UpdateRequest { mut command, mut warnings, .. } = update;
    let broker = app.broker()?;
    let mut claim = Claim { update_id: clock::new_id(), replayed: false };
    if let Some(client_key) = client_key {
        let record = IdempotencyRecord::new(&body, if_match, claim.update_id);
        claim = Box::pin(app.idempotency.claim(&broker.js, key.project_id, &client_key, &record)).await?;
    }
    let Claim { update_id, replayed } = claim;
    command.update_id = Some(update_id);
    trace.span.update(update_id);
    let pending = match wait {
        Some(wait) => Box::pin(PendingOutcome::register(app, &broker.client, wait, key.project_id, claim)).await,
        None => None,
    };
    // Also if it was replayed: the first request's command may not have reached the log.
    app.command_log.append(&broker.commands, key.project_id, update_id, &command, &trace.traceparent).await?;
    let mut preference_applied = None;
    let mut outcome = None;
    match (pending, key_check) {
        (Some(pending), Some(key_check)) => {
            preference_applied = pending.wait.applied();
            outcome = Box::pin(pending.outcome(app, key_check)).await;
        }
        (None, Some(_)) => warnings.push(NOT_WAITED.into()),
        _ => {}
    }
    let accepted =
        UpdateAccepted { success: true, message: "Lead update initiated".into(), update_id, warnings, outcome };
    let mut response = response::ok(&accepted)?;
    if let Some(applied) = preference_applied.filter(|_| accepted.outcome.is_some()) {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    if replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// A response that waits for the outcome.
struct PendingOutcome<'a> {
    client: &'a Client,
    wait: Wait,
    waiter: OutcomeWaiter,
    project_id: ObjectId,
    claim: Claim,
}

impl<'a> PendingOutcome<'a> {
    /// Registers before the update is logged. None if too many requests wait: then this one does not.
    async fn register(app: &App, client: &'a Client, wait: Wait, project_id: ObjectId, claim: Claim) -> Option<Self> {
        let waiter = app.outcome_waiters.register(client, project_id, claim.update_id).await?;
        Some(Self { client, wait, waiter, project_id, claim })
    }

    /// The outcome, if it comes in time and while the key is valid.
    async fn outcome(mut self, app: &App, mut key_check: KeyCheck) -> Option<Outcome> {
        let limit = self.wait.duration();
        tokio::select! {
            _ = key_check.ended(&app.keys) => None,
            outcome = tokio::time::timeout(limit, self.announced_or_recorded()) => outcome.ok().flatten(),
        }
    }

    async fn announced_or_recorded(&mut self) -> Option<Outcome> {
        let query = GetUpdate { project_id: self.project_id, update_id: self.claim.update_id };
        let announced = async {
            let event: CompletionEvent = serde_json::from_slice(&self.waiter.event().await?).ok()?;
            Some(Outcome::from(event))
        };
        if !self.claim.replayed {
            return announced.await;
        }
        // It may have been announced before this request registered. Read once: a pending one will be announced.
        let recorded = async {
            let mut update = service_kit::rpc::request(self.client, &query).await.ok()?;
            Outcome::of(&mut update)
        };
        tokio::pin!(announced);
        tokio::select! {
            Some(outcome) = recorded => Some(outcome),
            outcome = &mut announced => outcome,
        }
    }
}

/// The version that the header, the body, or both expect.
fn agreed_version(header: Option<u32>, body: Option<u32>) -> Result<Option<u32>, ApiError> {
    match (header, body) {
        (Some(header), Some(body)) if header != body => {
            Err(ApiError::field("expectedVersion", "is not the version of If-Match"))
        }
        (header, body) => Ok(header.or(body)),
    }
}

/// An update as a body describes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UpdateRequest {
    /// Still without an id.
    pub(crate) command: UpdateCommand,
    /// What the body contains and is ignored.
    pub(crate) warnings: Vec<String>,
    pub(crate) dry_run: bool,
}

/// Parses the body of an update, or a line of a bulk request.
pub(crate) fn parse(body: &[u8], key: &ApiKey) -> Result<UpdateRequest, ApiError> {
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
    // A disposition and a user id describe a change; without one they change nothing.
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
    Ok(UpdateRequest { command, warnings: fields.warnings, dry_run })
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{DryRunResponse, UpdateRequest};
    crate::openapi::Operation::new("Updates", "updateLead", "Update a lead")
        .description(
            "Merges metadata into a lead, renames it, moves it to another state. Asynchronous: 200 means that the update is \
             in the log and will be applied exactly once. Its outcome is sent to the callbacks of the lead's process, and \
             `GET /api/v1/updates/{updateId}` returns it. With `dryRun` nothing is logged or changed, and the response is \
             the outcome that the update would have now.",
        )
        .header("Idempotency-Key")
        .header("Prefer")
        .header("If-Match")
        .header("traceparent")
        .body::<UpdateRequest>()
        .returns::<UpdateAccepted>()
        .or_returns::<DryRunResponse>()
        .response_header("Idempotent-Replayed")
        .response_header("Preference-Applied")
        .errors(&[404, 422])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use contract::json::{self, Members};
    use proptest::prelude::*;

    use super::*;
    use crate::auth::tests::key;

    const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";

    /// Inputs with the commands or errors that they become.
    fn parsed(inputs: &[&str]) -> String {
        let one = |input: &&str| {
            // The ids, by name.
            let body = input.replace("LEAD", LEAD).replace("OURS", "1".repeat(24).as_str()).replace("THEIRS", LEAD);
            match parse(body.as_bytes(), &key()) {
                Ok(UpdateRequest { mut command, warnings, dry_run }) => {
                    assert_eq!(command.api_key_id.take(), Some(key().key_id));
                    let command = serde_json::to_string(&command).unwrap().replace(LEAD, "LEAD");
                    let command = if dry_run { format!("dry run {command}") } else { command };
                    let warnings = warnings.iter().map(|warning| format!("\n    warning: {warning}"));
                    format!("{input}\n    {command}{}", warnings.collect::<String>())
                }
                Err(e) => format!("{input}\n    {} {}: {e}", e.status().as_u16(), e.code()),
            }
        };
        inputs.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_lead_is_addressed_by_id_or_by_reference_in_a_process() {
        insta::assert_snapshot!(parsed(&[
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
    fn fields_of_the_wrong_type_are_refused() {
        let long = format!(r#"{{"leadId":"LEAD","name":"{}"}}"#, "é".repeat(1025));
        assert!(parsed(&[&long]).ends_with("400 invalid_field: name must have at most 1024 characters"));
        assert!(!parsed(&[&long.replacen('é', "", 1)]).contains(" 400 "));
        insta::assert_snapshot!(parsed(&[
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
    fn unknown_fields_are_metadata_unless_metadata_is_given() {
        insta::assert_snapshot!(parsed(&[
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
    fn an_update_without_a_change_is_refused() {
        insta::assert_snapshot!(parsed(&[
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
    fn only_strict_json_objects_are_accepted() {
        insta::assert_snapshot!(parsed(&[
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
    fn expectations_and_dry_runs_are_parsed() {
        insta::assert_snapshot!(parsed(&[
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
        assert_eq!(agreed_version(None, None), Ok(None));
        assert_eq!(
            (agreed_version(Some(4), None), agreed_version(None, Some(4)), agreed_version(Some(4), Some(4))),
            (Ok(Some(4)), Ok(Some(4)), Ok(Some(4)))
        );
        insta::assert_snapshot!(agreed_version(Some(4), Some(5)).unwrap_err(), @"expectedVersion is not the version of If-Match");
    }

    #[test]
    fn every_documented_field_is_parsed() {
        let text = |text: &str| Some(text.to_owned());
        let request = http_api::UpdateRequest {
            lead_id: Some(LEAD.parse().unwrap()),
            reference_id: text("R"),
            project_id: Some(key().project_id),
            process_id: Some(LEAD.parse().unwrap()),
            name: text("Ada"),
            target_state: text("lost"),
            disposition: text("price"),
            user_id: text("u-1"),
            metadata: Some(JsonObject::from_text(r#"{"n":1}"#.into()).unwrap()),
            expected_version: Some(4),
            expected_state: text("new"),
            dry_run: Some(true),
        };

        let parsed = parse(&serde_json::to_vec(&request).unwrap(), &key()).unwrap();

        assert_eq!(parsed.warnings, [""; 0]);
        assert_eq!(parsed.command.metadata, request.metadata);
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
        fn accepted_values_are_unchanged_to_the_byte(body in any_body()) {
            let Ok(UpdateRequest { command, .. }) = parse(body.as_bytes(), &key()) else { return Ok(()) };
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

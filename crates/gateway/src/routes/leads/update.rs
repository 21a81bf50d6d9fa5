//! 1 Accept: `POST /api/v1/leads/update`: a body becomes a command in the log.

use std::sync::Arc;

use async_nats::Client;
use axum::{extract::Request, http::HeaderValue, response::Response};
use contract::{
    ObjectId, event::CompletionEvent, idempotency::IdempotencyRecord, key::ApiKey, rpc::GetUpdate,
    update_body::UpdateBody,
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
        body, fields, if_match,
        page::Parameters as _,
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
    let expected_version = if_match::expected_version(request.headers())?;
    let Parameters { dry_run, expected_state } = Parameters::parse(request.uri().query().unwrap_or_default())?;
    let wait = Wait::of(request.headers());
    let key_check = wait.map(|_| KeyCheck::of(request.headers()));
    let body = body::read(request, app.max_body_bytes).await?;
    let UpdateBody { mut command, mut warnings } = UpdateBody::parse(&body, Some(key.project_id))?;
    command.api_key_id = Some(key.key_id);
    command.expected_version = expected_version;
    command.expected_state = expected_state;
    // Boxed, like everything that most requests do without: the runtime moves the handler's whole state several times.
    if dry_run {
        return Box::pin(dry_run::respond(app, key, UpdateBody { command, warnings })).await;
    }
    let broker = app.broker()?;
    let mut claim = Claim { update_id: clock::new_id(), replayed: false };
    if let Some(client_key) = client_key {
        let record =
            IdempotencyRecord::new(&body, expected_version, command.expected_state.as_deref(), claim.update_id);
        claim = Box::pin(app.idempotency.claim(&broker.js, key.project_id, &client_key, &record)).await?;
    }
    let Claim { update_id, replayed } = claim;
    command.update_id = Some(update_id);
    command.warnings.clone_from(&warnings);
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

/// What the query string adds to the body.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parameters {
    /// Whether to preview the outcome.
    dry_run: bool,
    /// The state that the lead must be in.
    expected_state: Option<String>,
}

impl Parameters {
    /// Unknown and empty parameters are refused: without a misspelt condition, more would be changed than was meant.
    fn parse(query: &str) -> Result<Self, ApiError> {
        let mut parameters = fields::from_query(query)?.refusing_empty();
        let parsed =
            Self { dry_run: parameters.query_flag("dryRun")?, expected_state: parameters.text("expectedState")? };
        parameters.refuse_rest()?;
        Ok(parsed)
    }
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{DryRunResponse, UpdateRequest};
    crate::openapi::Operation::new("Updates", "updateLead", "Update a lead")
        .description(
            "Merges metadata into a lead, renames it, moves it to another state. Asynchronous: 200 means that the update is \
             in the log and will be applied exactly once. Its outcome is sent to the callbacks of the lead's process, and \
             `GET /api/v1/updates/{updateId}` returns it. With `dryRun=true` nothing is logged or changed, and the response \
             is the outcome that the update would have now.",
        )
        .query("dryRun", "Return what the update would do, without doing it", serde_json::json!({"type": "boolean"}))
        .query(
            "expectedState",
            "Change the lead only if it is in this state",
            serde_json::json!({"type": "string", "minLength": 1, "maxLength": 1024}),
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
    use contract::JsonObject;

    use super::*;
    use crate::auth::tests::PROJECT;

    #[test]
    fn unknown_and_empty_parameters_are_refused() {
        let parsed = [
            "",
            "dryRun=true",
            "dryRun=false&expectedState=follow%20up",
            "dryRun=",
            "dryRun",
            "dryrun=true",
            "dryRun=yes",
            "expectedState=",
            "expectedVersion=4",
            "dryRun=true&dryRun=true",
        ]
        .map(|query| match Parameters::parse(query) {
            Ok(Parameters { dry_run, expected_state }) => format!("?{query}\n    {dry_run} {expected_state:?}"),
            Err(e) => format!("?{query}\n    {}: {e}", e.code()),
        });
        insta::assert_snapshot!(parsed.join("\n"), @r#"
        ?
            false None
        ?dryRun=true
            true None
        ?dryRun=false&expectedState=follow%20up
            false Some("follow up")
        ?dryRun=
            invalid_field: dryRun must not be empty; leave it out instead
        ?dryRun
            invalid_field: dryRun must not be empty; leave it out instead
        ?dryrun=true
            invalid_field: dryrun is unknown
        ?dryRun=yes
            invalid_field: dryRun must be true or false
        ?expectedState=
            invalid_field: expectedState must not be empty; leave it out instead
        ?expectedVersion=4
            invalid_field: expectedVersion is unknown
        ?dryRun=true&dryRun=true
            invalid_field: dryRun is given twice
        "#);
    }

    #[test]
    fn every_documented_field_is_parsed() {
        let text = |text: &str| Some(text.to_owned());
        let request = http_api::UpdateRequest {
            lead_id: Some("696102a4b8c1d2e3f4a5b6c7".parse().unwrap()),
            reference_id: text("R"),
            project_id: Some(PROJECT),
            process_id: Some("696102a4b8c1d2e3f4a5b6c7".parse().unwrap()),
            name: text("Ada"),
            target_state: text("lost"),
            disposition: text("price"),
            user_id: text("u-1"),
            metadata: Some(JsonObject::from_text(r#"{"n":1}"#.into()).unwrap()),
        };

        let parsed = UpdateBody::parse(&serde_json::to_vec(&request).unwrap(), Some(PROJECT)).unwrap();

        assert_eq!(parsed.warnings, [""; 0]);
        assert_eq!(parsed.command.metadata, request.metadata);
    }
}

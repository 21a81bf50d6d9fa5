//! 1 Accept: `POST /api/v1/leads/update`: a body becomes a command in the log.

use std::sync::Arc;

use axum::{extract::Request, response::Response};
use contract::{key::ApiKey, update_body::UpdateBody};

use crate::{
    accept::{self, Accepted, Preferences},
    app::App,
    command::Command,
    error::ApiError,
    request::{body, fields, if_match, page::Parameters as _, trace::RequestTrace},
    response::HandlerResult,
    routes::leads::dry_run,
};

/// Responds once the update is in the log.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, "/api/v1/leads/update", request.headers());
    let response = accept(&app, &key, request, &mut trace).await;
    trace.record(response.as_ref().map(Response::status));
    response
}

async fn accept(app: &App, key: &ApiKey, request: Request, trace: &mut RequestTrace) -> HandlerResult {
    let preferences = Preferences::of(request.headers())?;
    let expected_version = if_match::expected_version(request.headers())?;
    let Parameters { dry_run, expected_state } = Parameters::parse(request.uri().query().unwrap_or_default())?;
    let body = body::read(request, app.max_body_bytes).await?;
    let mut update = UpdateBody::parse(&body, Some(key.project_id))?;
    update.command.expected_version = expected_version;
    update.command.expected_state = expected_state;
    // Boxed, because most requests do without it: the runtime moves the handler's whole state several times.
    if dry_run {
        update.command.api_key_id = Some(key.key_id);
        return Box::pin(dry_run::respond(app, key, update)).await;
    }
    let (command, warnings) = Command::update(update);
    accept::accept(app, key, preferences, Accepted { body, command, warnings }, trace).await
}

/// The parameters of the query string.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parameters {
    /// Whether to preview the outcome.
    dry_run: bool,
    /// The state that the lead must be in.
    expected_state: Option<String>,
}

impl Parameters {
    /// Unknown and empty parameters are refused: ignoring a misspelt condition would change more than intended.
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
    use http_api::{DryRunResponse, UpdateAccepted, UpdateRequest};
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

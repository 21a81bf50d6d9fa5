//! 1 Accept: `POST /api/v1/leads/update`: a body becomes a command in the log.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode},
};
use contract::{
    JsonObject, ObjectId,
    command::UpdateCommand,
    headers,
    key::{ApiKey, Scope},
    trace::is_traceparent,
};
use serde::Serialize;
use service_kit::clock;

use crate::{
    body,
    error::ApiError,
    fields::{Address, Fields},
    routes::{Answer, json},
    server::App,
};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Accepted {
    success: bool,
    message: &'static str,
    update_id: ObjectId,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Answers once the update is in the log.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Answer {
    let key = app.authorize(request.headers(), Scope::LeadsWrite)?;
    let traceparent = traceparent(request.headers()).unwrap_or_else(clock::new_traceparent);
    let body = body::read(request, app.max_body_bytes).await?;
    let (mut command, warnings) = parse(&body, &key)?;
    let update_id = clock::new_id();
    command.update_id = Some(update_id);
    app.command_log.append(&app.broker()?.js, key.project_id, update_id, &command, &traceparent).await?;
    let accepted = Accepted { success: true, message: "Lead update initiated", update_id, warnings };
    Ok(json(StatusCode::OK, &accepted))
}

/// The trace that the client's request belongs to.
fn traceparent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(headers::TRACEPARENT)?.to_str().ok()?;
    is_traceparent(text).then(|| text.to_owned())
}

/// Makes the command that a body asks for, still without an id, and warnings of what is ignored.
fn parse(body: &[u8], key: &ApiKey) -> Result<(UpdateCommand, Vec<String>), ApiError> {
    let mut fields = Fields::from_json(body)?;
    let Address { lead_id, reference_id, process_id } = fields.address(key)?;
    let name = fields.text("name")?;
    let target_state = fields.text("targetState")?;
    let disposition = fields.text("disposition")?;
    let user_id = fields.text("userId")?;
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
    };
    Ok((command, fields.warnings))
}

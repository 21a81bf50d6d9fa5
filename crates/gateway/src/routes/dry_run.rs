//! 1 Accept: `dryRun`: what an update would come to, decided by lead-state on the lead as it stands. Nothing is logged.

use axum::http::StatusCode;
use contract::{
    JsonObject, ObjectId,
    event::CompletionEvent,
    key::ApiKey,
    rpc::{self, DryRunUpdate},
};
use serde::Serialize;

use crate::{
    routes::{Answer, json, update_lead::Asked},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "DryRun"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct Tried<'a> {
    success: bool,
    message: &'static str,
    dry_run: bool,
    outcome: Outcome<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// What would be; without an `updateId`, for there is no update.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "DryRunOutcome"))]
#[serde(rename_all = "camelCase")]
struct Outcome<'a> {
    success: bool,
    error: Option<&'a str>,
    error_code: Option<&'a str>,
    lead_id: Option<ObjectId>,
    reference_id: Option<&'a str>,
    from_state: Option<&'a str>,
    to_state: Option<&'a str>,
    version: Option<i64>,
    data: Option<&'a JsonObject>,
}

/// Answers with what would be.
pub(crate) async fn answer(app: &App, key: &ApiKey, asked: Asked) -> Answer {
    let Asked { command, warnings, .. } = asked;
    let wanted = DryRunUpdate { project_id: key.project_id, command };
    let event = service_kit::rpc::query(&app.broker()?.client, rpc::UPDATE_DRY_RUN, &wanted).await?;
    Ok(json(StatusCode::OK, &view(&event, warnings)))
}

fn view(event: &CompletionEvent, mut warnings: Vec<String>) -> Tried<'_> {
    warnings.extend(event.warnings.iter().cloned());
    let outcome = Outcome {
        success: event.success,
        error: event.error.as_deref(),
        error_code: event.error_code.as_deref(),
        lead_id: event.lead_id,
        reference_id: event.reference_id.as_deref(),
        from_state: event.from_state.as_deref(),
        to_state: event.to_state.as_deref(),
        version: event.version,
        data: event.data.as_ref(),
    };
    Tried { success: true, message: "Dry run: nothing was changed", dry_run: true, outcome, warnings }
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    #[test]
    fn what_would_be() {
        let event = CompletionEvent {
            update_id: ObjectId::from_bytes([1; 12]),
            project_id: ObjectId::from_bytes([2; 12]),
            process_id: Some(ObjectId::from_bytes([3; 12])),
            lead_id: Some(ObjectId::from_bytes([4; 12])),
            reference_id: None,
            success: true,
            error: None,
            error_code: None,
            from_state: Some("new".into()),
            to_state: Some("lost".into()),
            version: Some(2),
            user_id: None,
            warnings: vec!["two".into()],
            timestamp: Timestamp::from_millis(1_768_193_759_048),
            data: Some(JsonObject::from_text(r#"{"n":1.50}"#.into()).unwrap()),
        };
        let told = view(&event, vec!["one".into()]);
        insta::assert_snapshot!(serde_json::to_string(&told).unwrap(), @r#"{"success":true,"message":"Dry run: nothing was changed","dryRun":true,"outcome":{"success":true,"error":null,"errorCode":null,"leadId":"040404040404040404040404","referenceId":null,"fromState":"new","toState":"lost","version":2,"data":{"n":1.50}},"warnings":["one","two"]}"#);
        assert!(!serde_json::to_string(&told).unwrap().contains(&event.update_id.to_string()));
    }
}

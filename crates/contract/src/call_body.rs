//! The body of a call event, parsed in one place for every way in: `POST /api/v1/calls/started` and `/calls/ended`, a line of
//! their bulk requests, a producer's message on `leads.cmd.{projectId}.call.started` and `.call.ended`.
//!
//! Unknown fields and empty texts are refused: a misspelt `callId` would start or end other calls than was meant.

use crate::{
    ObjectId,
    command::{CallEnded, CallStarted},
    fields::{Address, BodyError, Fields},
};

/// Parses the start of a call with a lead of this project.
///
/// # Errors
/// The body is not the start of such a call.
pub fn parse_started(body: &[u8], project_id: ObjectId) -> Result<CallStarted, BodyError> {
    let mut fields = Fields::from_json(body)?.refusing_empty();
    let Address { lead_id, reference_id, process_id } = fields.address_in(project_id)?;
    let started = CallStarted {
        lead_id,
        reference_id,
        process_id,
        call_id: fields.text("callId")?,
        timeout_seconds: fields.whole_number("timeoutSeconds")?,
        ..CallStarted::default()
    };
    fields.refuse_rest()?;
    Ok(started)
}

/// Parses the end of a call with a lead of this project.
///
/// # Errors
/// The body is not the end of such a call.
pub fn parse_ended(body: &[u8], project_id: ObjectId) -> Result<CallEnded, BodyError> {
    let mut fields = Fields::from_json(body)?.refusing_empty();
    let Address { lead_id, reference_id, process_id } = fields.address_in(project_id)?;
    let call_id = fields.text("callId")?;
    fields.refuse_rest()?;
    Ok(CallEnded { lead_id, reference_id, process_id, call_id, ..CallEnded::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";
    const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);

    #[test]
    fn a_call_event_is_parsed_strictly() {
        let parsed = [
            r#"{"leadId":"LEAD"}"#,
            r#"{"leadId":"LEAD","callId":"c-1","timeoutSeconds":60}"#,
            r#"{"referenceId":"R","processId":"LEAD","callId":null}"#,
            r#"{"referenceId":"R","projectId":"OURS","processId":"LEAD"}"#,
            r#"{}"#,
            r#"{"lead_id":"LEAD"}"#,
            r#"{"referenceId":"R","projectId":"OURS"}"#,
            r#"{"leadId":"LEAD","projectId":"LEAD"}"#,
            r#"{"leadId":"LEAD","callId":""}"#,
            r#"{"leadId":"LEAD","callId":7}"#,
            r#"{"leadId":"LEAD","call_id":"c-1"}"#,
            r#"{"leadId":"LEAD","timeoutSeconds":-1}"#,
            r#"{"leadId":"LEAD","updateId":"LEAD"}"#,
            "[]",
        ]
        .map(|input| {
            let body = input.replace("LEAD", LEAD).replace("OURS", &PROJECT.to_string());
            let text = |parsed: Result<String, BodyError>| match parsed {
                Ok(text) => text.replace(LEAD, "LEAD"),
                Err(e) => format!("{}: {e}", e.code()),
            };
            let started =
                text(parse_started(body.as_bytes(), PROJECT).map(|call| serde_json::to_string(&call).unwrap()));
            let ended = text(parse_ended(body.as_bytes(), PROJECT).map(|call| serde_json::to_string(&call).unwrap()));
            format!("{input}\n    {started}\n    {ended}")
        });
        insta::assert_snapshot!(parsed.join("\n"));
    }
}

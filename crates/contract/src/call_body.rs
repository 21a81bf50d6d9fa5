//! Parses the body of a call event, for every way in: `POST /api/v1/calls/started` and `/calls/ended`, a line of their
//! bulk requests, a producer's message on `leads.cmd.{projectId}.call.started` and `.call.ended`.
//!
//! Unknown fields and empty texts are refused: with a misspelled `callId`, the event would start or end the wrong
//! calls.

use crate::{
    JsonObject, ObjectId,
    call_result::{CallDirection, CallResult, MAX_RESULT_BYTES},
    command::{CallEnded, CallStarted, MAX_TEXT_CHARS},
    fields::{Address, BodyError, Fields},
    json::{self, MAX_DEPTH},
    process::MAX_URL_BYTES,
};

/// Parses the start of a call with a lead of this project.
///
/// # Errors
/// The body is invalid, or names another project.
pub fn parse_started(body: &[u8], project_id: ObjectId) -> Result<CallStarted, BodyError> {
    let mut fields = Fields::from_json(body)?.refusing_empty();
    let Address { lead_id, reference_id, process_id } = fields.address_in(project_id)?;
    let started = CallStarted {
        lead_id,
        reference_id,
        process_id,
        call_id: fields.text("callId")?,
        timeout_seconds: timeout_seconds(&mut fields)?,
        ..CallStarted::default()
    };
    fields.refuse_rest()?;
    Ok(started)
}

/// Parses the end of a call with a lead of this project.
///
/// # Errors
/// The body is invalid, or names another project.
pub fn parse_ended(body: &[u8], project_id: ObjectId) -> Result<CallEnded, BodyError> {
    let mut fields = Fields::from_json(body)?.refusing_empty();
    let Address { lead_id, reference_id, process_id } = fields.address_in(project_id)?;
    let call_id = fields.text("callId")?;
    let to_state = fields.text("toState")?;
    let result = fields.object("result")?.as_ref().map(CallResult::parse).transpose()?;
    fields.refuse_rest()?;
    Ok(CallEnded { lead_id, reference_id, process_id, call_id, to_state, result, ..CallEnded::default() })
}

fn timeout_seconds(fields: &mut Fields<'_>) -> Result<Option<u32>, BodyError> {
    match fields.whole_number("timeoutSeconds")? {
        Some(0) => Err(BodyError::field("timeoutSeconds", "must be at least 1: the call would end at once")),
        seconds => Ok(seconds),
    }
}

fn direction(fields: &mut Fields<'_>) -> Result<Option<CallDirection>, BodyError> {
    let Some(raw) = fields.take("direction") else { return Ok(None) };
    let direction = serde_json::from_str(raw.get()).map(Some);
    direction.map_err(|_| BodyError::field("result.direction", "must be incoming or outgoing"))
}

impl CallResult {
    /// Parses the result in a body.
    ///
    /// # Errors
    /// A field is unknown or invalid, or the result is too large or too deep.
    pub fn parse(result: &JsonObject) -> Result<Self, BodyError> {
        let bytes = result.get().len();
        if bytes > MAX_RESULT_BYTES {
            let fault = format!("has {bytes} bytes, and at most {MAX_RESULT_BYTES} are allowed");
            return Err(BodyError::field("result", fault));
        }
        // The webhook nests the result two levels deeper, in `activity.result`, and has the same depth limit.
        if json::check(format!("[[{}]]", result.get()).as_bytes()).is_err() {
            return Err(BodyError::field("result", format!("is nested deeper than {} levels", MAX_DEPTH - 2)));
        }
        let mut fields = Fields::from_object("result.", result).refusing_empty();
        let parsed = Self {
            status: fields.text("status")?,
            connected: fields.optional_flag("connected")?,
            direction: direction(&mut fields)?,
            disposition: fields.text("disposition")?,
            summary: fields.long_text("summary", MAX_RESULT_BYTES)?,
            analysis: fields.object("analysis")?,
            recording_url: fields.long_text("recordingUrl", MAX_URL_BYTES)?,
            transcript_url: fields.long_text("transcriptUrl", MAX_URL_BYTES)?,
            duration_seconds: fields.whole_number("durationSeconds")?,
            metadata: fields.object("metadata")?,
        };
        fields.refuse_rest()?;
        Ok(parsed)
    }

    /// Why a result in the log cannot be applied. [`Self::parse`] refuses such results before they are logged.
    pub fn fault(&self) -> Option<String> {
        let texts = [("status", &self.status), ("disposition", &self.disposition)];
        for (field, text) in texts {
            if text.as_ref().is_some_and(|text| text.chars().nth(MAX_TEXT_CHARS).is_some()) {
                return Some(format!("result.{field} is longer than {MAX_TEXT_CHARS} characters"));
            }
        }
        let bytes = serde_json::to_string(self).map_or(0, |text| text.len());
        (bytes > MAX_RESULT_BYTES).then(|| format!("result has more than {MAX_RESULT_BYTES} bytes"))
    }
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
            r#"{"leadId":"LEAD","timeoutSeconds":0}"#,
            r#"{"leadId":"LEAD","updateId":"LEAD"}"#,
            r#"{"leadId":"LEAD","toState":"lost","result":{"status":"busy","connected":false,"metadata":{"n":1.50}}}"#,
            r#"{"leadId":"LEAD","result":{"direction":"incoming"}}"#,
            r#"{"leadId":"LEAD","result":{"direction":"inbound"}}"#,
            r#"{"leadId":"LEAD","result":{"state":"busy"}}"#,
            r#"{"leadId":"LEAD","result":"busy"}"#,
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

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    #[test]
    fn a_result_keeps_the_digits_of_its_values() {
        let text = r#"{"analysis":{"n":100000000000000000000000000001.50},"metadata":{"z":1,"a":[1.0]}}"#;

        let result = CallResult::parse(&object(text)).unwrap();

        assert_eq!(serde_json::to_string(&result).unwrap(), text);
    }

    #[test]
    fn a_result_that_is_not_acceptable_is_refused() {
        let long = |chars| "x".repeat(chars);
        let deep = format!(r#"{{"metadata":{{"a":{}{}}}}}"#, "[".repeat(60), "]".repeat(60));
        let refused = [
            (r#"{"result":"ok"}"#.to_owned(), "result.result is unknown"),
            (r#"{"status":7}"#.to_owned(), "result.status must be a string"),
            (r#"{"status":""}"#.to_owned(), "result.status must not be empty; leave it out instead"),
            (r#"{"connected":"yes"}"#.to_owned(), "result.connected must be true or false"),
            (
                r#"{"durationSeconds":1.5}"#.to_owned(),
                "result.durationSeconds must be a whole number, at most 4294967295",
            ),
            (r#"{"analysis":[]}"#.to_owned(), "result.analysis must be a JSON object"),
            (format!(r#"{{"disposition":"{}"}}"#, long(1025)), "result.disposition must have at most 1024 characters"),
            (format!(r#"{{"recordingUrl":"{}"}}"#, long(2049)), "result.recordingUrl must have at most 2048 bytes"),
            (
                format!(r#"{{"summary":"{}"}}"#, long(MAX_RESULT_BYTES)),
                "result has 245774 bytes, and at most 245760 are allowed",
            ),
        ];
        for (text, error) in refused {
            assert_eq!(CallResult::parse(&object(&text)).unwrap_err().to_string(), error);
        }
        // The webhook nests the result one level deeper than the request body.
        assert!(CallResult::parse(&object(&deep)).is_ok());
        let deeper = deep.replacen('[', "[[", 1).replacen(']', "]]", 1);
        let error = CallResult::parse(&object(&deeper)).unwrap_err().to_string();
        assert_eq!(error, "result is nested deeper than 62 levels");
        let largest = format!(r#"{{"summary":"{}"}}"#, long(MAX_RESULT_BYTES - 14));
        assert!(CallResult::parse(&object(&largest)).unwrap().fault().is_none());
    }
}

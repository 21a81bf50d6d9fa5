//! Bland: the post-call webhook (<https://docs.bland.ai/tutorials/post-call-webhooks>), whose fields are those of the
//! call (<https://docs.bland.ai/api-v1/get/calls-id>). Bland does not report the start of a call.

use contract::fields::BodyError;

use super::{
    object::{Object, whole_seconds},
    report::{Call, CallDraft, Event, direction},
};

/// Statuses of calls that were not answered.
const NOT_CONNECTED: [&str; 4] = ["busy", "canceled", "failed", "no-answer"];

pub(super) fn read(mut body: Object<'_>) -> Result<Event<'_>, BodyError> {
    let status = body.text("status").unwrap_or_default();
    let is_over = body.flag("completed") == Some(true) || status == "completed" || NOT_CONNECTED.contains(&&*status);
    if !is_over {
        // Events during a call, if the account has enabled them, have a category.
        let name = [body.text("category"), body.text("event"), Some(status)].into_iter().flatten();
        return Ok(Event::Other(name.into_iter().find(|name| !name.is_empty()).unwrap_or_else(|| "unnamed".into())));
    }
    let id = body.text("call_id").ok_or(BodyError::MissingField("call_id is required"))?;
    let inside = |name: &str| body.object(name)?.object("metadata");
    let metadata = body.object("metadata").or_else(|| inside("variables")).or_else(|| inside("request_data"));
    let call = Call { id, metadata };
    let connected = connected(&body, &status);
    body.remove("call_id");
    let result = CallDraft {
        status: body.take_short_text("status").or_else(|| body.take_short_text("queue_status")),
        connected,
        direction: body.flag("inbound").map(direction),
        disposition: body.take_short_text("disposition_tag"),
        summary: body.take_text("summary"),
        analysis: body.take_object("analysis").unwrap_or_default(),
        recording_url: body.take_url("recording_url"),
        duration_seconds: duration(&mut body),
        ..CallDraft::default()
    };
    Ok(Event::Completed(call, CallDraft { metadata: body, ..result }))
}

fn connected(body: &Object<'_>, status: &str) -> Option<bool> {
    match body.text("answered_by").as_deref() {
        Some("human") => Some(true),
        Some("voicemail" | "no-answer") => Some(false),
        _ => NOT_CONNECTED.contains(&status).then_some(false),
    }
}

/// `corrected_duration` is in seconds, `call_length` in minutes.
fn duration(body: &mut Object<'_>) -> Option<u32> {
    if let Some(seconds) = body.number("corrected_duration") {
        body.remove("corrected_duration");
        return whole_seconds(seconds);
    }
    let minutes = body.number("call_length")?;
    body.remove("call_length");
    whole_seconds(minutes * 60.0)
}

//! Vapi: `status-update` and `end-of-call-report` (<https://docs.vapi.ai/server-url/events>).

use contract::fields::BodyError;

use super::{
    object::{Object, whole_seconds},
    report::{Call, CallDraft, Event, direction},
};

/// End reasons of calls that no person answered, besides those that end with `failed-to-connect-call` or begin with
/// `call.start.error`.
const NOT_CONNECTED: [&str; 4] =
    ["customer-busy", "customer-did-not-answer", "customer-did-not-give-microphone-permission", "voicemail"];

pub(super) fn read(body: Object<'_>) -> Result<Event<'_>, BodyError> {
    let mut message = body.object("message").ok_or(BodyError::MissingField("message is required"))?;
    let kind = message.text("type").ok_or(BodyError::MissingField("message.type is required"))?;
    match (kind.as_str(), message.text("status").as_deref()) {
        ("status-update", Some("in-progress")) => Ok(Event::Started(call(&message)?)),
        ("status-update", Some("ended")) => Ok(Event::Ended(call(&message)?)),
        ("status-update", Some(status)) => Ok(Event::Other(format!("{kind}: {status}"))),
        ("end-of-call-report", _) => {
            let call = call(&message)?;
            let result = result(&mut message);
            Ok(Event::Completed(call, CallDraft { metadata: message, ..result }))
        }
        _ => Ok(Event::Other(kind)),
    }
}

fn call<'a>(message: &Object<'a>) -> Result<Call<'a>, BodyError> {
    let call = message.object("call").unwrap_or_default();
    let id = call.text("id").ok_or(BodyError::MissingField("message.call.id is required"))?;
    let overridden = || call.object("assistantOverrides")?.object("metadata");
    Ok(Call { id, metadata: call.object("metadata").or_else(overridden) })
}

/// Takes the result out of an end-of-call report.
fn result<'a>(message: &mut Object<'a>) -> CallDraft<'a> {
    message.remove("type");
    let mut analysis = message.take_object("analysis").unwrap_or_default();
    let disposition = analysis.object("structuredData").and_then(|mut data| data.take_short_text("disposition"));
    let recording_url = message.take_url("recordingUrl");
    let of_artifact = || message.object("artifact")?.take_url("recordingUrl");
    let recording_url = recording_url.or_else(of_artifact);
    let connected = connected(message);
    CallDraft {
        status: message.take_short_text("endedReason"),
        connected,
        direction: message
            .object("call")
            .and_then(|call| call.text("type"))
            .map(|kind| direction(kind == "inboundPhoneCall")),
        disposition,
        summary: analysis.take_text("summary"),
        analysis,
        recording_url,
        duration_seconds: duration(message),
        ..CallDraft::default()
    }
}

fn connected(message: &Object<'_>) -> Option<bool> {
    let reason = message.text("endedReason")?;
    let is_unanswered = NOT_CONNECTED.contains(&reason.as_str())
        || reason.starts_with("call.start.error")
        || reason.ends_with("failed-to-connect-call");
    if is_unanswered { Some(false) } else { message.text("startedAt").map(|_| true) }
}

fn duration(message: &mut Object<'_>) -> Option<u32> {
    if let Some(seconds) = message.number("durationSeconds") {
        message.remove("durationSeconds");
        return whole_seconds(seconds);
    }
    whole_seconds(message.number("durationMs")? / 1000.0)
}

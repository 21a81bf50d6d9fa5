//! Retell: `call_started`, `call_ended` and `call_analyzed` (<https://docs.retellai.com/features/webhook-overview>).
//!
//! The result comes with `call_analyzed`, which has everything that `call_ended` has and the analysis. A call that was
//! not connected has no analysis: its result comes with `call_ended`. If both webhooks arrive, they count as one step
//! of the call.

use contract::fields::BodyError;

use super::{
    object::{Object, whole_seconds},
    report::{Call, CallDraft, Event, direction},
};

/// Disconnection reasons of calls that no person answered, besides those that begin with `dial_`.
const NOT_CONNECTED: [&str; 6] = [
    "invalid_destination",
    "machine_detected",
    "telephony_provider_permission_denied",
    "telephony_provider_unavailable",
    "user_declined",
    "voicemail_reached",
];

pub(super) fn read(body: Object<'_>) -> Result<Event<'_>, BodyError> {
    let event = body.text("event").ok_or(BodyError::MissingField("event is required"))?;
    if !["call_started", "call_ended", "call_analyzed"].contains(&event.as_str()) {
        return Ok(Event::Other(event));
    }
    let mut report = body.object("call").ok_or(BodyError::MissingField("call is required"))?;
    let id = report.text("call_id").ok_or(BodyError::MissingField("call.call_id is required"))?;
    let call = Call { id, metadata: report.object("metadata") };
    match event.as_str() {
        "call_started" => Ok(Event::Started(call)),
        "call_ended" if was_dialed_in_vain(&report) => {
            let result = result(&mut report);
            Ok(Event::Completed(call, CallDraft { metadata: report, ..result }))
        }
        "call_ended" => Ok(Event::Ended(call)),
        _ => {
            let result = result(&mut report);
            Ok(Event::Completed(call, CallDraft { metadata: report, ..result }))
        }
    }
}

/// Whether the call was never connected. Retell does not analyze such calls.
fn was_dialed_in_vain(call: &Object<'_>) -> bool {
    call.text("call_status").as_deref() == Some("not_connected")
        || call.text("disconnection_reason").is_some_and(|reason| reason.starts_with("dial_"))
}

/// Takes the result out of a call.
fn result<'a>(call: &mut Object<'a>) -> CallDraft<'a> {
    call.remove("call_id");
    let connected = connected(call);
    let mut analysis = call.take_object("call_analysis").unwrap_or_default();
    let custom = analysis.object("custom_analysis_data");
    let reason = call.take_short_text("disconnection_reason");
    CallDraft {
        status: reason.or_else(|| call.take_short_text("call_status")),
        connected,
        direction: call.text("direction").map(|name| direction(name == "inbound")),
        disposition: custom.and_then(|mut custom| custom.take_short_text("disposition")),
        summary: analysis.take_text("call_summary"),
        analysis,
        recording_url: call.take_url("recording_url"),
        duration_seconds: duration(call),
        ..CallDraft::default()
    }
}

fn connected(call: &Object<'_>) -> Option<bool> {
    let reason = call.text("disconnection_reason").unwrap_or_default();
    let in_voicemail = call.object("call_analysis").and_then(|analysis| analysis.flag("in_voicemail"));
    if was_dialed_in_vain(call) || NOT_CONNECTED.contains(&reason.as_str()) || in_voicemail == Some(true) {
        return Some(false);
    }
    call.number("start_timestamp").map(|_| true)
}

fn duration(call: &mut Object<'_>) -> Option<u32> {
    let between = || Some(call.number("end_timestamp")? - call.number("start_timestamp")?);
    let seconds = whole_seconds(call.number("duration_ms").or_else(between)? / 1000.0);
    call.remove("duration_ms");
    seconds
}

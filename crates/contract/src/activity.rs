//! Activities: the results of calls, as webhooks report them.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::{JsonObject, ObjectId, Timestamp, call_result::CallResult, event::CompletionEvent, json::Members};

/// The body of a webhook about an activity: the vendor's keys in the vendor's order. Unknown values are null.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ActivityPayload<'a> {
    /// Always `update`.
    #[cfg_attr(feature = "schema", schemars(extend("const" = "update")))]
    pub action_type: &'static str,
    /// The activity: the `updateId` of the event that ended the call.
    #[serde(rename = "activityId")]
    pub activity_id: ObjectId,
    /// The lead's last activity: this one.
    #[serde(rename = "lastActivityId")]
    pub last_activity_id: ObjectId,
    /// The lead.
    #[serde(rename = "leadId")]
    pub lead_id: Option<ObjectId>,
    /// The lead's process.
    #[serde(rename = "processId")]
    pub process_id: Option<ObjectId>,
    /// The lead's external id.
    #[serde(rename = "referenceId")]
    pub reference_id: Option<&'a str>,
    /// When the activity was recorded, in milliseconds.
    pub timestamp: Timestamp,
    /// The activity.
    pub activity: ActivityData<'a>,
}

/// `activity` of an [`ActivityPayload`].
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ActivityData<'a> {
    /// Always `call`.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(extend("const" = "call")))]
    pub kind: &'static str,
    /// How the call ended.
    pub status: Option<&'a str>,
    /// The lead's state before.
    pub from_state: Option<&'a str>,
    /// The lead's state after.
    pub to_state: Option<&'a str>,
    /// Always null.
    pub scheduled_at: (),
    /// The call's result.
    pub result: ActivityResult<'a>,
}

/// `activity.result` of an [`ActivityPayload`].
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ActivityResult<'a> {
    /// Whether the call was answered.
    pub success: Option<bool>,
    /// Always `call`.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(extend("const" = "call")))]
    pub kind: &'static str,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The project.
    pub project_id: ObjectId,
    /// The activity.
    pub activity_id: ObjectId,
    /// The lead's external id.
    pub reference_id: Option<&'a str>,
    /// Always null.
    pub flow_id: (),
    /// Always null.
    pub channel_id: (),
    /// Always null.
    pub has_transfer: (),
    /// Always null.
    pub telephony_type: (),
    /// Always null.
    pub input: (),
    /// Always null.
    pub call_request: (),
    /// The `callId` of the call's events.
    pub provider_call_id: Option<&'a str>,
    /// `metadata` of the result.
    pub call_metadata: Option<&'a JsonObject>,
    /// How the call ended.
    pub status: Option<&'a str>,
    /// The findings: `success`, `disposition`, `dispositionType`, `summary`, `recordingUrl`, `transcriptUrl` and
    /// `durationSeconds`, from the result or from its `analysis`, and the other members of its `analysis`.
    #[cfg_attr(feature = "schema", schemars(with = "std::collections::BTreeMap<String, serde_json::Value>"))]
    pub analysis: Members<'a>,
}

impl<'a> ActivityPayload<'a> {
    /// The body for an event; none if the event has no call result.
    pub fn of(event: &'a CompletionEvent) -> Option<Self> {
        let result = event.activity.as_ref()?;
        let (activity_id, lead_id, reference_id) = (event.update_id, event.lead_id, event.reference_id.as_deref());
        let status = result.status.as_deref();
        Some(Self {
            action_type: "update",
            activity_id,
            last_activity_id: activity_id,
            lead_id,
            process_id: event.process_id,
            reference_id,
            timestamp: event.timestamp,
            activity: ActivityData {
                kind: "call",
                status,
                from_state: event.from_state.as_deref(),
                to_state: event.to_state.as_deref(),
                scheduled_at: (),
                result: ActivityResult {
                    success: result.connected,
                    kind: "call",
                    lead_id,
                    project_id: event.project_id,
                    activity_id,
                    reference_id,
                    flow_id: (),
                    channel_id: (),
                    has_transfer: (),
                    telephony_type: (),
                    input: (),
                    call_request: (),
                    provider_call_id: event.call_id.as_deref(),
                    call_metadata: result.metadata.as_ref(),
                    status,
                    analysis: analysis(result),
                },
            },
        })
    }
}

/// The vendor's members first, then the others. A field of the result takes precedence over the same member of its
/// analysis.
fn analysis(result: &CallResult) -> Members<'_> {
    let mut rest = result.analysis.as_ref().map(JsonObject::members).unwrap_or_default();
    let own = [
        ("success", None),
        ("disposition", raw(&result.disposition)),
        ("dispositionType", None),
        ("summary", raw(&result.summary)),
        ("recordingUrl", raw(&result.recording_url)),
        ("transcriptUrl", raw(&result.transcript_url)),
        ("durationSeconds", raw(&result.duration_seconds)),
    ];
    let mut members = Members::default();
    for (name, own) in own {
        let analyzed = rest.shift_remove(name);
        let value = own.or(analyzed).unwrap_or(Cow::Borrowed(RawValue::NULL));
        members.insert(name.into(), value);
    }
    members.extend(rest);
    members
}

fn raw<'a>(value: &Option<impl Serialize>) -> Option<Cow<'a, RawValue>> {
    to_raw_value(value.as_ref()?).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{OutcomeKind, tests::event};

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    fn body(result: &str, to_state: &str) -> String {
        let activity = CallResult::parse(&object(result)).unwrap();
        let event = CompletionEvent {
            kind: OutcomeKind::CallEnded,
            to_state: Some(to_state.into()),
            call_id: Some("call-7".into()),
            activity: Some(activity),
            data: None,
            ..event()
        };
        serde_json::to_string_pretty(&ActivityPayload::of(&event).unwrap()).unwrap()
    }

    #[test]
    fn the_activity_of_a_connected_call_has_the_vendors_keys_in_the_vendors_order() {
        let result = r#"{"status":"completed","connected":true,"disposition":"wants a test drive","summary":"Likes the Camry.",
            "analysis":{"score":0.90,"success":true,"dispositionType":"positive"},"recordingUrl":"https://calls.example/7.mp3",
            "transcriptUrl":"https://calls.example/7.txt","durationSeconds":94,"metadata":{"agent":"a-1"}}"#;

        insta::assert_snapshot!(body(result, "interested"));
    }

    #[test]
    fn the_activity_of_a_call_that_was_not_connected_has_the_same_keys() {
        insta::assert_snapshot!(body(r#"{"status":"no-answer","connected":false}"#, "new"));
    }
}

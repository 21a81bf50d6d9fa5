//! Calls with leads.

use std::borrow::Cow;

use contract::{
    ObjectId,
    call_result::CallResult,
    command::CallEnded,
    event::OutcomeKind,
    rpc::{self, UpdateStatus},
};
use serde::{Deserialize, Serialize};

use crate::{convert::response_from, examples::example, time::DateTime};

/// The body of `POST /api/v1/calls/started`. Unknown fields and empty texts are refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(extend("anyOf" = [{"required": ["leadId"]}, {"required": ["referenceId", "processId"]}]))
)]
#[serde(rename_all = "camelCase", default)]
pub struct CallStartedRequest {
    /// The lead; required without `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; requires `processId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// The process of `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The API key's project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// The call, if a lead can have several calls at once. A second start of a call renews its expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub call_id: Option<String>,
    /// The number of seconds after which a call counts as ended if no end is reported; by default the process's
    /// `callTimeoutSeconds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
}

/// The body of `POST /api/v1/calls/ended`. Unknown fields and empty texts are refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(extend("anyOf" = [{"required": ["leadId"]}, {"required": ["referenceId", "processId"]}]))
)]
#[serde(rename_all = "camelCase", default)]
pub struct CallEndedRequest {
    /// The lead; required without `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; requires `processId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// The process of `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The API key's project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// The call that ended; without it, every call of the lead.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub call_id: Option<String>,
    /// The state to move the lead to, by the rules of an update. If these rules reject the state, the call still ends,
    /// and the event has a warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub to_state: Option<String>,
    /// The result of the call, at most 240 KiB. It becomes an activity of the lead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<CallResult>,
}

/// The response to a webhook of a voice platform that reports neither the start nor the end of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EventIgnored {
    /// Always true.
    pub success: bool,
    /// For people.
    pub message: Cow<'static, str>,
    /// The platform's name of the event.
    pub event: String,
}

impl EventIgnored {
    /// The response to this event.
    pub fn new(event: String) -> Self {
        Self { success: true, message: "Event ignored".into(), event }
    }
}

/// `data` of `GET /api/v1/activities/{activityId}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallActivity {
    /// The id of the activity: the `updateId` of the call's end.
    pub activity_id: ObjectId,
    /// Always `call`.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(extend("const" = "call")))]
    pub kind: Cow<'static, str>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's process.
    pub process_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// The call; null if its end had no `callId`.
    pub call_id: Option<String>,
    /// The lead's state before.
    pub from_state: Option<String>,
    /// The lead's state after.
    pub to_state: Option<String>,
    /// The lead's version after; null if its state was not decided.
    pub version: Option<i64>,
    /// The reported result of the call.
    pub result: CallResult,
    /// Warnings about ignored fields.
    pub warnings: Vec<String>,
    /// When it was recorded.
    pub timestamp: Option<DateTime>,
}

impl CallActivity {
    /// The activity of a call that ended. None for other updates, for a failed end, and for an end without a result.
    pub fn of(update: rpc::Update) -> Option<Self> {
        let is_ended = update.kind == OutcomeKind::CallEnded && update.status == UpdateStatus::Succeeded;
        let ended: CallEnded = serde_json::from_str(update.command.filter(|_| is_ended)?.get()).ok()?;
        Some(Self {
            activity_id: update.update_id,
            kind: "call".into(),
            lead_id: update.lead_id,
            process_id: update.process_id,
            reference_id: update.reference_id,
            call_id: ended.call_id,
            from_state: update.from_state,
            to_state: update.to_state,
            version: update.version,
            result: ended.result?,
            warnings: update.warnings,
            timestamp: update.applied_at.map(DateTime),
        })
    }
}

/// A call in progress: an item of `GET /api/v1/calls`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Call {
    /// The lead.
    pub lead_id: ObjectId,
    /// The lead's process.
    pub process_id: ObjectId,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// The call; null if its start had no `callId`.
    pub call_id: Option<String>,
    /// When its start was accepted.
    pub started_at: DateTime,
    /// When the call counts as ended if no end is reported.
    pub expires_at: DateTime,
}

response_from!(call: rpc::Call => Call { lead_id, process_id, reference_id, call_id, started_at, expires_at });

example!(
    call_started_request: CallStartedRequest,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","callId":"call-7","timeoutSeconds":1800}"#
);
example!(
    call_ended_request: CallEndedRequest,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","callId":"call-7","toState":"interested","result":{"status":"completed","connected":true,"disposition":"wants a test drive","summary":"Likes the Camry.","analysis":{"score":0.9},"recordingUrl":"https://calls.example/7.mp3","transcriptUrl":"https://calls.example/7.txt","durationSeconds":94,"metadata":{"agent":"a-1"}}}"#
);
example!(
    event_ignored: EventIgnored,
    r#"{"success":true,"message":"Event ignored","event":"status-update: ringing"}"#
);
example!(
    call_activity: CallActivity,
    r#"{"activityId":"6b042697fb36c4d70216a36b","type":"call","leadId":"696102a4b8c1d2e3f4a5b6c7","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","callId":"call-7","fromState":"new","toState":"interested","version":2,"result":{"status":"completed","connected":true,"durationSeconds":94},"warnings":[],"timestamp":"2026-01-12T09:31:34.000Z"}"#
);
example!(
    call: Call,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","callId":"call-7","startedAt":"2026-01-12T09:30:00.000Z","expiresAt":"2026-01-12T10:00:00.000Z"}"#
);

//! Completion events, their webhook payload, and events about deliveries.

use serde::{Deserialize, Serialize};

use crate::{
    JsonObject, ObjectId, Timestamp, call_result::CallResult, command::LeadContact, event_kind::DeliveryKind,
    named::named,
};

named! {
    /// The kind of an outcome. Its name is part of subjects, of the ledger and of responses.
    #[derive(Default)]
    OutcomeKind, InvalidOutcomeKind,
    /// An update of a lead.
    #[default]
    Update = "update",
    /// The start of a call with a lead.
    CallStarted = "call.started",
    /// The end of a call with a lead.
    CallEnded = "call.ended",
    /// The erasure of a lead.
    Erase = "erase",
    /// The creation of a lead.
    LeadCreated = "lead.created",
}

impl OutcomeKind {
    /// Whether this is the kind of an update. Events omit this kind, as events of earlier versions do.
    pub fn is_update(&self) -> bool {
        *self == Self::Update
    }
}

/// The replacement for a text that was erased with its lead.
pub const ERASED: &str = "erased with the lead";

/// The outcome of an update, a call event, a creation or an erasure: one event per ledger row, with `update_id` and
/// project as message id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CompletionEvent {
    /// The kind of the outcome; `update` if absent.
    #[serde(default, skip_serializing_if = "OutcomeKind::is_update")]
    pub kind: OutcomeKind,
    /// The id of the update, call event, creation or erasure.
    pub update_id: ObjectId,
    /// The project.
    pub project_id: ObjectId,
    /// The lead's process; null when the lead is unknown.
    pub process_id: Option<ObjectId>,
    /// The lead; if the lead is unknown, the command's `leadId`.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; if the lead is unknown, the command's `referenceId`.
    pub reference_id: Option<String>,
    /// Whether the command was applied.
    pub success: bool,
    /// Why it failed, for people.
    pub error: Option<String>,
    /// Why it failed, for programs: a stable snake_case code.
    pub error_code: Option<String>,
    /// The lead's state before; null for an unknown lead, a creation, an erasure, and a call event without a result or
    /// a target state.
    pub from_state: Option<String>,
    /// The lead's state after; null on failure, for an erasure, and for a call event without a result or a target
    /// state.
    pub to_state: Option<String>,
    /// The lead's version after; null on failure, for an erasure, and for a call event that does not update the lead.
    pub version: Option<i64>,
    /// The disposition that was stored with the lead; absent if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disposition: Option<String>,
    /// The call that a call event names; absent if it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// The result of the call that ended; absent if none was reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity: Option<CallResult>,
    /// Contact data of a created lead; absent for other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contact: Option<LeadContact>,
    /// The user whom the command names.
    pub user_id: Option<String>,
    /// Warnings about ignored input, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// When the command was decided.
    pub timestamp: Timestamp,
    /// The lead's metadata after the merge or the creation; null on failure, for a call event, and for an erasure.
    pub data: Option<JsonObject>,
}

impl CompletionEvent {
    /// A success, with all optional fields empty.
    pub fn new(kind: OutcomeKind, project_id: ObjectId, update_id: ObjectId, timestamp: Timestamp) -> Self {
        Self {
            kind,
            update_id,
            project_id,
            process_id: None,
            lead_id: None,
            reference_id: None,
            success: true,
            error: None,
            error_code: None,
            from_state: None,
            to_state: None,
            version: None,
            disposition: None,
            call_id: None,
            activity: None,
            contact: None,
            user_id: None,
            warnings: Vec::new(),
            timestamp,
            data: None,
        }
    }

    /// The event without data about its lead: ids, states, codes and times remain.
    #[must_use]
    pub fn erased(self) -> Self {
        Self {
            reference_id: None,
            error: self.error.map(|_| ERASED.to_owned()),
            disposition: None,
            call_id: None,
            activity: None,
            contact: None,
            user_id: None,
            warnings: Vec::new(),
            data: None,
            ..self
        }
    }
}

/// The body of a webhook: exactly these eight fields, in this order.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WebhookPayload<'a> {
    /// Always `update`.
    #[cfg_attr(feature = "schema", schemars(extend("const" = "update")))]
    pub action_type: &'static str,
    #[serde(rename = "updateId")]
    /// The update.
    pub update_id: ObjectId,
    /// Whether the update changed the lead.
    pub success: bool,
    /// Why the update failed; null on success.
    pub error: Option<&'a str>,
    #[serde(rename = "leadId")]
    /// The lead.
    pub lead_id: Option<ObjectId>,
    #[serde(rename = "referenceId")]
    /// The lead's external id.
    pub reference_id: Option<&'a str>,
    /// When the update was decided, in milliseconds.
    pub timestamp: Timestamp,
    /// The lead's metadata after the merge; null on failure.
    pub data: Option<&'a JsonObject>,
}

impl<'a> From<&'a CompletionEvent> for WebhookPayload<'a> {
    fn from(event: &'a CompletionEvent) -> Self {
        Self {
            action_type: "update",
            update_id: event.update_id,
            success: event.success,
            error: event.error.as_deref(),
            lead_id: event.lead_id,
            reference_id: event.reference_id.as_deref(),
            timestamp: event.timestamp,
            data: event.data.as_ref(),
        }
    }
}

/// The body of a test delivery, which reports no update. Always these fields, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TestPayload {
    /// Always `test`.
    #[cfg_attr(feature = "schema", schemars(extend("const" = "test")))]
    pub action_type: &'static str,
    #[serde(rename = "callbackId")]
    /// The callback under test.
    pub callback_id: ObjectId,
    #[serde(rename = "processId")]
    /// Its process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// The time of the test, in milliseconds.
    pub timestamp: Timestamp,
}

/// An event about a delivery or a callback, for operators and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum WebhookEvent {
    /// A delivery will not be attempted again.
    Exhausted {
        /// The update that was not delivered.
        update_id: ObjectId,
        /// The project.
        project_id: ObjectId,
        /// The process; null when it was not known.
        process_id: Option<ObjectId>,
        /// The callback that did not accept it.
        callback_id: ObjectId,
        /// The kind of the delivery; the outcome of an update if absent.
        #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
        kind: DeliveryKind,
        /// The number of attempts.
        attempts: u32,
        /// Why the last attempt failed.
        error: String,
        /// When the delivery was exhausted.
        timestamp: Timestamp,
    },
    /// A callback receives nothing until it is enabled again.
    CallbackDisabled {
        /// The project.
        project_id: ObjectId,
        /// The process; null for a fallback callback of the project.
        process_id: Option<ObjectId>,
        /// The callback.
        callback_id: ObjectId,
        /// Why the callback was disabled.
        reason: String,
        /// When the callback was disabled.
        timestamp: Timestamp,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_test_payload_has_this_wire_form() {
        let ping = TestPayload {
            action_type: "test",
            callback_id: ObjectId::from_bytes([1; 12]),
            process_id: None,
            timestamp: Timestamp::from_millis(1_768_193_759_048),
        };
        insta::assert_snapshot!(serde_json::to_string(&ping).unwrap(), @r#"{"action_type":"test","callbackId":"010101010101010101010101","processId":null,"timestamp":1768193759048}"#);
    }

    pub(crate) fn event() -> CompletionEvent {
        let (project_id, update_id) = (ObjectId::from_bytes([2; 12]), ObjectId::from_bytes([1; 12]));
        let timestamp = Timestamp::from_millis(1_768_193_759_048);
        CompletionEvent {
            process_id: Some(ObjectId::from_bytes([3; 12])),
            lead_id: Some(ObjectId::from_bytes([4; 12])),
            reference_id: Some("AB123456789".into()),
            from_state: Some("new".into()),
            to_state: Some("interested".into()),
            version: Some(2),
            data: Some(JsonObject::from_text(r#"{"make":"Toyota","model":"Camry"}"#.into()).unwrap()),
            ..CompletionEvent::new(OutcomeKind::Update, project_id, update_id, timestamp)
        }
    }

    #[test]
    fn a_completion_event_has_this_wire_form() {
        let text = serde_json::to_string(&event()).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","projectId":"020202020202020202020202","processId":"030303030303030303030303","leadId":"040404040404040404040404","referenceId":"AB123456789","success":true,"error":null,"errorCode":null,"fromState":"new","toState":"interested","version":2,"userId":null,"timestamp":1768193759048,"data":{"make":"Toyota","model":"Camry"}}"#);
        assert_eq!(serde_json::from_str::<CompletionEvent>(&text).unwrap(), event());
        let ended = CompletionEvent { kind: OutcomeKind::CallEnded, ..event() };
        let text = serde_json::to_string(&ended).unwrap();
        assert!(text.starts_with(r#"{"kind":"call.ended","updateId":"#), "{text}");
        assert_eq!(serde_json::from_str::<CompletionEvent>(&text).unwrap(), ended);
    }

    #[test]
    fn a_webhook_payload_has_this_wire_form() {
        let text = serde_json::to_string(&WebhookPayload::from(&event())).unwrap();
        insta::assert_snapshot!(text, @r#"{"action_type":"update","updateId":"010101010101010101010101","success":true,"error":null,"leadId":"040404040404040404040404","referenceId":"AB123456789","timestamp":1768193759048,"data":{"make":"Toyota","model":"Camry"}}"#);
        let failed = CompletionEvent {
            success: false,
            error: Some("Lead update is not allowed while a call is in progress for this lead".into()),
            reference_id: None,
            data: None,
            ..event()
        };
        let text = serde_json::to_string(&WebhookPayload::from(&failed)).unwrap();
        insta::assert_snapshot!(text, @r#"{"action_type":"update","updateId":"010101010101010101010101","success":false,"error":"Lead update is not allowed while a call is in progress for this lead","leadId":"040404040404040404040404","referenceId":null,"timestamp":1768193759048,"data":null}"#);
    }

    #[test]
    fn webhook_events_have_this_wire_form() {
        let disabled = WebhookEvent::CallbackDisabled {
            project_id: ObjectId::from_bytes([2; 12]),
            process_id: None,
            callback_id: ObjectId::from_bytes([5; 12]),
            reason: "the endpoint answered 410 Gone".into(),
            timestamp: Timestamp::from_millis(1),
        };
        insta::assert_snapshot!(serde_json::to_string(&disabled).unwrap(), @r#"{"type":"callbackDisabled","projectId":"020202020202020202020202","processId":null,"callbackId":"050505050505050505050505","reason":"the endpoint answered 410 Gone","timestamp":1}"#);
    }
}

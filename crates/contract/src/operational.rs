//! Operational events: what happens to callbacks, for the owner of the project.
//!
//! | event | occurs when |
//! |---|---|
//! | `callback.failing` | all attempts of a callback have failed for a while; once until it recovers |
//! | `callback.disabled` | a callback was disabled: it answered 410, or has failed for too long |
//! | `callback.recovered` | a callback that was reported as failing accepted a delivery or was resumed, or a disabled one is enabled again |
//! | `delivery.exhausted` | deliveries of a callback are exhausted; at most one event per callback and interval, with their number |
//!
//! A callback that names these events receives those about the other callbacks of its process; a callback of the
//! fallback process `_` receives those about all other callbacks of the project. Filters do not apply to them.

use serde::Serialize;

use crate::{ObjectId, Timestamp, event_kind::DeliveryKind};

/// The body of a webhook about a callback: the envelope of Standard Webhooks. Always these fields, in this order.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OperationalPayload<'a> {
    /// The kind of the event.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(with = "DeliveryKind"))]
    pub kind: &'static str,
    /// When the event occurred, as ISO 8601 in UTC.
    #[cfg_attr(feature = "schema", schemars(extend("format" = "date-time")))]
    pub timestamp: String,
    /// The callback that the event is about.
    pub data: OperationalData<'a>,
}

/// The callback that an operational event is about.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct OperationalData<'a> {
    /// The project.
    pub project_id: ObjectId,
    /// The callback's process; null for a fallback callback of the project.
    pub process_id: Option<ObjectId>,
    /// The name of the process.
    pub process: &'a str,
    /// The callback.
    pub callback_id: ObjectId,
    /// The callback's name.
    pub callback: &'a str,
    /// The reason; null if it is unknown.
    pub reason: Option<&'a str>,
    /// Since when all attempts have failed, as ISO 8601 in UTC; null if the callback was not failing.
    #[cfg_attr(feature = "schema", schemars(extend("format" = "date-time")))]
    pub failing_since: Option<String>,
    /// How many deliveries were exhausted since the last event; null for other kinds.
    pub deliveries: Option<i64>,
    /// The last of these deliveries; null for other kinds.
    pub last_delivery_id: Option<String>,
}

impl OperationalPayload<'_> {
    /// The body of the webhook.
    ///
    /// # Errors
    /// The body cannot be serialized.
    pub fn body(kind: DeliveryKind, at: Timestamp, data: OperationalData<'_>) -> serde_json::Result<String> {
        serde_json::to_string(&OperationalPayload { kind: kind.as_str(), timestamp: at.to_iso(), data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{OutcomeKind, tests::event},
        event_kind::EventKind,
    };

    #[test]
    fn an_operational_payload_has_this_wire_form() {
        let data = OperationalData {
            project_id: ObjectId::from_bytes([2; 12]),
            process_id: None,
            process: "_",
            callback_id: ObjectId::from_bytes([5; 12]),
            callback: "crm",
            reason: Some("the endpoint answered 410 Gone"),
            failing_since: Some(Timestamp::from_millis(0).to_iso()),
            deliveries: None,
            last_delivery_id: None,
        };
        let body = OperationalPayload::body(DeliveryKind::CallbackDisabled, Timestamp::from_millis(1), data).unwrap();
        insta::assert_snapshot!(body, @r#"{"type":"callback.disabled","timestamp":"1970-01-01T00:00:00.001Z","data":{"projectId":"020202020202020202020202","processId":null,"process":"_","callbackId":"050505050505050505050505","callback":"crm","reason":"the endpoint answered 410 Gone","failingSince":"1970-01-01T00:00:00.000Z","deliveries":null,"lastDeliveryId":null}}"#);
    }

    #[test]
    fn no_outcome_is_an_operational_event() {
        for kind in [OutcomeKind::Update, OutcomeKind::CallEnded, OutcomeKind::Erase, OutcomeKind::LeadCreated] {
            let event = crate::event::CompletionEvent { kind, ..event() };
            let operational = EventKind::ALL.iter().filter(|kind| kind.delivery().is_operational());
            assert_eq!(operational.filter(|kind| kind.occurred(&event)).count(), 0);
        }
        assert_eq!(DeliveryKind::ALL.iter().filter(|kind| kind.is_operational()).count(), 4);
    }
}

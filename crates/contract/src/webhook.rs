//! The events for callbacks that follow from a completion event, and the bodies of their deliveries.
//!
//! | event | occurs when | delivery | `webhook-id` | body |
//! |---|---|---|---|---|
//! | `update.succeeded`, `update.failed` | an update was decided | `update` | `{updateId}` | [`WebhookPayload`] |
//! | `lead.created` | a lead was created | its name | `{updateId}.{kind}` | [`EventPayload`] |
//! | `lead.state_changed` | the lead moved to another state | its name | `{updateId}.{kind}` | [`EventPayload`] |
//! | `lead.disposition_set` | a disposition was stored | its name | `{updateId}.{kind}` | [`EventPayload`] |
//! | `call.started`, `call.ended` | a call with a lead started or ended | its name | `{updateId}.{kind}` | [`EventPayload`] |
//! | `callback.…`, `delivery.exhausted` | see [`operational`](crate::operational) | its name | `{eventId}.{kind}` | [`OperationalPayload`](crate::operational::OperationalPayload) |
//! | `activity.completed` | the result of a call was recorded | its name | `{updateId}.{kind}` | [`ActivityPayload`] |

use serde::Serialize;

use crate::{
    JsonObject, ObjectId,
    activity::ActivityPayload,
    event::{CompletionEvent, OutcomeKind, WebhookPayload},
    event_kind::{DeliveryKind, EventKind},
};

impl EventKind {
    /// Whether a completion event causes an event of this kind.
    pub fn occurred(self, event: &CompletionEvent) -> bool {
        let succeeded = event.success;
        let is_created = event.kind == OutcomeKind::LeadCreated;
        match self {
            Self::Succeeded => event.kind.is_update() && succeeded,
            Self::Failed => event.kind.is_update() && !succeeded,
            Self::LeadCreated => is_created && succeeded,
            // The first state of a lead is not a change.
            Self::StateChanged => {
                succeeded && !is_created && event.to_state.is_some() && event.from_state != event.to_state
            }
            Self::DispositionSet => succeeded && event.disposition.is_some(),
            Self::CallStarted => event.kind == OutcomeKind::CallStarted && succeeded,
            Self::CallEnded => event.kind == OutcomeKind::CallEnded && succeeded,
            Self::ActivityCompleted => succeeded && event.activity.is_some(),
            // About a callback, not a lead.
            Self::CallbackFailing | Self::CallbackDisabled | Self::CallbackRecovered | Self::DeliveryExhausted => false,
        }
    }
}

impl DeliveryKind {
    /// The body of such a delivery; none if the completion event causes no delivery of this kind.
    ///
    /// # Errors
    /// The body cannot be serialized.
    pub fn body(self, event: &CompletionEvent) -> serde_json::Result<Option<String>> {
        if !EventKind::ALL.iter().any(|kind| kind.delivery() == self && kind.occurred(event)) {
            return Ok(None);
        }
        match self {
            Self::Update => serde_json::to_string(&WebhookPayload::from(event)),
            Self::LeadCreated => self.envelope(event, EventData::Created(event.into())),
            Self::StateChanged | Self::DispositionSet => self.envelope(event, EventData::Lead(event.into())),
            Self::CallStarted | Self::CallEnded => self.envelope(event, EventData::Call(event.into())),
            Self::ActivityCompleted => serde_json::to_string(&ActivityPayload::of(event)),
            // No completion event causes one of these.
            Self::CallbackFailing | Self::CallbackDisabled | Self::CallbackRecovered | Self::DeliveryExhausted => {
                return Ok(None);
            }
        }
        .map(Some)
    }

    fn envelope(self, event: &CompletionEvent, data: EventData<'_>) -> serde_json::Result<String> {
        serde_json::to_string(&EventPayload { kind: self.as_str(), timestamp: event.timestamp.to_iso(), data })
    }
}

/// The body of a webhook about a lead or a call: the envelope of Standard Webhooks
/// (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>). Always these fields,
/// in this order.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EventPayload<'a> {
    /// The kind of the event.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(with = "DeliveryKind"))]
    pub kind: &'static str,
    /// When the command was decided, as ISO 8601 in UTC.
    #[cfg_attr(feature = "schema", schemars(extend("format" = "date-time")))]
    pub timestamp: String,
    /// The lead or call that the event is about.
    pub data: EventData<'a>,
}

/// The data of an event about a lead or a call.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum EventData<'a> {
    /// Of `lead.created`.
    Created(CreatedEventData<'a>),
    /// Of `lead.state_changed` and `lead.disposition_set`.
    Lead(LeadEventData<'a>),
    /// Of `call.started` and `call.ended`.
    Call(CallEventData<'a>),
}

/// `data` of the creation of a lead.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CreatedEventData<'a> {
    /// The creation.
    pub update_id: ObjectId,
    /// The project.
    pub project_id: ObjectId,
    /// The lead's process.
    pub process_id: Option<ObjectId>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<&'a str>,
    /// The state in which the lead was created.
    pub state: Option<&'a str>,
    /// The lead's name.
    pub name: Option<&'a str>,
    /// The lead's phone number.
    pub phone: Option<&'a str>,
    /// The lead's e-mail address.
    pub email: Option<&'a str>,
    /// The metadata with which the lead was created.
    pub metadata: Option<&'a JsonObject>,
}

impl<'a> From<&'a CompletionEvent> for CreatedEventData<'a> {
    fn from(event: &'a CompletionEvent) -> Self {
        let contact = event.contact.as_ref();
        Self {
            update_id: event.update_id,
            project_id: event.project_id,
            process_id: event.process_id,
            lead_id: event.lead_id,
            reference_id: event.reference_id.as_deref(),
            state: event.to_state.as_deref(),
            name: contact.and_then(|contact| contact.name.as_deref()),
            phone: contact.and_then(|contact| contact.phone.as_deref()),
            email: contact.and_then(|contact| contact.email.as_deref()),
            metadata: event.data.as_ref(),
        }
    }
}

/// `data` of an event of a lead.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeadEventData<'a> {
    /// The update, or the call event, that changed the lead.
    pub update_id: ObjectId,
    /// The project.
    pub project_id: ObjectId,
    /// The lead's process.
    pub process_id: Option<ObjectId>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<&'a str>,
    /// The lead's state before.
    pub from_state: Option<&'a str>,
    /// The lead's state after.
    pub to_state: Option<&'a str>,
    /// The disposition that was stored; null if none was.
    pub disposition: Option<&'a str>,
    /// The lead's version after.
    pub version: Option<i64>,
    /// The user who changed the lead.
    pub user_id: Option<&'a str>,
}

impl<'a> From<&'a CompletionEvent> for LeadEventData<'a> {
    fn from(event: &'a CompletionEvent) -> Self {
        Self {
            update_id: event.update_id,
            project_id: event.project_id,
            process_id: event.process_id,
            lead_id: event.lead_id,
            reference_id: event.reference_id.as_deref(),
            from_state: event.from_state.as_deref(),
            to_state: event.to_state.as_deref(),
            disposition: event.disposition.as_deref(),
            version: event.version,
            user_id: event.user_id.as_deref(),
        }
    }
}

/// `data` of an event of a call.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallEventData<'a> {
    /// The call event.
    pub update_id: ObjectId,
    /// The project.
    pub project_id: ObjectId,
    /// The lead's process.
    pub process_id: Option<ObjectId>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<&'a str>,
    /// The call; null if the call event named none.
    pub call_id: Option<&'a str>,
}

impl<'a> From<&'a CompletionEvent> for CallEventData<'a> {
    fn from(event: &'a CompletionEvent) -> Self {
        Self {
            update_id: event.update_id,
            project_id: event.project_id,
            process_id: event.process_id,
            lead_id: event.lead_id,
            reference_id: event.reference_id.as_deref(),
            call_id: event.call_id.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{command::LeadContact, event::tests::event};

    fn occurred(event: &CompletionEvent) -> Vec<&'static str> {
        EventKind::ALL.iter().filter(|kind| kind.occurred(event)).map(|kind| kind.as_str()).collect()
    }

    #[test]
    fn a_completion_event_means_these_kinds() {
        let moved = event();
        let same = CompletionEvent { to_state: moved.from_state.clone(), ..moved.clone() };
        let disposed = CompletionEvent { disposition: Some("callback".into()), ..same.clone() };
        let failed = CompletionEvent { success: false, to_state: None, ..disposed.clone() };
        let call = |kind, success| CompletionEvent { kind, success, from_state: None, to_state: None, ..event() };

        let created = CompletionEvent { kind: OutcomeKind::LeadCreated, from_state: None, ..moved.clone() };

        assert_eq!(occurred(&created), ["lead.created"], "its first state is no change");
        assert!(occurred(&CompletionEvent { success: false, ..created }).is_empty());
        assert_eq!(occurred(&moved), ["update.succeeded", "lead.state_changed"]);
        assert_eq!(occurred(&same), ["update.succeeded"]);
        assert_eq!(occurred(&disposed), ["update.succeeded", "lead.disposition_set"]);
        assert_eq!(occurred(&failed), ["update.failed"]);
        assert_eq!(occurred(&call(OutcomeKind::CallStarted, true)), ["call.started"]);
        assert_eq!(occurred(&call(OutcomeKind::CallEnded, true)), ["call.ended"]);
        assert!(occurred(&call(OutcomeKind::CallEnded, false)).is_empty(), "a failed call event causes no event");
    }

    #[test]
    fn events_of_leads_and_calls_share_an_envelope() {
        let event = CompletionEvent { disposition: Some("callback".into()), call_id: Some("c-1".into()), ..event() };
        let started = CompletionEvent { kind: OutcomeKind::CallStarted, ..event.clone() };
        let contact = LeadContact { name: Some("Ada".into()), phone: Some("+14155550123".into()), email: None };
        let created = CompletionEvent {
            kind: OutcomeKind::LeadCreated,
            from_state: None,
            to_state: Some("new".into()),
            contact: Some(contact),
            ..event.clone()
        };
        let body = |kind: DeliveryKind, event: &CompletionEvent| kind.body(event).unwrap().unwrap();

        insta::assert_snapshot!(body(DeliveryKind::StateChanged, &event), @r#"{"type":"lead.state_changed","timestamp":"2026-01-12T04:55:59.048Z","data":{"updateId":"010101010101010101010101","projectId":"020202020202020202020202","processId":"030303030303030303030303","leadId":"040404040404040404040404","referenceId":"AB123456789","fromState":"new","toState":"interested","disposition":"callback","version":2,"userId":null}}"#);
        insta::assert_snapshot!(body(DeliveryKind::CallStarted, &started), @r#"{"type":"call.started","timestamp":"2026-01-12T04:55:59.048Z","data":{"updateId":"010101010101010101010101","projectId":"020202020202020202020202","processId":"030303030303030303030303","leadId":"040404040404040404040404","referenceId":"AB123456789","callId":"c-1"}}"#);
        insta::assert_snapshot!(body(DeliveryKind::LeadCreated, &created), @r#"{"type":"lead.created","timestamp":"2026-01-12T04:55:59.048Z","data":{"updateId":"010101010101010101010101","projectId":"020202020202020202020202","processId":"030303030303030303030303","leadId":"040404040404040404040404","referenceId":"AB123456789","state":"new","name":"Ada","phone":"+14155550123","email":null,"metadata":{"make":"Toyota","model":"Camry"}}}"#);
        assert!(body(DeliveryKind::DispositionSet, &event).starts_with(r#"{"type":"lead.disposition_set","#));
        assert!(DeliveryKind::CallEnded.body(&event).unwrap().is_none());
    }

    #[test]
    fn only_deliveries_of_other_kinds_name_them_in_their_webhook_id() {
        let update_id = ObjectId::from_bytes([1; 12]);

        assert_eq!(DeliveryKind::Update.webhook_id(update_id), "010101010101010101010101");
        assert_eq!(DeliveryKind::CallEnded.webhook_id(update_id), "010101010101010101010101.call.ended");
    }

    proptest! {
        #[test]
        fn an_event_means_at_most_one_delivery_of_each_kind_and_each_has_a_body(
            kind in prop_oneof![
                Just(OutcomeKind::Update), Just(OutcomeKind::CallStarted), Just(OutcomeKind::CallEnded),
                Just(OutcomeKind::Erase), Just(OutcomeKind::LeadCreated)
            ],
            success: bool,
            from_state in prop::option::of("[ab]"),
            to_state in prop::option::of("[ab]"),
            disposition in prop::option::of("[ab]"),
        ) {
            let event = CompletionEvent { kind, success, from_state, to_state, disposition, ..event() };
            let meant = EventKind::ALL.iter().filter(|kind| kind.occurred(&event)).map(|kind| kind.delivery());
            let meant = meant.collect::<Vec<_>>();
            let distinct = meant.iter().copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(distinct.len(), meant.len());
            for kind in DeliveryKind::ALL {
                prop_assert_eq!(kind.body(&event).unwrap().is_some(), distinct.contains(&kind));
            }
        }
    }
}

//! The kinds of events that callbacks subscribe to, and the kinds of their deliveries. `webhook` derives the kinds of
//! an event.

use crate::{ObjectId, named::named};

named! {
    /// A kind of event that callbacks subscribe to.
    EventKind, InvalidEventKind,
    /// The update changed the lead.
    Succeeded = "update.succeeded",
    /// The update did not change the lead.
    Failed = "update.failed",
    /// A lead was created.
    LeadCreated = "lead.created",
    /// The lead moved to another state.
    StateChanged = "lead.state_changed",
    /// A disposition was stored with the lead.
    DispositionSet = "lead.disposition_set",
    /// A call with the lead started.
    CallStarted = "call.started",
    /// A call with the lead ended.
    CallEnded = "call.ended",
    /// The result of a call with the lead was recorded.
    ActivityCompleted = "activity.completed",
    /// All attempts of a callback have failed for a while.
    CallbackFailing = "callback.failing",
    /// A callback was disabled.
    CallbackDisabled = "callback.disabled",
    /// A callback that was failing accepted a delivery, or one that was disabled is enabled again.
    CallbackRecovered = "callback.recovered",
    /// Deliveries of a callback are exhausted.
    DeliveryExhausted = "delivery.exhausted",
}

named! {
    /// The kind of a delivery: with the update and the callback, it identifies the delivery.
    #[derive(Default)]
    DeliveryKind, InvalidDeliveryKind,
    /// The outcome of an update, succeeded or failed.
    #[default]
    Update = "update",
    /// [`EventKind::StateChanged`].
    StateChanged = "lead.state_changed",
    /// [`EventKind::DispositionSet`].
    DispositionSet = "lead.disposition_set",
    /// [`EventKind::CallStarted`].
    CallStarted = "call.started",
    /// [`EventKind::CallEnded`].
    CallEnded = "call.ended",
    /// [`EventKind::ActivityCompleted`].
    ActivityCompleted = "activity.completed",
    /// [`EventKind::LeadCreated`].
    LeadCreated = "lead.created",
    /// [`EventKind::CallbackFailing`].
    CallbackFailing = "callback.failing",
    /// [`EventKind::CallbackDisabled`].
    CallbackDisabled = "callback.disabled",
    /// [`EventKind::CallbackRecovered`].
    CallbackRecovered = "callback.recovered",
    /// [`EventKind::DeliveryExhausted`].
    DeliveryExhausted = "delivery.exhausted",
}

impl EventKind {
    /// The events of a callback that names none.
    pub const DEFAULT: [Self; 2] = [Self::Succeeded, Self::Failed];

    /// The kind of the deliveries of such events.
    pub const fn delivery(self) -> DeliveryKind {
        match self {
            Self::Succeeded | Self::Failed => DeliveryKind::Update,
            Self::LeadCreated => DeliveryKind::LeadCreated,
            Self::StateChanged => DeliveryKind::StateChanged,
            Self::DispositionSet => DeliveryKind::DispositionSet,
            Self::CallStarted => DeliveryKind::CallStarted,
            Self::CallEnded => DeliveryKind::CallEnded,
            Self::ActivityCompleted => DeliveryKind::ActivityCompleted,
            Self::CallbackFailing => DeliveryKind::CallbackFailing,
            Self::CallbackDisabled => DeliveryKind::CallbackDisabled,
            Self::CallbackRecovered => DeliveryKind::CallbackRecovered,
            Self::DeliveryExhausted => DeliveryKind::DeliveryExhausted,
        }
    }
}

impl DeliveryKind {
    /// Whether this is the kind of an update's outcome. Ids and messages omit this kind, as those of earlier versions
    /// do.
    pub fn is_update(&self) -> bool {
        *self == Self::Update
    }

    /// Whether events of this kind are about a callback instead of a lead. Deliveries of such events cause no such
    /// events, so there are no loops.
    pub const fn is_operational(self) -> bool {
        match self {
            Self::CallbackFailing | Self::CallbackDisabled | Self::CallbackRecovered | Self::DeliveryExhausted => true,
            Self::Update
            | Self::StateChanged
            | Self::DispositionSet
            | Self::CallStarted
            | Self::CallEnded
            | Self::ActivityCompleted
            | Self::LeadCreated => false,
        }
    }

    /// The `webhook-id` of its deliveries.
    pub fn webhook_id(self, update_id: ObjectId) -> String {
        match self {
            Self::Update => update_id.to_string(),
            _ => format!("{update_id}.{self}"),
        }
    }
}

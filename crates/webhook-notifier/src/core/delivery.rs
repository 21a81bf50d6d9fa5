//! A delivery, its states and its record.

use std::sync::Arc;

use contract::{ObjectId, Timestamp, event_kind::DeliveryKind, position::EventPosition, rpc::DeliveryStatus};

use super::{ordering::LeadKey, outcome::Attempt};

/// A completion event on its way to one callback. Update, callback and kind identify it; update and kind are its
/// `webhook-id`.
#[derive(Debug, Clone)]
pub(crate) struct PendingDelivery {
    pub(crate) update_id: ObjectId,
    pub(crate) callback_id: ObjectId,
    pub(crate) kind: DeliveryKind,
    pub(crate) project_id: ObjectId,
    /// The process whose configuration contains the callback; none for the project's fallback callbacks.
    pub(crate) process_id: Option<ObjectId>,
    /// The exact bytes of the request's body.
    pub(crate) body: Arc<str>,
    pub(crate) traceparent: Option<Arc<str>>,
    /// Only for callbacks with `ordering: "lead"`.
    pub(crate) order: Option<Arc<LeadOrder>>,
}

impl PendingDelivery {
    /// The lead whose next delivery waits for this one, if the callback is ordered.
    pub(crate) fn ordered_lead(&self) -> Option<LeadKey> {
        let order = self.order.as_ref()?;
        Some(LeadKey { callback_id: self.callback_id, lead_id: order.lead_id })
    }
}

/// The position of a delivery among those of its lead to the same callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeadOrder {
    pub(crate) lead_id: ObjectId,
    /// Big-endian, so that bytes compare like positions.
    pub(crate) key: Vec<u8>,
    /// The identity of the event's stream, and the event's sequence in it.
    pub(crate) event_stream: Arc<str>,
    pub(crate) event_sequence: u64,
}

impl LeadOrder {
    pub(crate) fn new(lead_id: ObjectId, position: EventPosition, event_stream: Arc<str>, event_sequence: u64) -> Self {
        // The position survives a new LEAD_EVENTS; the event's sequence orders events that were decided at one
        // position.
        let mut key = Vec::with_capacity(28);
        key.extend(position.generation.to_be_bytes());
        key.extend(position.log.epoch.to_be_bytes());
        key.extend(position.log.sequence.to_be_bytes());
        key.extend(position.log.index.to_be_bytes());
        key.extend(event_sequence.to_be_bytes());
        Self { lead_id, key, event_stream, event_sequence }
    }

    /// The position of a delivery of this kind: the outcome of the update comes first, the others in their order.
    pub(crate) fn of_kind(&self, kind: DeliveryKind) -> Self {
        let mut order = self.clone();
        if !kind.is_update() {
            order.key.push(kind as u8);
        }
        order
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeliveryState {
    /// The next attempt is due at this time.
    RetryAt(Timestamp),
    /// Waits until the lead's earlier deliveries are completed.
    Queued,
    Delivered,
    /// Not attempted again.
    Exhausted,
}

impl DeliveryState {
    pub(crate) fn status(self) -> DeliveryStatus {
        match self {
            Self::RetryAt(_) | Self::Queued => DeliveryStatus::Pending,
            Self::Delivered => DeliveryStatus::Delivered,
            Self::Exhausted => DeliveryStatus::Exhausted,
        }
    }

    pub(crate) fn next_attempt_at(self) -> Option<Timestamp> {
        match self {
            Self::RetryAt(at) => Some(at),
            Self::Queued | Self::Delivered | Self::Exhausted => None,
        }
    }

    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Delivered | Self::Exhausted)
    }
}

/// Where a delivery was taken from: this decides what a record may change in an existing row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeliverySource {
    /// The event. It may have been delivered before, so a record may only turn an existing row into delivered.
    Event,
    /// A row claimed under a lease until this time, which is its `next_attempt_at`. Another notifier may claim it
    /// afterwards: then a record may only turn it into delivered.
    Claim { lease_until: Timestamp },
}

impl DeliverySource {
    /// The end of the lease of a claimed row.
    pub(crate) fn lease(self) -> Option<Timestamp> {
        match self {
            Self::Event => None,
            Self::Claim { lease_until } => Some(lease_until),
        }
    }
}

/// What is recorded of a delivery.
#[derive(Debug)]
pub(crate) struct DeliveryRecord {
    pub(crate) delivery: PendingDelivery,
    pub(crate) source: DeliverySource,
    pub(crate) state: DeliveryState,
    pub(crate) attempt: Option<Attempt>,
    /// Why it is not delivered.
    pub(crate) error: Option<String>,
    /// Why the callback is disabled with this record, if it is.
    pub(crate) disable_callback: Option<String>,
    pub(crate) at: Timestamp,
}

impl DeliveryRecord {
    /// A record without an attempt.
    pub(crate) fn new(delivery: PendingDelivery, source: DeliverySource, state: DeliveryState, at: Timestamp) -> Self {
        Self { delivery, source, state, attempt: None, error: None, disable_callback: None, at }
    }
}

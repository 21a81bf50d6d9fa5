//! 7 Deliver, 8 Retry: a delivery and what is reported of it.

use std::{sync::Arc, time::Duration};

use contract::{ObjectId, Timestamp, position::EventPosition};

/// A completion event on its way to one callback. The update and the callback are its identity; the update's id is also
/// its `webhook-id`, so one id tells the whole story.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) update_id: ObjectId,
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    /// The process in whose configuration the callback stands; none for the project's fallback callbacks.
    pub(crate) process_id: Option<ObjectId>,
    /// The exact bytes of the body.
    pub(crate) body: Arc<str>,
    pub(crate) traceparent: Option<Arc<str>>,
    /// Of a callback with an order: its place among the lead's.
    pub(crate) order: Option<Arc<Order>>,
}

/// Where a delivery comes among those of its lead to the same callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) lead_id: ObjectId,
    /// Position and sequence of the event, in bytes that compare as they do: the position goes on when LEAD_EVENTS is made
    /// anew, the sequence tells apart what was decided at the same entry of the log.
    pub(crate) place: Vec<u8>,
    /// The stream that the event is in.
    pub(crate) stream: Arc<str>,
    /// Its sequence there.
    pub(crate) sequence: u64,
}

impl Order {
    /// The order of an event of this lead.
    pub(crate) fn new(lead_id: ObjectId, position: EventPosition, stream: Arc<str>, sequence: u64) -> Self {
        let mut place = Vec::with_capacity(24);
        place.extend(position.generation.to_be_bytes());
        place.extend(position.log.epoch.to_be_bytes());
        place.extend(position.log.sequence.to_be_bytes());
        place.extend(sequence.to_be_bytes());
        Self { lead_id, place, stream, sequence }
    }
}

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is tried (again) when it is due.
    Pending { due: Timestamp },
    /// It waits until the lead's delivery before it is settled.
    Waiting,
    /// The endpoint took it.
    Delivered,
    /// It is not tried again.
    Exhausted,
}

/// How one POST went.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) started_at: Timestamp,
    /// Until the answer's head was complete, or the attempt was given up.
    pub(crate) duration: Duration,
    /// The status that the endpoint answered with, if it did.
    pub(crate) status: Option<u16>,
    /// What went wrong; none when the endpoint took it.
    pub(crate) error: Option<String>,
    /// The first bytes of the answer's body.
    pub(crate) response: Option<String>,
    /// When the endpoint wants to be asked again, as it said.
    pub(crate) retry_after: Option<String>,
}

/// Who speaks for a delivery: that decides what a report may change of one that is recorded already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The event. It may have been seen before, so of a recorded delivery only success is believed.
    Event,
    /// The claim of a recorded delivery.
    Claim,
}

/// What is to be recorded of a delivery.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) delivery: Delivery,
    pub(crate) origin: Origin,
    pub(crate) standing: Standing,
    /// The attempt that was made, if one was.
    pub(crate) attempt: Option<Attempt>,
    /// Why it is not delivered.
    pub(crate) error: Option<String>,
    /// Why the callback gets nothing more, if that is so.
    pub(crate) disable: Option<String>,
    pub(crate) at: Timestamp,
}

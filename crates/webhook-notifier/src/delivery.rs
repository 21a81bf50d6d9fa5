//! 7 Deliver, 8 Retry: a delivery and what is reported of it.

use std::{sync::Arc, time::Duration};

use contract::{ObjectId, Timestamp};

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
}

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is tried (again) when it is due.
    Pending { due: Timestamp },
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

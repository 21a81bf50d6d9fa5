//! Callbacks with `ordering: "lead"`: the leads whose next delivery may be ready to start.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use contract::ObjectId;
use tokio::sync::Notify;

/// Maximum number of leads that are remembered one by one; beyond that, the sweep checks them. A higher maximum takes
/// more memory.
const MAX_LEADS: usize = 10_000;

/// The deliveries of one lead to one callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LeadKey {
    pub(crate) callback_id: ObjectId,
    pub(crate) lead_id: ObjectId,
}

/// The oldest pending delivery of a lead, which had no due time yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeadHead {
    pub(crate) lead: LeadKey,
    /// Whether it is due now. If not, an earlier event may not be recorded yet.
    pub(crate) is_due: bool,
}

/// All events of the stream before this sequence are recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecordedWatermark {
    pub(crate) stream: String,
    pub(crate) sequence: u64,
}

/// The leads to check.
#[derive(Debug, Default)]
pub(crate) struct PendingLeads {
    pub(crate) leads: HashSet<LeadKey>,
    pub(crate) all: bool,
}

impl PendingLeads {
    pub(crate) fn is_empty(&self) -> bool {
        self.leads.is_empty() && !self.all
    }

    pub(crate) fn insert(&mut self, lead: LeadKey) {
        if self.leads.len() < MAX_LEADS {
            self.leads.insert(lead);
        } else {
            self.all = true;
        }
    }
}

/// Collects the leads to check from the tasks that record deliveries.
#[derive(Debug, Default)]
pub(crate) struct LeadQueue {
    pending: Mutex<PendingLeads>,
    added: Notify,
}

impl LeadQueue {
    fn lock(&self) -> MutexGuard<'_, PendingLeads> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, lead: LeadKey) {
        self.lock().insert(lead);
        self.added.notify_one();
    }

    pub(crate) fn push_all(&self) {
        self.lock().all = true;
        self.added.notify_one();
    }

    /// Puts back leads that were too early, without waking the task.
    pub(crate) fn put_back(&self, early: PendingLeads) {
        let mut pending = self.lock();
        pending.leads.extend(early.leads);
        pending.all |= early.all;
    }

    pub(crate) fn take(&self) -> PendingLeads {
        std::mem::take(&mut *self.lock())
    }

    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }
}

//! Callbacks with `ordering: "lead"`: the leads whose next delivery may be ready to start.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use contract::ObjectId;
use tokio::{sync::Notify, time::Instant};

/// Maximum number of leads that are remembered one by one; beyond that, the sweep checks them. A higher maximum takes
/// more memory.
const MAX_LEADS: usize = 10_000;
/// How often all leads are checked. A longer interval delays deliveries that a crashed notifier had to make due; a
/// shorter one costs Postgres more.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How soon a lead with an earlier unrecorded event is checked again: at first, and at most.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_millis(320);

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

/// A lead that the sweep visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VisitedLead {
    pub(crate) lead: LeadKey,
    /// Whether its oldest pending delivery has no due time yet, and its callback may be called.
    pub(crate) is_waiting: bool,
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
    /// Whether some leads were left to the sweep.
    pub(crate) all: bool,
}

impl PendingLeads {
    fn insert(&mut self, lead: LeadKey) {
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

    /// Puts back leads whose check failed, without waking the task.
    pub(crate) fn put_back(&self, leads: impl IntoIterator<Item = LeadKey>) {
        let mut pending = self.lock();
        leads.into_iter().for_each(|lead| pending.insert(lead));
    }

    pub(crate) fn take(&self) -> PendingLeads {
        std::mem::take(&mut *self.lock())
    }

    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }
}

/// Leads with an earlier event that is not recorded yet. Each is checked again after a delay of its own, so a lead
/// whose event stays parked delays no other.
#[derive(Debug, Default)]
pub(crate) struct EarlyLeads(HashMap<LeadKey, EarlyLead>);

#[derive(Debug)]
struct EarlyLead {
    check_at: Instant,
    delay: Duration,
}

impl EarlyLeads {
    /// The leads to check again now.
    pub(crate) fn due(&self, now: Instant) -> impl Iterator<Item = LeadKey> {
        self.0.iter().filter(move |(_, early)| early.check_at <= now).map(|(lead, _)| *lead)
    }

    /// When the next lead is to be checked again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.0.values().map(|early| early.check_at).min()
    }

    /// Notes the result of a check: the heads that had no due time before.
    pub(crate) fn note_check(&mut self, checked: &[LeadKey], heads: &[LeadHead], now: Instant) {
        let early = heads.iter().filter(|head| !head.is_due).map(|head| head.lead).collect::<HashSet<_>>();
        for lead in checked {
            let before = self.0.remove(lead);
            if early.contains(lead) && self.0.len() < MAX_LEADS {
                let delay = before.map_or(FIRST_DELAY, |before| (before.delay * 2).min(MAX_DELAY));
                self.0.insert(*lead, EarlyLead { check_at: now + delay, delay });
            }
        }
    }
}

/// The progress of the sweep over all leads. It visits a limited number of leads per step, so that added leads never
/// wait for all of them.
#[derive(Debug)]
pub(crate) struct Sweep {
    next_start: Instant,
    is_running: bool,
    /// The last lead that the running sweep visited.
    after: Option<LeadKey>,
}

impl Sweep {
    pub(crate) fn new(now: Instant) -> Self {
        Self { next_start: now, is_running: false, after: None }
    }

    /// Makes the next sweep due, after the running one.
    pub(crate) fn request(&mut self, now: Instant) {
        self.next_start = now;
    }

    /// Starts the next sweep if it is due. Returns whether a sweep is running.
    pub(crate) fn start_if_due(&mut self, now: Instant) -> bool {
        if !self.is_running && self.next_start <= now {
            *self = Self { next_start: now + SWEEP_INTERVAL, is_running: true, after: None };
        }
        self.is_running
    }

    /// The lead after which the next step starts; `None` if it starts with the first lead.
    pub(crate) fn after(&self) -> Option<LeadKey> {
        self.after
    }

    /// Notes the last lead that a step visited; `None` if the step visited all that were left.
    pub(crate) fn note_step(&mut self, last: Option<LeadKey>) {
        self.is_running = last.is_some();
        self.after = last;
    }

    pub(crate) fn next_step(&self, now: Instant) -> Instant {
        if self.is_running { now } else { self.next_start }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lead(byte: u8) -> LeadKey {
        LeadKey { callback_id: ObjectId::from_bytes([1; 12]), lead_id: ObjectId::from_bytes([byte; 12]) }
    }

    fn heads(leads: &[LeadKey], is_due: bool) -> Vec<LeadHead> {
        leads.iter().map(|lead| LeadHead { lead: *lead, is_due }).collect()
    }

    #[test]
    fn a_lead_that_waits_for_long_does_not_delay_the_check_of_another() {
        let (mut early, start) = (EarlyLeads::default(), Instant::now());
        let blocked = [lead(1)];
        let mut now = start;
        for _ in 0..20 {
            early.note_check(&blocked, &heads(&blocked, false), now);
            now = early.next_check().unwrap();
        }
        early.note_check(&blocked, &heads(&blocked, false), now);
        assert_eq!(early.next_check(), Some(now + MAX_DELAY));

        early.note_check(&[lead(2)], &heads(&[lead(2)], false), now);

        assert_eq!(early.next_check(), Some(now + FIRST_DELAY));
        assert_eq!(early.due(now + FIRST_DELAY).collect::<Vec<_>>(), [lead(2)]);
    }

    #[test]
    fn a_lead_is_forgotten_once_its_next_delivery_is_due_or_it_has_none() {
        let (mut early, now) = (EarlyLeads::default(), Instant::now());
        let leads = [lead(1), lead(2), lead(3)];
        early.note_check(&leads, &heads(&leads, false), now);

        early.note_check(&leads[..2], &heads(&leads[..1], true), now);

        assert_eq!(early.due(now + MAX_DELAY).collect::<Vec<_>>(), [lead(3)]);
    }

    #[test]
    fn a_sweep_continues_step_by_step_and_starts_again_after_its_interval() {
        let start = Instant::now();
        let mut sweep = Sweep::new(start);
        assert!(sweep.start_if_due(start));
        sweep.note_step(Some(lead(5)));
        assert_eq!((sweep.next_step(start), sweep.start_if_due(start), sweep.after()), (start, true, Some(lead(5))));

        sweep.note_step(None);

        let next = start + SWEEP_INTERVAL;
        assert_eq!((sweep.next_step(start), sweep.start_if_due(start)), (next, false));
        assert_eq!((sweep.start_if_due(next), sweep.after()), (true, None));
    }

    #[test]
    fn a_sweep_that_is_requested_during_another_starts_with_the_first_lead_after_it() {
        let now = Instant::now();
        let mut sweep = Sweep::new(now);
        sweep.start_if_due(now);
        sweep.note_step(Some(lead(5)));

        sweep.request(now);
        assert_eq!((sweep.start_if_due(now), sweep.after()), (true, Some(lead(5))));
        sweep.note_step(None);

        assert_eq!((sweep.start_if_due(now), sweep.after()), (true, None));
    }
}

//! 7 Deliver: the memory of events in flight, and the share of it that the attempts of a project may hold.
//!
//! While all memory is in use, the pull waits, and the events of all tenants with it. An event holds its memory until
//! its deliveries are recorded, and an attempt may take as long as its callback's timeout. So the deliveries of an
//! event are attempted only within the share of its project; beyond the share they are only recorded, for the retries.

use std::sync::Arc;

use contract::ObjectId;
use service_kit::shares::{self, Permit};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// The memory in units; the attempts of one project hold at most half of them. More memory bridges longer pauses of
/// Postgres.
const MAX_UNITS: usize = 1024;
const BYTES_PER_UNIT: usize = 16 * 1024;

/// How many units an event with a payload of this length takes.
fn units(bytes: usize) -> usize {
    (1 + bytes / BYTES_PER_UNIT).min(MAX_UNITS)
}

#[derive(Debug)]
pub(crate) struct EventMemory {
    units: Arc<Semaphore>,
    /// The units of events whose deliveries are attempted.
    attempted: Arc<shares::Pool<ObjectId>>,
}

impl Default for EventMemory {
    fn default() -> Self {
        Self { units: Arc::new(Semaphore::new(MAX_UNITS)), attempted: shares::Pool::new(MAX_UNITS) }
    }
}

/// The units of an event whose deliveries are attempted. They count against its project's share until dropped.
#[derive(Debug)]
pub(crate) struct AttemptedUnits(#[expect(dead_code, reason = "returned when dropped")] Vec<Permit<ObjectId>>);

impl EventMemory {
    /// Waits for the memory of an event with a payload of this length.
    pub(crate) async fn acquire(&self, bytes: usize) -> Result<OwnedSemaphorePermit, AcquireError> {
        self.units.clone().acquire_many_owned(units(bytes) as u32).await
    }

    /// Counts an event against the share of its project. Returns `None` if the share is used up.
    pub(crate) fn attempt(&self, project_id: ObjectId, bytes: usize) -> Option<AttemptedUnits> {
        let permits = (0..units(bytes)).map(|_| self.attempted.try_acquire(project_id).ok());
        permits.collect::<Option<Vec<_>>>().map(AttemptedUnits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attempts_of_a_project_hold_at_most_half_of_the_memory() {
        let [busy, other] = [1, 2].map(|byte| ObjectId::from_bytes([byte; 12]));
        let memory = EventMemory::default();
        let bytes = 65_000;

        let attempted = std::iter::from_fn(|| memory.attempt(busy, bytes)).collect::<Vec<_>>();

        assert_eq!(attempted.len(), MAX_UNITS / 2 / units(bytes));
        assert!(memory.attempt(other, bytes).is_some(), "the rest is left for others");
        drop(attempted);
        assert!(memory.attempt(busy, bytes).is_some());
    }

    #[test]
    fn a_large_event_takes_at_most_all_memory() {
        assert_eq!([0, BYTES_PER_UNIT - 1, BYTES_PER_UNIT, usize::MAX].map(units), [1, 1, 2, MAX_UNITS]);
    }
}

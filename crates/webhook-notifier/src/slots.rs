//! 7 Deliver, 8 Retry: how many attempts may run at once, of one callback and of all, and who is failing.
//!
//! Straight attempts and retries share the slots. Nobody queues behind a slow endpoint: a callback may hold no more of
//! the pool than is still free, so however many endpoints hang, some is left for the next one (the dynamic threshold of
//! switch buffers).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use contract::ObjectId;
use tokio::sync::Notify;

/// An attempt counts once per this many bytes of its body begun, so that the pool bounds memory too. Larger lets large
/// bodies take more memory, smaller makes them wait longer for room.
const BYTES_PER_UNIT: usize = 64 * 1024;

/// How much of the pool an attempt with a body of this length takes.
fn units(bytes: usize) -> i64 {
    1 + (bytes / BYTES_PER_UNIT) as i64
}

/// The attempts under way in this process.
#[derive(Debug)]
pub(crate) struct Slots {
    state: Mutex<State>,
    /// Told when a callback that is not failing may have something to retry at once.
    work: Notify,
}

#[derive(Debug)]
struct State {
    /// What is left of the pool. Below zero while retries turned out larger than expected.
    free: i64,
    callbacks: HashMap<ObjectId, Use>,
}

/// What a callback takes, and how it fares.
#[derive(Debug, Default)]
struct Use {
    attempts: u32,
    units: i64,
    /// Its last attempt failed.
    failing: bool,
    /// More of its deliveries are due in Postgres than it has slots.
    behind: bool,
    freed: Arc<Notify>,
}

impl Use {
    /// Whether one more attempt fits.
    fn fits(&self, free: i64, limit: u32, units: i64) -> bool {
        self.attempts < limit && self.units + units <= free - units
    }

    /// How many more units the callback could take.
    fn share(&self, free: i64) -> i64 {
        ((free - self.units) / 2).max(0)
    }
}

impl Slots {
    /// A pool of this many slots.
    pub(crate) fn new(size: u32) -> Arc<Self> {
        let state = State { free: size.into(), callbacks: HashMap::new() };
        Arc::new(Self { state: Mutex::new(state), work: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a first attempt, within this time. None when the callback's `limit` or share of the pool is used up,
    /// or at once when it is failing: its endpoint is then asked by the retries alone, at their pace.
    pub(crate) async fn take(
        self: &Arc<Self>,
        callback_id: ObjectId,
        limit: u32,
        bytes: usize,
        patience: Duration,
    ) -> Option<Slot> {
        let wait = async {
            loop {
                let freed = {
                    let mut state = self.lock();
                    let free = state.free;
                    let usage = state.callbacks.entry(callback_id).or_default();
                    if usage.failing {
                        return None;
                    }
                    // Whoever is behind keeps a quarter for what waits in Postgres, else it would wait for ever.
                    let limit = if usage.behind { limit - limit.div_ceil(4) } else { limit };
                    let units = units(bytes);
                    if usage.fits(free, limit, units) {
                        usage.attempts += 1;
                        usage.units += units;
                        state.free -= units;
                        return Some(Slot { slots: self.clone(), callback_id, units });
                    }
                    usage.freed.clone()
                };
                freed.notified().await;
            }
        };
        tokio::time::timeout(patience, wait).await.ok().flatten()
    }

    /// Slots for retries: at most `at_most`, and how many bytes of bodies they may have in all.
    pub(crate) fn reserve(self: &Arc<Self>, callback_id: ObjectId, limit: u32, at_most: u32) -> (Vec<Slot>, usize) {
        let mut state = self.lock();
        let free = state.free;
        let usage = state.callbacks.entry(callback_id).or_default();
        let share = usage.share(free);
        let count = limit.saturating_sub(usage.attempts).min(at_most).min(u32::try_from(share).unwrap_or(u32::MAX));
        usage.attempts += count;
        usage.units += i64::from(count);
        state.free -= i64::from(count);
        let slot = || Slot { slots: self.clone(), callback_id, units: 1 };
        let bytes = usize::try_from(share).unwrap_or_default() * BYTES_PER_UNIT;
        ((0..count).map(|_| slot()).collect(), bytes)
    }

    /// Whether the callback's last attempt failed.
    pub(crate) fn is_failing(&self, callback_id: ObjectId) -> bool {
        self.lock().callbacks.get(&callback_id).is_some_and(|usage| usage.failing)
    }

    /// Says how the callback's attempt went.
    pub(crate) fn note(&self, callback_id: ObjectId, failed: bool) {
        let mut state = self.lock();
        let usage = state.callbacks.entry(callback_id).or_default();
        let recovered = usage.failing && !failed;
        usage.failing = failed;
        if recovered {
            self.work.notify_one();
        }
    }

    /// Says whether more of the callback's deliveries are due than it had slots.
    pub(crate) fn note_behind(&self, callback_id: ObjectId, behind: bool) {
        self.lock().callbacks.entry(callback_id).or_default().behind = behind;
    }

    /// Says that a delivery of this callback was spilled to Postgres, due now.
    pub(crate) fn note_spilled(&self, callback_id: ObjectId) {
        if !self.is_failing(callback_id) {
            self.work.notify_one();
        }
    }

    /// Waits until a callback that is not failing may have something to retry at once.
    pub(crate) async fn work(&self) {
        self.work.notified().await;
    }

    fn release(&self, callback_id: ObjectId, units: i64) {
        let mut state = self.lock();
        state.free += units;
        let Some(usage) = state.callbacks.get_mut(&callback_id) else { return };
        usage.attempts -= 1;
        usage.units -= units;
        usage.freed.notify_one();
        if usage.behind && !usage.failing {
            self.work.notify_one();
        }
        // Nothing to remember of it, and nobody waits.
        if usage.attempts == 0 && !usage.failing && !usage.behind && Arc::strong_count(&usage.freed) == 1 {
            state.callbacks.remove(&callback_id);
        }
    }
}

/// The right to run one attempt; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    callback_id: ObjectId,
    units: i64,
}

impl Slot {
    /// Says how large the body is after all.
    pub(crate) fn weigh(&mut self, bytes: usize) {
        let more = units(bytes) - self.units;
        self.units += more;
        let mut state = self.slots.lock();
        state.free -= more;
        if let Some(usage) = state.callbacks.get_mut(&self.callback_id) {
            usage.units += more;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.release(self.callback_id, self.units);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_bytes([byte; 12])
    }

    async fn take(slots: &Arc<Slots>, callback: u8, limit: u32) -> Option<Slot> {
        slots.take(id(callback), limit, 300, Duration::ZERO).await
    }

    #[tokio::test]
    async fn a_callback_gets_no_more_than_its_limit() {
        let slots = Slots::new(100);
        let first = take(&slots, 1, 2).await.unwrap();
        let _second = take(&slots, 1, 2).await.unwrap();
        assert!(take(&slots, 1, 2).await.is_none());
        assert!(take(&slots, 2, 2).await.is_some());
        drop(first);
        assert!(take(&slots, 1, 2).await.is_some());
    }

    #[tokio::test]
    async fn who_waits_gets_the_slot_that_comes_free() {
        let slots = Slots::new(100);
        let held = take(&slots, 1, 1).await.unwrap();
        let (taken, ()) = tokio::join!(slots.take(id(1), 1, 0, Duration::from_secs(5)), async {
            tokio::time::sleep(SOON).await;
            drop(held);
        });
        assert!(taken.is_some());
        assert!(slots.take(id(1), 1, 0, SOON).await.is_none());
    }

    #[tokio::test]
    async fn endpoints_that_hang_always_leave_room_for_another() {
        let slots = Slots::new(512);
        let mut hanging = Vec::new();
        for callback in 1..=7 {
            while let Some(slot) = take(&slots, callback, 1000).await {
                hanging.push(slot);
            }
        }
        assert!(take(&slots, 100, 1000).await.is_some());
        assert!(!slots.reserve(id(101), 64, 64).0.is_empty());
    }

    #[tokio::test]
    async fn large_bodies_count_more_and_everything_is_given_back() {
        let slots = Slots::new(100);
        let large = slots.take(id(1), 64, 40 * BYTES_PER_UNIT, Duration::ZERO).await.unwrap();
        assert_eq!(slots.lock().free, 59);
        assert!(slots.take(id(1), 64, 40 * BYTES_PER_UNIT, Duration::ZERO).await.is_none());
        let (mut reserved, bytes) = slots.reserve(id(2), 64, 10);
        assert_eq!((reserved.len(), bytes), (10, 29 * BYTES_PER_UNIT));
        reserved[0].weigh(3 * BYTES_PER_UNIT);
        assert_eq!(slots.lock().free, 46);
        drop((large, reserved));
        assert_eq!(slots.lock().free, 100);
        assert!(slots.lock().callbacks.is_empty());
    }

    #[tokio::test]
    async fn a_failing_callback_is_left_to_the_retries_until_it_recovers() {
        let slots = Slots::new(100);
        slots.note(id(1), true);
        assert!(take(&slots, 1, 64).await.is_none());
        slots.note_spilled(id(1));
        assert!(slots.work().now_or_never().is_none(), "a failing endpoint is asked at the poll's pace");
        assert_eq!(slots.reserve(id(1), 64, 64).0.len(), 50);
        slots.note(id(1), false);
        assert!(slots.work().now_or_never().is_some());
        assert!(take(&slots, 1, 64).await.is_some());
    }

    #[tokio::test]
    async fn who_is_behind_keeps_a_quarter_for_what_waits() {
        let slots = Slots::new(1000);
        slots.note_behind(id(1), true);
        let mut held = Vec::new();
        while let Some(slot) = take(&slots, 1, 8).await {
            held.push(slot);
        }
        assert_eq!(held.len(), 6);
        assert_eq!(slots.reserve(id(1), 8, 64).0.len(), 2);
        held.pop();
        assert!(slots.work().now_or_never().is_some());
    }
}

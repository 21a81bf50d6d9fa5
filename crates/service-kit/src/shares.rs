//! Pools that all tenants share: a total, and a share of it per holder, for example per project.
//!
//! A holder may have at most as much as is still free: one holder alone gets half of a pool, two get a third each, and
//! however many hold their share, some of the pool is left for the next one. This is the dynamic threshold of shared
//! switch buffers, and needs no configuration per tenant.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// How much more a holder of `own` may take if `free` of the pool is free: half of the difference, so that it then has
/// as much as is free. Rounded up, so that the last unit can be used.
pub fn available(free: i64, own: i64) -> i64 {
    ((free - own).max(0) + 1) / 2
}

/// Why a holder gets no permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct ShareUsed {
    /// How many permits it has; 0 if others have all.
    pub held: usize,
    /// The size of the pool.
    pub total: usize,
}

impl fmt::Display for ShareUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self { held: 0, total } => write!(f, "all {total} are in use"),
            Self { held, total } => write!(f, "this project has {held} of {total}, its current share"),
        }
    }
}

/// A pool of permits with a share per holder.
#[derive(Debug)]
pub struct Pool<K: Hash + Eq> {
    total: usize,
    state: Mutex<State<K>>,
    freed: Notify,
}

#[derive(Debug)]
struct State<K> {
    free: usize,
    /// Only holders that have any.
    held: HashMap<K, usize>,
}

impl<K: Hash + Eq + Copy> Pool<K> {
    /// A pool of `total` permits.
    pub fn new(total: usize) -> Arc<Self> {
        let state = Mutex::new(State { free: total, held: HashMap::new() });
        Arc::new(Self { total, state, freed: Notify::new() })
    }

    /// A permit, if the holder's share allows one more now.
    ///
    /// # Errors
    /// The holder's share is used up, or others hold all permits.
    pub fn try_acquire(self: &Arc<Self>, holder: K) -> Result<Permit<K>, ShareUsed> {
        let mut state = self.lock();
        let own = state.held.get(&holder).copied().unwrap_or_default();
        if available(state.free as i64, own as i64) == 0 {
            return Err(ShareUsed { held: own, total: self.total });
        }
        state.free -= 1;
        state.held.insert(holder, own + 1);
        Ok(Permit { pool: self.clone(), holder })
    }

    /// Waits until the holder's share allows one more. The caller bounds how many wait.
    pub async fn acquire(self: &Arc<Self>, holder: K) -> Permit<K> {
        loop {
            let mut freed = pin!(self.freed.notified());
            // Enabled before the attempt, so that a permit that is returned in between wakes it.
            freed.as_mut().enable();
            match self.try_acquire(holder) {
                Ok(permit) => return permit,
                Err(ShareUsed { .. }) => freed.await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of a pool's permits; returned when dropped.
#[derive(Debug)]
pub struct Permit<K: Hash + Eq + Copy> {
    pool: Arc<Pool<K>>,
    holder: K,
}

impl<K: Hash + Eq + Copy> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.free += 1;
        if let Some(count) = state.held.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                state.held.remove(&self.holder);
            }
        }
        drop(state);
        self.pool.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// How many permits a holder gets at once.
    fn fill(pool: &Arc<Pool<u8>>, holder: u8) -> Vec<Permit<u8>> {
        std::iter::from_fn(|| pool.try_acquire(holder).ok()).collect()
    }

    #[test]
    fn a_holder_gets_as_much_as_is_left_for_others() {
        let pool = Pool::new(16);
        let first = fill(&pool, 1);
        assert_eq!(first.len(), 8);
        assert_eq!(pool.try_acquire(1).unwrap_err(), ShareUsed { held: 8, total: 16 });
        let second = fill(&pool, 2);
        assert_eq!(second.len(), 4);
        assert!(pool.try_acquire(1).is_err(), "its share shrinks while others hold theirs");

        drop(first);
        assert_eq!(fill(&pool, 2).len(), 4, "and grows when they return theirs");
        drop(second);
        assert!(pool.lock().held.is_empty() && pool.lock().free == 16);
    }

    #[test]
    fn small_pools_are_used_whole() {
        assert_eq!(fill(&Pool::new(1), 1).len(), 1);
        assert_eq!(fill(&Pool::new(0), 1).len(), 0);
        let pool = Pool::new(2);
        let (_one, _two) = (pool.try_acquire(1).unwrap(), pool.try_acquire(2).unwrap());
        let refused = pool.try_acquire(3).unwrap_err();
        assert_eq!((refused.held, refused.to_string().as_str()), (0, "all 2 are in use"));
    }

    #[test]
    fn a_wait_ends_when_a_permit_is_returned() {
        let pool = Pool::new(2);
        let held = fill(&pool, 1);
        let mut waits = Box::pin(pool.acquire(1));
        assert!(waits.as_mut().now_or_never().is_none());
        assert!(pool.acquire(2).now_or_never().is_some(), "another holder does not wait");
        drop(held);
        assert!(waits.now_or_never().is_some());
    }

    proptest! {
        #[test]
        fn a_newcomer_is_admitted_while_anything_is_free(
            total in 1_usize..200, requests in prop::collection::vec(0_u8..6, 0..400),
        ) {
            let pool = Pool::new(total);
            let permits: Vec<_> = requests.iter().filter_map(|&holder| pool.try_acquire(holder).ok()).collect();
            prop_assert!(permits.len() <= total);
            let most = pool.lock().held.values().copied().max().unwrap_or_default();
            prop_assert!(most <= total.div_ceil(2));
            prop_assert_eq!(pool.try_acquire(9).is_ok(), permits.len() < total);
        }

        #[test]
        fn a_holder_keeps_at_most_as_much_as_stays_free(free in 0_i64..2000, own in 0_i64..2000) {
            let more = available(free, own);
            prop_assert!(more == 0 || own + more <= free - more + 1, "one unit of rounding");
        }
    }
}

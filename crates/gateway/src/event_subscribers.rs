//! 1 Accept: the clients that follow events, bounded in total and per API key.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use contract::ObjectId;
use tokio_util::sync::CancellationToken;

/// The part of all subscribers that a single key may have.
const SHARE: usize = 4;

#[derive(Debug)]
pub(crate) struct EventSubscribers {
    max: usize,
    /// How many each key has; only keys that have any.
    per_key: Mutex<HashMap<ObjectId, usize>>,
    /// Ends all streams.
    stopping: CancellationToken,
}

impl EventSubscribers {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, per_key: Mutex::default(), stopping: CancellationToken::new() }
    }

    /// Ends all streams and admits no more.
    pub(crate) fn stop(&self) {
        self.stopping.cancel();
    }

    /// Completes when all streams must end.
    pub(crate) async fn stopped(&self) {
        self.stopping.cancelled().await;
    }

    /// Admits one more subscriber of this key, if there is room.
    pub(crate) fn acquire(self: &Arc<Self>, key_id: ObjectId) -> Option<SubscriberPermit> {
        let mut per_key = self.per_key.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = per_key.values().sum();
        let of_key = per_key.get(&key_id).copied().unwrap_or_default();
        if total >= self.max || of_key >= self.max.div_ceil(SHARE) || self.stopping.is_cancelled() {
            return None;
        }
        per_key.insert(key_id, of_key + 1);
        Some(SubscriberPermit { subscribers: self.clone(), key_id })
    }
}

/// A place among the subscribers, released when dropped.
#[derive(Debug)]
pub(crate) struct SubscriberPermit {
    subscribers: Arc<EventSubscribers>,
    key_id: ObjectId,
}

impl Drop for SubscriberPermit {
    fn drop(&mut self) {
        let mut per_key = self.subscribers.per_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = per_key.get_mut(&self.key_id) {
            *count -= 1;
            if *count == 0 {
                per_key.remove(&self.key_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRM: ObjectId = ObjectId::from_bytes([1; 12]);
    const IMPORT: ObjectId = ObjectId::from_bytes([2; 12]);

    #[test]
    fn subscribers_are_bounded_in_total_and_per_key() {
        let subscribers = Arc::new(EventSubscribers::new(8));
        let held = [CRM, CRM].map(|key_id| subscribers.acquire(key_id).unwrap());
        assert!(subscribers.acquire(CRM).is_none(), "a quarter");
        let others = (2..8).map(|n| subscribers.acquire(ObjectId::from_bytes([n / 2 + 1; 12]))).collect::<Vec<_>>();
        assert!(others.iter().all(Option::is_some));
        assert!(subscribers.acquire(ObjectId::from_bytes([9; 12])).is_none(), "all");

        drop((held, others));
        assert!(subscribers.per_key.lock().unwrap().is_empty());

        let _held = subscribers.acquire(IMPORT).unwrap();
        subscribers.stop();
        assert!(subscribers.acquire(CRM).is_none());
    }
}

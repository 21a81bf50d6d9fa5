//! 1 Accept: records when each API key was last used, so that unused keys can be found and revoked. Requests record
//! uses in memory; a task writes new uses to the bucket `key_uses`
//! ([ADR 61](../../../docs/adr/0061-record-the-last-use-of-api-keys.md)).

use std::{
    collections::HashMap,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use async_nats::jetstream::{
    self,
    kv::{Store, UpdateErrorKind},
};
use contract::{ObjectId, Timestamp, streams::KEY_USES};
use futures::StreamExt;
use service_kit::nats::bucket;

/// How often new uses are written. A gateway that crashes loses the uses since the last write.
pub(crate) const WRITE_INTERVAL: Duration = Duration::from_secs(10);
/// How long writing all new uses may take. A gateway that stops waits for the last write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How many keys are written at once.
const WRITES: usize = 32;
const MINUTE_MS: i64 = 60_000;

/// The minute of the last use of each key that was used since the start.
#[derive(Debug, Default)]
pub(crate) struct KeyUses(RwLock<HashMap<ObjectId, KeyUse>>);

/// Both in milliseconds.
#[derive(Debug)]
struct KeyUse {
    last: AtomicI64,
    /// The bucket has this time or a later one.
    written: AtomicI64,
}

impl KeyUses {
    /// Records a use, rounded down to the minute, so that each key is written at most once a minute.
    pub(crate) fn record(&self, key_id: ObjectId, now: Timestamp) {
        let minute = now.millis().div_euclid(MINUTE_MS) * MINUTE_MS;
        if let Some(known) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key_id) {
            known.last.fetch_max(minute, Ordering::Relaxed);
            return;
        }
        let mut uses = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let new = || KeyUse { last: AtomicI64::new(minute), written: AtomicI64::new(0) };
        uses.entry(key_id).or_insert_with(new).last.fetch_max(minute, Ordering::Relaxed);
    }

    /// Writes new uses. Uses that cannot be written are kept for the next write.
    pub(crate) async fn write(&self, js: &jetstream::Context) {
        match tokio::time::timeout(WRITE_TIMEOUT, self.write_to(js)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!("the last uses of API keys cannot be written yet: {e:#}"),
            Err(_) => tracing::warn!("the last uses of API keys cannot be written yet: no answer in {WRITE_TIMEOUT:?}"),
        }
    }

    async fn write_to(&self, js: &jetstream::Context) -> anyhow::Result<()> {
        let unwritten = self.unwritten();
        if unwritten.is_empty() {
            return Ok(());
        }
        let store = bucket(js, KEY_USES).await?;
        let store = &store;
        let writes = futures::stream::iter(unwritten).map(|(key_id, minute)| async move {
            if write_later(store, key_id, minute).await? {
                self.set_written(key_id, minute);
            }
            anyhow::Ok(())
        });
        // A failed write does not stop the others.
        let results: Vec<_> = writes.buffer_unordered(WRITES).collect().await;
        results.into_iter().collect()
    }

    fn unwritten(&self) -> Vec<(ObjectId, i64)> {
        let uses = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let times = uses.iter().map(|(key_id, KeyUse { last, written })| {
            (*key_id, last.load(Ordering::Relaxed), written.load(Ordering::Relaxed))
        });
        times.filter(|(_, last, written)| last > written).map(|(key_id, last, _)| (key_id, last)).collect()
    }

    fn set_written(&self, key_id: ObjectId, minute: i64) {
        if let Some(known) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key_id) {
            known.written.fetch_max(minute, Ordering::Relaxed);
        }
    }
}

/// Writes a use, unless the bucket has this time or a later one, for example from another gateway. Returns whether the
/// bucket has it now; false if another gateway wrote at the same moment.
async fn write_later(store: &Store, key_id: ObjectId, minute: i64) -> anyhow::Result<bool> {
    let key = key_id.to_string();
    let entry = store.entry(&key).await.context("cannot read an entry")?;
    let (stored, revision) = entry.map_or((None, 0), |entry| {
        (serde_json::from_slice::<Timestamp>(&entry.value).ok().map(Timestamp::millis), entry.revision)
    });
    if stored.is_some_and(|stored| stored >= minute) {
        return Ok(true);
    }
    let value = serde_json::to_vec(&Timestamp::from_millis(minute))?;
    match store.update(&key, value.into(), revision).await {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
        Err(e) => Err(e).context("cannot write an entry"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_written_once_a_minute_and_never_with_an_earlier_time() {
        let (uses, key) = (KeyUses::default(), ObjectId::from_bytes([1; 12]));
        let record = |millis| {
            uses.record(key, Timestamp::from_millis(millis));
            let unwritten = uses.unwritten();
            unwritten.iter().for_each(|(key_id, minute)| uses.set_written(*key_id, *minute));
            unwritten
        };

        assert_eq!(record(120_001), [(key, 120_000)]);
        assert_eq!(record(179_999), []);
        assert_eq!(record(60_000), []);
        assert_eq!(record(180_000), [(key, 180_000)]);
    }
}

//! A copy of a bucket in memory that follows the bucket's changes.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context;
use async_nats::jetstream::{
    self,
    kv::{Operation, Store},
};
use contract::json::redacted_error;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::{
    health::Readiness,
    nats::{bucket, retry_backoff},
};

/// How long the watch may be silent before its progress is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The entries of a bucket, by key, in memory.
#[derive(Debug)]
pub struct BucketCache<T> {
    /// None until the whole bucket was read once.
    entries: RwLock<Option<HashMap<String, Arc<T>>>>,
}

impl<T> Default for BucketCache<T> {
    fn default() -> Self {
        Self { entries: RwLock::default() }
    }
}

/// A complete cache that follows no bucket.
impl<T> FromIterator<(String, T)> for BucketCache<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(entries: I) -> Self {
        let entries = entries.into_iter().map(|(key, value)| (key, Arc::new(value))).collect();
        Self { entries: RwLock::new(Some(entries)) }
    }
}

impl<T: DeserializeOwned> BucketCache<T> {
    /// The entry under this key.
    pub fn get(&self, key: &str) -> Option<Arc<T>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).as_ref()?.get(key).cloned()
    }

    /// Whether the whole bucket was read. Until then, a missing entry may exist in the bucket.
    pub fn is_complete(&self) -> bool {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// All entries, in any order.
    pub fn all(&self) -> Vec<Arc<T>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.iter().flat_map(HashMap::values).cloned().collect()
    }

    /// Follows a bucket until shutdown. `readiness` waits for the first complete read. After a lost connection the
    /// entries stay until the bucket has been read again.
    pub async fn follow(
        &self,
        js: &jetstream::Context,
        name: &'static str,
        readiness: Readiness,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        readiness.not_ready(name, "not read yet");
        let follow = async {
            for delay in retry_backoff() {
                let store = bucket(js, name).await?;
                match self.watch(&store, || readiness.ready(name)).await {
                    Ok(()) => tracing::debug!(bucket = name, "the watch ended; restarting it"),
                    Err(e) => tracing::warn!(bucket = name, "the watch failed; restarting it: {e:#}"),
                }
                tokio::time::sleep(delay).await;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            followed = follow => followed,
            () = shutdown.cancelled() => Ok(()),
        }
    }

    /// Reads the whole bucket, then its changes, until the watch ends. Fails if the watch has missed changes.
    async fn watch(&self, store: &Store, mut on_complete: impl FnMut()) -> anyhow::Result<()> {
        let last = store.stream.get_info().await.context("cannot read the bucket's state")?.state.last_sequence;
        let mut watch = store.watch_with_history(">").await.context("cannot watch the bucket")?;
        let mut fresh = Some(HashMap::new());
        let (mut seen, mut received) = (0, 0);
        if last == 0 {
            self.replace(fresh.take().unwrap_or_default());
            on_complete();
        }
        loop {
            let entry = match tokio::time::timeout(CHECK_INTERVAL, watch.next()).await {
                Ok(Some(entry)) => entry.context("the watch failed")?,
                Ok(None) => return Ok(()),
                Err(_) => {
                    // A watch falls silent when the bucket is deleted and created again.
                    let state = store.stream.get_info().await.context("cannot read the bucket's state")?.state;
                    let is_whole = fresh.is_none() || received >= state.messages;
                    if state.last_sequence != seen.max(last) || !is_whole {
                        anyhow::bail!("the bucket is at {}, the watch at {seen}", state.last_sequence);
                    }
                    if let Some(fresh) = fresh.take() {
                        self.replace(fresh);
                        on_complete();
                    }
                    continue;
                }
            };
            (seen, received) = (entry.revision, received + 1);
            let value = match entry.operation {
                Operation::Put => match serde_json::from_slice(&entry.value) {
                    Ok(value) => Some(Arc::new(value)),
                    Err(e) => {
                        tracing::error!(bucket = %entry.bucket, key = %entry.key, "entry cannot be read: {}", redacted_error(&e));
                        None
                    }
                },
                Operation::Delete | Operation::Purge => None,
            };
            match &mut fresh {
                Some(fresh) => change(fresh, entry.key, value),
                None => {
                    let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
                    change(entries.get_or_insert_default(), entry.key, value);
                }
            }
            if seen >= last
                && let Some(fresh) = fresh.take()
            {
                self.replace(fresh);
                on_complete();
            }
        }
    }

    fn replace(&self, entries: HashMap<String, Arc<T>>) {
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = Some(entries);
    }
}

fn change<T>(entries: &mut HashMap<String, Arc<T>>, key: String, value: Option<Arc<T>>) {
    match value {
        Some(value) => entries.insert(key, value),
        None => entries.remove(&key),
    };
}

//! Configuration on its way from Postgres to the buckets that gateway and webhook-notifier watch.

use std::collections::HashSet;

use anyhow::{Context as _, bail};
use async_nats::jetstream::{
    self,
    kv::{Operation, Store},
};
use contract::{
    ObjectId,
    streams::{API_KEYS, PROCESSES},
    subject::process_key,
};
use futures::TryStreamExt;
use serde::Serialize;
use service_kit::nats::bucket;
use sqlx::PgPool;

use crate::store::config;

/// How often a lost race for an entry is run again.
const ATTEMPTS: usize = 16;

/// Projects configuration. Any number of them may run: each reads the entry's revision, then the row, then writes the
/// entry if it is still at that revision. So an older row never replaces a newer one.
#[derive(Debug)]
pub(crate) struct Projector {
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
}

impl Projector {
    /// Projects a process.
    pub(crate) async fn process(&self, project_id: ObjectId, name: &str) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, PROCESSES).await?;
        for _ in 0..ATTEMPTS {
            let Some(current) = config::current_process(&self.pool, project_id, name).await? else { return Ok(()) };
            let key = process_key(project_id, current.process_id);
            let revision = entry_revision(&bucket, &key).await?;
            let Some(process) = config::current_process(&self.pool, project_id, name).await? else { return Ok(()) };
            if put(&bucket, &key, &process, revision).await? {
                config::process_projected(&self.pool, project_id, name, process.revision).await?;
                return Ok(());
            }
        }
        bail!("the entry of process {name:?} in the bucket {PROCESSES} changes all the time")
    }

    /// Projects an API key.
    pub(crate) async fn key(&self, sha256: &str) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, API_KEYS).await?;
        for _ in 0..ATTEMPTS {
            let revision = entry_revision(&bucket, sha256).await?;
            let Some((key, key_revision)) = config::key(&self.pool, sha256).await? else { return Ok(()) };
            if put(&bucket, sha256, &key, revision).await? {
                config::key_projected(&self.pool, sha256, key_revision).await?;
                return Ok(());
            }
        }
        bail!("an entry in the bucket {API_KEYS} changes all the time")
    }

    /// Projects what has not reached its bucket, or everything.
    pub(crate) async fn project_pending(&self, everything: bool) -> anyhow::Result<()> {
        for (project_id, name) in config::processes_to_project(&self.pool, everything).await? {
            self.process(project_id, &name).await?;
        }
        for sha256 in config::keys_to_project(&self.pool, everything).await? {
            self.key(&sha256).await?;
        }
        if everything {
            self.forget_keys().await?;
        }
        Ok(())
    }

    /// Takes keys out of their bucket that Postgres does not have, for it was restored to a state from before them: nobody
    /// could see or revoke them. A row is there before its entry, so an entry without one is not on its way.
    async fn forget_keys(&self) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, API_KEYS).await?;
        let subjects = bucket.stream.info_with_subjects(format!("{}>", bucket.prefix)).await;
        let subjects: Vec<_> = subjects.context("cannot list a bucket")?.try_collect().await?;
        let known: HashSet<_> = config::keys_to_project(&self.pool, true).await?.into_iter().collect();
        let listed = subjects.iter().filter_map(|(subject, _)| subject.strip_prefix(&bucket.prefix));
        for sha256 in listed.filter(|sha256| !known.contains(*sha256)) {
            let entry = bucket.entry(sha256).await.context("cannot read a bucket's entry")?;
            let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else { continue };
            let deleted = bucket.delete_expect_revision(sha256, Some(entry.revision)).await;
            deleted.context("cannot delete a bucket's entry")?;
            tracing::warn!(sha256, "an API key that Postgres does not know is not valid any more");
        }
        Ok(())
    }
}

/// The revision of an entry; 0 if there is none, or it was deleted.
async fn entry_revision(bucket: &Store, key: &str) -> anyhow::Result<u64> {
    let entry = bucket.entry(key).await.context("cannot read a bucket's entry")?;
    Ok(entry.map_or(0, |entry| entry.revision))
}

/// Writes an entry if it is still at this revision.
async fn put<T: Serialize>(bucket: &Store, key: &str, value: &T, revision: u64) -> anyhow::Result<bool> {
    use async_nats::jetstream::kv::UpdateErrorKind;
    let value = serde_json::to_vec(value)?;
    match bucket.update(key, value.into(), revision).await {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
        Err(e) => Err(e).context("cannot write a bucket's entry"),
    }
}

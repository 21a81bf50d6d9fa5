//! Projects configuration from Postgres into the NATS buckets that the gateway and the webhook-notifier watch.

use std::collections::HashSet;

use anyhow::{Context as _, bail};
use async_nats::jetstream::{
    self,
    kv::{Operation, Store},
};
use contract::{
    ObjectId,
    rpc::RpcError,
    streams::{API_KEYS, PROCESSES},
    subject::process_key,
};
use futures::TryStreamExt;
use serde::Serialize;
use service_kit::nats::bucket;
use sqlx::PgPool;

use crate::store::{self, api_keys, processes};

/// Attempts to write an entry that others write concurrently.
const ATTEMPTS: usize = 16;

/// Projects configuration. Any number of them may run: each reads the entry's revision, then the row, then writes the
/// entry if it is still at that revision. So an older row never replaces a newer one.
#[derive(Debug)]
pub(crate) struct Projector {
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
}

impl Projector {
    pub(crate) async fn project_process(&self, project_id: ObjectId, name: &str) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, PROCESSES).await?;
        for _ in 0..ATTEMPTS {
            let Some(current) = processes::find_by_name(&self.pool, project_id, name).await? else { return Ok(()) };
            let key = process_key(project_id, current.process_id);
            let revision = entry_revision(&bucket, &key).await?;
            let Some(process) = processes::find_by_name(&self.pool, project_id, name).await? else { return Ok(()) };
            if put(&bucket, &key, &process, revision).await? {
                let mut connection = store::acquire(&self.pool).await?;
                processes::set_projected(&mut connection, project_id, name, process.revision).await?;
                return Ok(());
            }
        }
        bail!("cannot write process {name:?} to the bucket {PROCESSES}: another writer won {ATTEMPTS} times in a row")
    }

    pub(crate) async fn project_key(&self, sha256: &str) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, API_KEYS).await?;
        for _ in 0..ATTEMPTS {
            let revision = entry_revision(&bucket, sha256).await?;
            let Some((key, key_revision)) = api_keys::find(&self.pool, sha256).await? else { return Ok(()) };
            if put(&bucket, sha256, &key, revision).await? {
                api_keys::set_projected(&mut *store::acquire(&self.pool).await?, sha256, key_revision).await?;
                return Ok(());
            }
        }
        bail!("cannot write an API key to the bucket {API_KEYS}: another writer won {ATTEMPTS} times in a row")
    }

    /// Projects the revisions that are not projected yet, or everything.
    pub(crate) async fn project_pending(&self, everything: bool) -> anyhow::Result<()> {
        for (project_id, name) in processes::list_to_project(&self.pool, everything).await? {
            self.project_process(project_id, &name).await?;
        }
        for sha256 in api_keys::list_to_project(&self.pool, everything).await? {
            self.project_key(&sha256).await?;
        }
        if everything {
            self.remove_unknown_keys().await?;
        }
        Ok(())
    }

    /// Removes keys from the bucket that are not in Postgres, because it was restored to a state from before they were
    /// created: they could be neither listed nor revoked. Rows are inserted before their entries, so such an entry is
    /// not a new one.
    async fn remove_unknown_keys(&self) -> anyhow::Result<()> {
        let bucket = bucket(&self.js, API_KEYS).await?;
        let subjects = bucket.stream.info_with_subjects(format!("{}>", bucket.prefix)).await;
        let subjects: Vec<_> = subjects.context("cannot list a bucket")?.try_collect().await?;
        let stored: HashSet<_> = api_keys::list_to_project(&self.pool, true).await?.into_iter().collect();
        let listed = subjects.iter().filter_map(|(subject, _)| subject.strip_prefix(&bucket.prefix));
        for sha256 in listed.filter(|sha256| !stored.contains(*sha256)) {
            let entry = bucket.entry(sha256).await.context("cannot read a bucket's entry")?;
            let Some(entry) = entry.filter(|entry| entry.operation == Operation::Put) else { continue };
            let deleted = bucket.delete_expect_revision(sha256, Some(entry.revision)).await;
            deleted.context("cannot delete a bucket's entry")?;
            tracing::warn!(sha256, "removed an API key that is not in Postgres");
        }
        Ok(())
    }
}

/// The answer to a change that is stored but not projected: the leader projects it later.
pub(crate) fn not_projected(change: &str, error: &anyhow::Error) -> RpcError {
    tracing::error!("cannot project {change}: {error:#}");
    let message = format!(
        "{change} is stored, but not in effect yet, because NATS is unavailable; it takes effect \
         within seconds of its return"
    );
    RpcError::new(503, "not_projected", message)
}

/// The revision of an entry; 0 if it is absent or deleted.
async fn entry_revision(bucket: &Store, key: &str) -> anyhow::Result<u64> {
    let entry = bucket.entry(key).await.context("cannot read a bucket's entry")?;
    Ok(entry.map_or(0, |entry| entry.revision))
}

/// Writes an entry if it is still at this revision. Returns whether it was.
async fn put<T: Serialize>(bucket: &Store, key: &str, value: &T, revision: u64) -> anyhow::Result<bool> {
    use async_nats::jetstream::kv::UpdateErrorKind;
    let value = serde_json::to_vec(value)?;
    match bucket.update(key, value.into(), revision).await {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
        Err(e) => Err(e).context("cannot write a bucket's entry"),
    }
}

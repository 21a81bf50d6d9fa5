//! Projects configuration from Postgres into the NATS buckets that the gateway and the webhook-notifier watch.

use std::collections::HashSet;

use anyhow::Context as _;
use async_nats::jetstream::{
    self,
    kv::{Operation, Store},
};
use contract::{
    ObjectId,
    rpc::{ErrorCode, RpcError},
    streams::{API_KEYS, PROCESSES},
    subject::process_key,
};
use futures::TryStreamExt;
use serde::Serialize;
use service_kit::{
    nats::{bucket, error_chain},
    postgres::Pool,
};

use crate::store::{self, StoreError, api_keys, processes};

/// Attempts to write an entry that others write concurrently.
const ATTEMPTS: usize = 16;
/// The bytes of a bucket's message in addition to the value: subject and headers.
const HEADER_ROOM: usize = 1024;

/// Why an entry is not in its bucket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProjectionError {
    /// NATS did not answer: every entry would fail.
    #[error("NATS is unavailable: {0:#}")]
    Nats(anyhow::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it has {bytes} bytes, and NATS takes messages of at most {limit} (max_payload)")]
    TooLarge { bytes: usize, limit: usize },
    #[error("another writer won {ATTEMPTS} times in a row")]
    Contended,
    #[error("it cannot be serialized: {0}")]
    Serialization(#[from] serde_json::Error),
}

impl ProjectionError {
    /// Whether other entries cannot be projected either.
    fn concerns_all(&self) -> bool {
        match self {
            Self::Nats(_) | Self::Store(StoreError::Unavailable(_)) => true,
            Self::Store(_) | Self::TooLarge { .. } | Self::Contended | Self::Serialization(_) => false,
        }
    }
}

fn nats(context: &'static str) -> impl Fn(anyhow::Error) -> ProjectionError {
    move |e| ProjectionError::Nats(e.context(context))
}

/// Projects configuration. Any number of projectors may run: each reads the entry's revision, then the row, then writes
/// the entry if it is still at that revision. So an older row never replaces a newer one.
#[derive(Debug)]
pub(crate) struct Projector {
    pub(crate) pool: Pool,
    pub(crate) js: jetstream::Context,
}

impl Projector {
    pub(crate) async fn project_process(&self, project_id: ObjectId, name: &str) -> Result<(), ProjectionError> {
        let bucket = self.bucket(PROCESSES).await?;
        for _ in 0..ATTEMPTS {
            let Some(current) = processes::find_by_name(&self.pool, project_id, name).await? else { return Ok(()) };
            let key = process_key(project_id, current.process_id);
            let revision = entry_revision(&bucket, &key).await?;
            let Some(process) = processes::find_by_name(&self.pool, project_id, name).await? else { return Ok(()) };
            if self.put(&bucket, &key, &process, revision).await? {
                let mut connection = store::acquire(&self.pool).await?;
                processes::set_projected(&mut connection, project_id, name, process.revision).await?;
                return Ok(());
            }
        }
        Err(ProjectionError::Contended)
    }

    pub(crate) async fn project_key(&self, sha256: &str) -> Result<(), ProjectionError> {
        let bucket = self.bucket(API_KEYS).await?;
        for _ in 0..ATTEMPTS {
            let revision = entry_revision(&bucket, sha256).await?;
            let Some((key, key_revision)) = api_keys::find(&self.pool, sha256).await? else { return Ok(()) };
            if self.put(&bucket, sha256, &key, revision).await? {
                api_keys::set_projected(&mut store::acquire(&self.pool).await?, sha256, key_revision).await?;
                return Ok(());
            }
        }
        Err(ProjectionError::Contended)
    }

    /// Projects the revisions that are not projected yet, or everything. An entry that cannot be projected does not
    /// hold up the others. Keys come first: without them every request is refused.
    ///
    /// # Errors
    /// The first error. All other entries are projected, unless none can be.
    pub(crate) async fn project_pending(&self, everything: bool) -> Result<(), ProjectionError> {
        let mut failed = None;
        for sha256 in api_keys::list_to_project(&self.pool, everything).await? {
            let projected = self.project_key(&sha256).await;
            keep_first(&mut failed, projected, || format!("the API key with the hash {sha256}"))?;
        }
        if everything {
            self.remove_unknown_keys().await.map_err(ProjectionError::Nats)?;
        }
        for (project_id, name) in processes::list_to_project(&self.pool, everything).await? {
            let projected = self.project_process(project_id, &name).await;
            keep_first(&mut failed, projected, || format!("process {name:?} of project {project_id}"))?;
        }
        failed.map_or(Ok(()), Err)
    }

    async fn bucket(&self, name: &'static str) -> Result<Store, ProjectionError> {
        bucket(&self.js, name).await.map_err(ProjectionError::Nats)
    }

    /// Writes an entry if it is still at this revision. Returns whether it was.
    async fn put<T: Serialize>(
        &self,
        bucket: &Store,
        key: &str,
        value: &T,
        revision: u64,
    ) -> Result<bool, ProjectionError> {
        use async_nats::jetstream::kv::UpdateErrorKind;
        let value = serde_json::to_vec(value)?;
        // The NATS client does not send a larger message, and does not report why.
        let limit = self.js.client().server_info().max_payload.saturating_sub(HEADER_ROOM);
        if value.len() > limit {
            return Err(ProjectionError::TooLarge { bytes: value.len(), limit });
        }
        match bucket.update(key, value.into(), revision).await {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == UpdateErrorKind::WrongLastRevision => Ok(false),
            Err(e) => Err(nats("cannot write a bucket's entry")(e.into())),
        }
    }

    /// Removes keys from the bucket that Postgres does not contain, because it was restored to a state before their
    /// creation: they could be neither listed nor revoked. Rows are inserted before their entries, so an entry without
    /// a row is not new.
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

/// Logs that an entry is not projected, and keeps the first error. Fails if the next entries would fail as well.
fn keep_first(
    failed: &mut Option<ProjectionError>,
    projected: Result<(), ProjectionError>,
    entry: impl FnOnce() -> String,
) -> Result<(), ProjectionError> {
    let Err(e) = projected else { return Ok(()) };
    if e.concerns_all() {
        return Err(e);
    }
    tracing::error!("cannot project {}: {}", entry(), error_chain(&e));
    failed.get_or_insert(e);
    Ok(())
}

/// The error for a change that is stored but not projected. The leader projects it later: it tries every few seconds.
pub(crate) fn not_projected(change: &str, error: &ProjectionError) -> RpcError {
    tracing::error!("cannot project {change}: {}", error_chain(error));
    let remedy = match error {
        ProjectionError::Nats(_) | ProjectionError::Store(StoreError::Unavailable(_)) => {
            "it takes effect within seconds after it is available again"
        }
        ProjectionError::Contended => "it takes effect within seconds",
        ProjectionError::TooLarge { .. } => "raise max_payload of NATS, or make it smaller",
        ProjectionError::Store(_) | ProjectionError::Serialization(_) => "see the log of lead-state",
    };
    let reason = match error {
        // The details are in the log.
        ProjectionError::Nats(_) => "NATS is unavailable".into(),
        ProjectionError::Store(StoreError::Unavailable(_)) => "the database is unavailable".into(),
        ProjectionError::Store(_) => "its row cannot be read".into(),
        e => e.to_string(),
    };
    RpcError::new(ErrorCode::NotProjected, format!("{change} is stored, but not in effect yet: {reason}; {remedy}"))
}

/// The revision of an entry; 0 if it is absent or deleted.
async fn entry_revision(bucket: &Store, key: &str) -> Result<u64, ProjectionError> {
    let entry = bucket.entry(key).await.map_err(|e| nats("cannot read a bucket's entry")(e.into()))?;
    Ok(entry.map_or(0, |entry| entry.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_the_reason_why_a_change_is_not_projected() {
        for (error, message) in [
            (
                ProjectionError::Nats(anyhow::anyhow!("timed out")),
                "the key is stored, but not in effect yet: NATS is unavailable; it takes effect within seconds after it is available again",
            ),
            (
                ProjectionError::TooLarge { bytes: 5000, limit: 4096 },
                "the key is stored, but not in effect yet: it has 5000 bytes, and NATS takes messages of at most 4096 \
                 (max_payload); raise max_payload of NATS, or make it smaller",
            ),
            (
                ProjectionError::Contended,
                "the key is stored, but not in effect yet: another writer won 16 times in a row; it takes effect within \
                 seconds",
            ),
        ] {
            let answer = not_projected("the key", &error);
            assert_eq!((answer.status, answer.message.as_str()), (503, message));
        }
    }

    #[test]
    fn an_entry_that_cannot_be_projected_holds_up_no_other() {
        let mut failed = None;
        let mut keep = |projected| keep_first(&mut failed, projected, || "process p".into());
        assert!(keep(Ok(())).is_ok());
        assert!(keep(Err(ProjectionError::TooLarge { bytes: 2, limit: 1 })).is_ok());
        assert!(keep(Err(ProjectionError::Contended)).is_ok());
        assert!(keep(Err(ProjectionError::Nats(anyhow::anyhow!("timed out")))).is_err(), "every entry would fail");
        assert!(matches!(failed, Some(ProjectionError::TooLarge { .. })), "the first is kept");
    }
}

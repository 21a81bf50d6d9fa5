//! Records the verdicts of audits, and reads them. See [`contract::audit`].

use anyhow::Context;
use async_nats::jetstream::{
    self,
    kv::{Operation, Store, UpdateErrorKind},
};
use contract::{
    ObjectId,
    audit::{AuditRecord, keys, latest},
    streams::AUDITS,
};
use futures::{StreamExt, TryStreamExt, stream};

/// How many entries are read at once.
const READS: usize = 16;
/// How many times a verdict is written while other audits are recorded at the same moment.
const ATTEMPTS: usize = 20;

/// Records a verdict as the one [after](AuditRecord::after) the last. Returns false if the last one stays.
///
/// # Errors
/// The bucket does not exist, or cannot be read or written; or each attempt met another audit that was recorded.
pub async fn record_audit(js: &jetstream::Context, record: &AuditRecord) -> anyhow::Result<bool> {
    let bucket = bucket(js).await?;
    let key = record.key();
    for _ in 0..ATTEMPTS {
        let entry = bucket.entry(&key).await.with_context(|| format!("cannot read the audit {key}"))?;
        let (known, revision) = match entry {
            Some(entry) if entry.operation == Operation::Put => (Some(parse(&key, &entry.value)?), entry.revision),
            Some(deleted) => (None, deleted.revision),
            None => (None, 0),
        };
        let next = known.map_or_else(|| Some(record.clone()), |known| record.after(&known));
        let Some(next) = next else { return Ok(false) };
        let value = serde_json::to_vec(&next).context("cannot write the verdict as JSON")?;
        match bucket.update(&key, value.into(), revision).await {
            // Another audit was recorded in between.
            Err(e) if e.kind() == UpdateErrorKind::WrongLastRevision => {}
            written => return written.map(|_| true).context("cannot write the verdict"),
        }
    }
    anyhow::bail!("cannot record the verdict: {ATTEMPTS} attempts met another audit; run the audit again")
}

/// The last audits of a project, the latest first. `with_those_of_all` adds the audits of all projects.
///
/// # Errors
/// The bucket does not exist or cannot be read.
pub async fn audits_of(
    js: &jetstream::Context,
    project_id: ObjectId,
    with_those_of_all: bool,
) -> anyhow::Result<Vec<AuditRecord>> {
    let of_all = with_those_of_all.then(|| keys(None)).into_iter().flatten();
    read_all(&bucket(js).await?, keys(Some(project_id)).into_iter().chain(of_all).collect()).await
}

/// The last audits of all scopes, the latest first, with at most `max_entries` entries of projects. Also returns how
/// many entries were left out.
///
/// # Errors
/// The bucket does not exist or cannot be read.
pub async fn all_audits(js: &jetstream::Context, max_entries: usize) -> anyhow::Result<(Vec<AuditRecord>, usize)> {
    let bucket = bucket(js).await?;
    let prefix = format!("$KV.{AUDITS}.");
    let subjects = bucket.stream.info_with_subjects(format!("{prefix}>")).await.context("cannot list the audits")?;
    let key = |(subject, _): (String, _)| subject.strip_prefix(&prefix).map(str::to_owned);
    let listed = subjects.try_filter_map(async |subject| Ok(key(subject))).try_collect::<Vec<_>>().await;
    let of_all = keys(None);
    let mut of_projects = listed.context("cannot list the audits")?;
    of_projects.retain(|key| !of_all.contains(key));
    let left_out = of_projects.len().saturating_sub(max_entries);
    of_projects.truncate(max_entries);
    Ok((read_all(&bucket, of_all.into_iter().chain(of_projects).collect()).await?, left_out))
}

async fn bucket(js: &jetstream::Context) -> anyhow::Result<Store> {
    js.get_key_value(AUDITS).await.context("cannot find the bucket of audits, which lead-state creates when it starts")
}

async fn read_all(bucket: &Store, keys: Vec<String>) -> anyhow::Result<Vec<AuditRecord>> {
    let reads = stream::iter(keys).map(async |key| read(bucket, &key).await);
    Ok(latest(reads.buffer_unordered(READS).try_filter_map(async |record| Ok(record)).try_collect().await?))
}

async fn read(bucket: &Store, key: &str) -> anyhow::Result<Option<AuditRecord>> {
    let value = bucket.get(key).await.with_context(|| format!("cannot read the audit {key}"))?;
    value.map(|value| parse(key, &value)).transpose()
}

fn parse(key: &str, value: &[u8]) -> anyhow::Result<AuditRecord> {
    serde_json::from_slice(value).with_context(|| format!("the entry of the audit {key} cannot be parsed"))
}

//! Seals the secrets of processes before they are stored, and again when the present key has changed. See [`secrets`].

use std::{fmt::Display, sync::Arc, time::Duration};

use contract::{
    ObjectId,
    process::{Callback, Process, Source},
    rpc::{Cursor, LockedCallback, RotateSecrets, RotationResult, RpcError},
    secret::{KeyId, Secret},
};
use secrets::{OpenError, SealingKeys};
use service_kit::postgres::Pool;
use tokio::time::Instant;

use super::projection::{Projector, not_projected};
use crate::store::{self, StoreError, processes};

/// How long one call rotates before it answers how many processes remain: less than the timeout of a query.
const ROTATE_FOR: Duration = Duration::from_secs(3);
/// The list that cursors of a rotation belong to.
const ROTATION: &str = "rotation";

/// Seals and opens the secrets of stored processes.
#[derive(Debug)]
pub(crate) struct Sealer {
    pub(crate) pool: Pool,
    pub(crate) projector: Arc<Projector>,
    pub(crate) keys: SealingKeys,
}

/// Selects the callbacks and sources to seal again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResealFilter {
    /// Callbacks and sources with a secret in clear, from an earlier version.
    InClear,
    /// Callbacks and sources with a secret that is not sealed with the present key.
    NotWithPresentKey,
}

impl ResealFilter {
    fn includes<'a>(self, mut secrets: impl Iterator<Item = &'a Secret>, present: KeyId) -> bool {
        secrets.any(|secret| match self {
            Self::InClear => !secret.is_sealed(),
            Self::NotWithPresentKey => secret.key_id() != Some(present),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SecretOwner {
    Callback(ObjectId),
    Source(ObjectId),
}

/// The result of resealing one process.
struct Resealed {
    stored: bool,
    /// Callbacks and sources whose secrets cannot be opened.
    locked: Vec<(SecretOwner, OpenError)>,
}

impl Sealer {
    /// The process as it is stored. Secrets that could not be opened are sealed already and stay so.
    pub(crate) fn seal(&self, process: &Process) -> Process {
        let callbacks = process.callbacks.iter().map(|callback| self.seal_callback(process.project_id, callback));
        let sources = process.sources.iter().map(|source| self.seal_source(process.project_id, source));
        Process { callbacks: callbacks.collect(), sources: sources.collect(), ..process.clone() }
    }

    /// A stored process with its secrets in clear, except those that cannot be opened.
    pub(crate) fn open(&self, process: &Process) -> Process {
        let open =
            |callback: &Callback| self.keys.open_callback(process.project_id, callback).unwrap_or(callback.clone());
        let open_source = |source: &Source| self.keys.open_source(process.project_id, source).unwrap_or(source.clone());
        Process {
            callbacks: process.callbacks.iter().map(open).collect(),
            sources: process.sources.iter().map(open_source).collect(),
            ..process.clone()
        }
    }

    /// Seals the secrets that an earlier version stored in clear.
    pub(crate) async fn seal_clear(&self) -> anyhow::Result<()> {
        for (project_id, name) in processes::list_to_project(&self.pool, true).await? {
            match self.reseal(project_id, &name, ResealFilter::InClear).await {
                Ok(Resealed { stored: false, .. }) => {}
                // Housekeeping projects the new revision.
                Ok(_) => tracing::info!(%project_id, process = name, "sealed secrets that were stored in clear"),
                Err(e @ StoreError::Unavailable(_)) => return Err(e.into()),
                Err(e) => tracing::error!(%project_id, process = name, "cannot seal secrets: {e}"),
            }
        }
        Ok(())
    }

    /// Seals processes with the present key, as many as [`ROTATE_FOR`] permits.
    pub(crate) async fn rotate(self: Arc<Self>, query: RotateSecrets) -> Result<RotationResult, RpcError> {
        let started = Instant::now();
        let key_id = self.keys.present();
        let mut result =
            RotationResult { key_id, resealed: 0, unchanged: 0, remaining: 0, next: None, locked: Vec::new() };
        let all = processes::list_to_project(&self.pool, true).await?;
        let processes = remaining_after(query.cursor.as_ref(), all)?;
        for (visited, &(project_id, ref name)) in processes.iter().enumerate() {
            // At least one, so that every call makes progress.
            if visited > 0 && started.elapsed() > ROTATE_FOR {
                result.remaining = (processes.len() - visited) as u64;
                result.next = Some(cursor_after(&processes[visited - 1]));
                break;
            }
            let locked = |owner: Option<SecretOwner>, error: &dyn Display| LockedCallback {
                process: name.clone(),
                project_id,
                callback_id: owner.and_then(|owner| match owner {
                    SecretOwner::Callback(id) => Some(id),
                    SecretOwner::Source(_) => None,
                }),
                source_id: owner.and_then(|owner| match owner {
                    SecretOwner::Source(id) => Some(id),
                    SecretOwner::Callback(_) => None,
                }),
                error: error.to_string(),
            };
            let resealed = match self.reseal(project_id, name, ResealFilter::NotWithPresentKey).await {
                Err(e @ StoreError::Corrupt { .. }) => {
                    result.locked.push(locked(None, &e));
                    continue;
                }
                resealed => resealed?,
            };
            result.locked.extend(resealed.locked.iter().map(|(owner, error)| locked(Some(*owner), error)));
            if resealed.stored {
                result.resealed += 1;
                let projected = self.projector.project_process(project_id, name).await;
                projected.map_err(|e| not_projected("the rotation", &e))?;
            } else {
                result.unchanged += 1;
            }
        }
        // An earlier rotation may have stored processes without projecting them.
        self.projector.project_pending(false).await.map_err(|e| not_projected("the rotation", &e))?;
        tracing::info!(%key_id, result.resealed, result.remaining, "sealed the secrets with the present key");
        Ok(result)
    }

    /// Seals a stored process again, under the project's lock, which every change of a process takes.
    async fn reseal(&self, project_id: ObjectId, name: &str, filter: ResealFilter) -> Result<Resealed, StoreError> {
        let mut result = Resealed { stored: false, locked: Vec::new() };
        let present = self.keys.present();
        let is_included = |callback: &Callback| filter.includes(callback.secrets(), present);
        let includes_source = |source: &Source| filter.includes(source.secrets.iter(), present);
        let stored = processes::find_by_name(&self.pool, project_id, name).await?;
        let is_due =
            |process: Process| process.callbacks.iter().any(is_included) || process.sources.iter().any(includes_source);
        if !stored.is_some_and(is_due) {
            return Ok(result);
        }
        let mut transaction = store::begin(&self.pool).await?;
        processes::lock_project(&mut transaction, project_id).await?;
        let stored = processes::find_by_name(&mut *transaction, project_id, name).await?;
        let Some(mut process) = stored else { return Ok(result) };
        for callback in process.callbacks.iter_mut().filter(|callback| is_included(callback)) {
            match self.keys.open_callback(project_id, callback) {
                Ok(opened) => {
                    *callback = self.seal_callback(project_id, &opened);
                    result.stored = true;
                }
                Err(e) => result.locked.push((SecretOwner::Callback(callback.callback_id), e)),
            }
        }
        for source in process.sources.iter_mut().filter(|source| includes_source(source)) {
            match self.keys.open_source(project_id, source) {
                Ok(opened) => {
                    *source = self.seal_source(project_id, &opened);
                    result.stored = true;
                }
                Err(e) => result.locked.push((SecretOwner::Source(source.source_id), e)),
            }
        }
        if result.stored {
            process.revision = processes::next_revision(&mut transaction).await?;
            processes::put(&mut transaction, &processes::Config::new(process)).await?;
            transaction.commit().await?;
        }
        Ok(result)
    }

    fn seal_callback(&self, project_id: ObjectId, callback: &Callback) -> Callback {
        self.keys.seal_callback(project_id, callback, rand::random)
    }

    fn seal_source(&self, project_id: ObjectId, source: &Source) -> Source {
        self.keys.seal_source(project_id, source, rand::random)
    }
}

/// The processes that a rotation has not visited, in an order that sealing them does not change.
fn remaining_after(
    cursor: Option<&Cursor>,
    mut processes: Vec<(ObjectId, String)>,
) -> Result<Vec<(ObjectId, String)>, RpcError> {
    processes.sort_unstable();
    if let Some(cursor) = cursor {
        let place = cursor.place(ROTATION)?;
        let (project_id, name) = place.split_once('.').ok_or_else(Cursor::invalid)?;
        let last = (project_id.parse().map_err(|_| Cursor::invalid())?, name.to_owned());
        processes.retain(|process| *process > last);
    }
    Ok(processes)
}

fn cursor_after((project_id, name): &(ObjectId, String)) -> Cursor {
    Cursor::new(ROTATION, &format!("{project_id}.{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_continues_after_its_cursor() {
        let process = |project, name: &str| (ObjectId::from_bytes([project; 12]), name.to_owned());
        let [first, second, third] = [process(1, "b"), process(2, "a.b"), process(2, "c")];
        let all = || vec![third.clone(), first.clone(), second.clone()];

        let after = |cursor: Option<&Cursor>| remaining_after(cursor, all()).unwrap();

        assert_eq!(after(None), [first.clone(), second.clone(), third.clone()]);
        assert_eq!(after(Some(&cursor_after(&second))), std::slice::from_ref(&third));
        assert!(after(Some(&cursor_after(&third))).is_empty());
        assert!(remaining_after(Some(&Cursor::new(ROTATION, "x")), all()).is_err());
    }
}

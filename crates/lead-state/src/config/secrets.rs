//! Secrets at rest: sealed before a process is stored, and sealed anew when another key has become the present one.
//! See [`secrets`].

use std::{sync::Arc, time::Duration};

use contract::{
    ObjectId,
    process::{Callback, Process},
    rpc::{LockedCallback, RotateSecrets, RotationResult, RpcError},
    secret::KeyId,
};
use secrets::{OpenError, SealingKeys};
use sqlx::PgPool;
use tokio::time::Instant;

use crate::{
    api::admin::not_projected,
    config::projection::Projector,
    store::{StoreError, config},
};

/// How long a call to rotate goes on before it answers how far it came: below the time that a query may take.
const ROTATE_FOR: Duration = Duration::from_secs(3);

/// Seals and opens what is stored.
#[derive(Debug)]
pub(crate) struct Sealer {
    pub(crate) pool: PgPool,
    pub(crate) projector: Arc<Projector>,
    pub(crate) keys: SealingKeys,
}

/// Which callbacks are to be sealed anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Those with a secret in clear, from an older version.
    InClear,
    /// Those with a secret that is not sealed with the present key.
    NotPresent,
}

impl Which {
    fn includes(self, callback: &Callback, present: KeyId) -> bool {
        callback.secrets().any(|secret| match self {
            Self::InClear => !secret.is_sealed(),
            Self::NotPresent => secret.key_id() != Some(present),
        })
    }
}

impl Sealer {
    /// A process as it is stored. What could not be opened before stays sealed as it is.
    pub(crate) fn seal(&self, process: &Process) -> Process {
        let callbacks = process
            .callbacks
            .iter()
            .map(|callback| self.keys.seal_callback(process.project_id, callback, rand::random));
        Process { callbacks: callbacks.collect(), ..process.clone() }
    }

    /// A stored process with its secrets in clear, as far as they can be opened.
    pub(crate) fn open(&self, process: &Process) -> Process {
        let open =
            |callback: &Callback| self.keys.open_callback(process.project_id, callback).unwrap_or(callback.clone());
        Process { callbacks: process.callbacks.iter().map(open).collect(), ..process.clone() }
    }

    /// Seals what an older version stored in clear.
    pub(crate) async fn seal_clear(&self) -> anyhow::Result<()> {
        for (project_id, name) in config::processes_to_project(&self.pool, true).await? {
            if self.seal_stored(project_id, &name, Which::InClear).await?.0 {
                tracing::info!(%project_id, process = name, "its secrets were stored in clear: they are sealed now");
                self.projector.process(project_id, &name).await?;
            }
        }
        Ok(())
    }

    /// Seals everything with the present key, as far as time suffices.
    pub(crate) async fn rotate(self: Arc<Self>, _: RotateSecrets) -> Result<RotationResult, RpcError> {
        let begun = Instant::now();
        let mut rotated =
            RotationResult { key_id: self.keys.present(), resealed: 0, unchanged: 0, remaining: 0, locked: Vec::new() };
        // Oldest revision first: what was sealed anew comes last the next time.
        for (project_id, name) in config::processes_to_project(&self.pool, true).await? {
            if begun.elapsed() > ROTATE_FOR {
                rotated.remaining += 1;
                continue;
            }
            let (resealed, locked) = self.seal_stored(project_id, &name, Which::NotPresent).await?;
            let locked = locked.into_iter().map(|(callback_id, error)| LockedCallback {
                process: name.clone(),
                project_id,
                callback_id,
                error: error.to_string(),
            });
            rotated.locked.extend(locked);
            if resealed {
                rotated.resealed += 1;
                self.projector.process(project_id, &name).await.map_err(|e| not_projected("the rotation", &e))?;
            } else {
                rotated.unchanged += 1;
            }
        }
        // A rotation before this one may have been stored, but not projected.
        self.projector.project_pending(false).await.map_err(|e| not_projected("the rotation", &e))?;
        tracing::info!(key_id = %rotated.key_id, rotated.resealed, rotated.remaining, "secrets were sealed anew");
        Ok(rotated)
    }

    /// Seals a stored process anew, under the lock that every change of it takes. Returns whether anything was stored,
    /// and which callbacks cannot be opened.
    async fn seal_stored(
        &self,
        project_id: ObjectId,
        name: &str,
        which: Which,
    ) -> Result<(bool, Vec<(ObjectId, OpenError)>), StoreError> {
        let present = self.keys.present();
        let includes = |process: &Process| process.callbacks.iter().any(|callback| which.includes(callback, present));
        if !config::current_process(&self.pool, project_id, name).await?.is_some_and(|process| includes(&process)) {
            return Ok((false, Vec::new()));
        }
        let mut transaction = self.pool.begin().await?;
        config::lock_project(&mut transaction, project_id).await?;
        let Some(mut process) = config::process(&mut transaction, project_id, name).await? else {
            return Ok((false, Vec::new()));
        };
        let (mut sealed, mut locked) = (false, Vec::new());
        for callback in process.callbacks.iter_mut().filter(|callback| which.includes(callback, present)) {
            match self.keys.open_callback(project_id, callback) {
                Ok(opened) => {
                    *callback = self.keys.seal_callback(project_id, &opened, rand::random);
                    sealed = true;
                }
                Err(e) => locked.push((callback.callback_id, e)),
            }
        }
        if sealed {
            process.revision = config::next_revision(&mut transaction).await?;
            config::put_process(&mut transaction, &process).await?;
            transaction.commit().await?;
        }
        Ok((sealed, locked))
    }
}

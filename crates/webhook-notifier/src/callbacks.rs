//! 7 Deliver, 8 Retry: who is told. The callbacks of an event, and how a delivery's callback stands now.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_nats::jetstream::kv;
use contract::{
    ObjectId,
    event::CompletionEvent,
    process::{Callback, Process},
    subject::process_key,
};
use service_kit::{health::Readiness, kv::View, nats::chain};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::store;

/// How often it is read who is disabled. Longer lets more attempts go out to an endpoint that is gone, shorter costs
/// Postgres more of a small query.
const DISABLED_INTERVAL: Duration = Duration::from_secs(1);

/// The configuration could not be read; nothing is known then, so nothing may be decided.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the process {key} from its bucket: {cause}")]
pub(crate) struct Unreadable {
    key: String,
    cause: String,
}

/// All that is known of callbacks.
#[derive(Debug)]
pub(crate) struct Callbacks {
    /// The `processes` bucket, watched.
    pub(crate) view: Arc<View<Process>>,
    bucket: kv::Store,
    disabled: RwLock<HashMap<ObjectId, Arc<str>>>,
}

/// A callback, in the configuration that it was found in.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    process: Arc<Process>,
    index: usize,
}

impl Target {
    /// The process in whose configuration it stands; none for the project's fallback callbacks.
    pub(crate) fn process_id(&self) -> Option<ObjectId> {
        self.process.process_id
    }
}

impl Deref for Target {
    type Target = Callback;

    fn deref(&self) -> &Callback {
        &self.process.callbacks[self.index]
    }
}

/// How a delivery's callback stands.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// It is to be told.
    Callback(Target),
    /// It will not be told, and why.
    Refused(String),
    /// Its process is not in the configuration. It may come back: a bucket can be lost and made anew.
    NoProcess,
}

impl Callbacks {
    /// What is known of callbacks through this bucket.
    pub(crate) fn new(bucket: kv::Store) -> Self {
        Self { view: Arc::default(), bucket, disabled: RwLock::default() }
    }

    /// The callbacks that are told of an event; none when its process is not in the configuration.
    pub(crate) async fn of_event(&self, event: &CompletionEvent) -> Result<Option<Vec<Target>>, Unreadable> {
        let process = self.process(event.project_id, event.process_id).await?;
        Ok(process.map(|process| who_wants(&process, event.success)))
    }

    /// The project's fallback callbacks, for an event whose process nobody knows.
    pub(crate) async fn fallback(&self, event: &CompletionEvent) -> Result<Vec<Target>, Unreadable> {
        let process = self.process(event.project_id, None).await?;
        Ok(process.map(|process| who_wants(&process, event.success)).unwrap_or_default())
    }

    /// How a delivery's callback stands.
    pub(crate) async fn find(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
        callback_id: ObjectId,
    ) -> Result<Found, Unreadable> {
        if let Some(reason) = self.disabled(callback_id) {
            return Ok(Found::Refused(reason));
        }
        let Some(process) = self.process(project_id, process_id).await? else {
            return Ok(Found::NoProcess);
        };
        let found = process.callbacks.iter().position(|callback| callback.callback_id == callback_id);
        Ok(match found {
            Some(index) if process.callbacks[index].enabled => Found::Callback(Target { process, index }),
            Some(_) => Found::Refused("the callback was switched off".into()),
            None => Found::Refused("the callback was removed".into()),
        })
    }

    /// What the view does not have may have been written a moment ago: the bucket itself has the last word.
    async fn process(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Result<Option<Arc<Process>>, Unreadable> {
        let key = process_key(project_id, process_id);
        if let Some(process) = self.view.get(&key) {
            return Ok(Some(process));
        }
        let unreadable = |cause| Unreadable { key: key.clone(), cause };
        match self.bucket.get(&key).await.map_err(|e| unreadable(chain(&e)))? {
            Some(value) => serde_json::from_slice(&value).map(Some).map_err(|e| unreadable(e.to_string())),
            None => Ok(None),
        }
    }

    /// Why this callback gets nothing, if it is disabled.
    pub(crate) fn disabled(&self, callback_id: ObjectId) -> Option<String> {
        let disabled = self.disabled.read().unwrap_or_else(PoisonError::into_inner);
        disabled.get(&callback_id).map(|reason| format!("the callback is disabled: {reason}"))
    }

    /// Disables a callback here and now; the other replicas read it from Postgres.
    pub(crate) fn disable(&self, callback_id: ObjectId, reason: &str) {
        self.disabled.write().unwrap_or_else(PoisonError::into_inner).insert(callback_id, reason.into());
    }

    /// Reads anew who is disabled.
    pub(crate) async fn refresh_disabled(&self, pool: &PgPool) -> sqlx::Result<()> {
        let disabled = store::health::disabled_callbacks(pool).await?;
        let disabled = disabled.into_iter().map(|(callback_id, reason)| (callback_id, reason.into())).collect();
        *self.disabled.write().unwrap_or_else(PoisonError::into_inner) = disabled;
        Ok(())
    }

    /// Keeps up with who is disabled, whichever replica disabled it, until shutdown.
    pub(crate) async fn follow_disabled(
        &self,
        pool: &PgPool,
        readiness: &Readiness,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let follow = async {
            loop {
                match self.refresh_disabled(pool).await {
                    Ok(()) => readiness.ready("postgres"),
                    Err(e) => {
                        tracing::warn!("cannot read who is disabled: {}", chain(&e));
                        readiness.not_ready("postgres", chain(&e));
                    }
                }
                tokio::time::sleep(DISABLED_INTERVAL).await;
            }
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.cancelled() => {}
        }
        Ok(())
    }
}

fn who_wants(process: &Arc<Process>, success: bool) -> Vec<Target> {
    let wants = |index: &usize| process.callbacks[*index].wants(success);
    (0..process.callbacks.len()).filter(wants).map(|index| Target { process: process.clone(), index }).collect()
}

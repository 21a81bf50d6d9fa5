//! 7 Deliver, 8 Retry: who is told. The callbacks of an event, and how a delivery's callback stands now.

use std::{
    collections::HashSet,
    ops::Deref,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_nats::jetstream::kv;
use contract::{
    ObjectId,
    event::CompletionEvent,
    json::redacted_error,
    process::{Callback, Ordering, Process},
    subject::process_key,
};
use secrets::{OpenError, SealingKeys};
use serde::Deserialize;
use service_kit::{health::Readiness, kv::BucketCache, nats::error_chain};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::Endpoint,
    callback_health::Health,
    http::client::Prepared,
    http::guard::{Guard, system_lookup},
};

/// How often it is looked for secrets that cannot be opened. Longer is later to say so; it costs a look at memory.
const LOCKED_INTERVAL: Duration = Duration::from_secs(1);

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
    pub(crate) view: Arc<BucketCache<Configured>>,
    bucket: kv::Store,
    pub(crate) health: Health,
    keys: SealingKeys,
    guard: Guard,
}

/// A revision of a process, and of each of its callbacks the same with its secrets opened, once they were needed.
#[derive(Debug, Deserialize)]
#[serde(from = "Process")]
pub(crate) struct Configured {
    process: Process,
    opened: Vec<OnceLock<Result<Prepared, OpenError>>>,
}

impl From<Process> for Configured {
    fn from(process: Process) -> Self {
        let opened = process.callbacks.iter().map(|_| OnceLock::new()).collect();
        Self { process, opened }
    }
}

impl Configured {
    /// Why the secrets of a callback cannot be opened, as far as it is known without opening them.
    fn locked(&self, index: usize, keys: &SealingKeys) -> Option<OpenError> {
        match self.opened[index].get() {
            Some(opened) => opened.as_ref().err().copied(),
            None => {
                let key_ids = self.callbacks[index].secrets().filter_map(|secret| secret.key_id());
                key_ids.filter(|key_id| !keys.has(*key_id)).map(OpenError::UnknownKey).next()
            }
        }
    }
}

impl Deref for Configured {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

/// A callback, in the configuration that it was found in.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    process: Arc<Configured>,
    index: usize,
}

impl Target {
    /// The process in whose configuration it stands; none for the project's fallback callbacks.
    pub(crate) fn process_id(&self) -> Option<ObjectId> {
        self.process.process_id
    }

    /// What it may have at once and in a second.
    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint {
            callback_id: self.callback_id,
            project_id: self.process.project_id,
            max_in_flight: self.max_in_flight,
            max_per_second: self.max_per_second,
        }
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
    /// It is told nothing until it is enabled again.
    Disabled,
    /// It is to be told, but its secrets cannot be opened: it waits until they can.
    Locked,
    /// It will not be told, and why.
    Refused(String),
    /// Its process is not in the configuration. It may come back: a bucket can be lost and made anew.
    NoProcess,
}

impl Callbacks {
    /// What is known of callbacks through this bucket.
    pub(crate) fn new(bucket: kv::Store, health: Health, keys: SealingKeys, guard: Guard) -> Self {
        Self { view: Arc::default(), bucket, health, keys, guard }
    }

    /// The callback with its secrets in clear: opened for the first attempt under a revision of its process, then kept
    /// as long as that revision is.
    pub(crate) fn open<'a>(&self, target: &'a Target) -> Result<&'a Prepared, OpenError> {
        let Configured { process, opened } = target.process.as_ref();
        let opened = opened[target.index].get_or_init(|| {
            let callback = self.keys.open_callback(process.project_id, target)?;
            Ok(Prepared::new(callback, &self.guard))
        });
        opened.as_ref().map_err(|e| *e)
    }

    /// The callbacks whose secrets cannot be opened, as far as that is known.
    fn locked(&self) -> Vec<(ObjectId, OpenError)> {
        let of = |process: &Configured| {
            let callbacks = process.callbacks.iter().enumerate().filter(|(_, callback)| callback.enabled);
            callbacks
                .filter_map(|(index, callback)| Some((callback.callback_id, process.locked(index, &self.keys)?)))
                .collect::<Vec<_>>()
        };
        self.view.all().iter().flat_map(|process| of(process)).collect()
    }

    /// Whether any callback has an order.
    pub(crate) fn any_in_order(&self) -> bool {
        self.view
            .all()
            .iter()
            .any(|process| process.callbacks.iter().any(|callback| callback.ordering == Ordering::Lead))
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
        let Some(process) = self.process(project_id, process_id).await? else {
            return Ok(Found::NoProcess);
        };
        let callbacks = &process.callbacks;
        let Some(index) = callbacks.iter().position(|callback| callback.callback_id == callback_id) else {
            return Ok(Found::Refused("the callback was removed".into()));
        };
        if !callbacks[index].enabled {
            return Ok(Found::Refused("the callback was switched off".into()));
        }
        if self.health.disabled(callback_id).is_some() {
            return Ok(Found::Disabled);
        }
        let target = Target { process, index };
        Ok(if self.open(&target).is_ok() { Found::Callback(target) } else { Found::Locked })
    }

    /// A callback as it is configured at this moment, whether or not it is told of anything.
    pub(crate) async fn now(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
        callback_id: ObjectId,
    ) -> Result<Option<Target>, Unreadable> {
        let Some(process) = self.stored(&process_key(project_id, process_id)).await? else { return Ok(None) };
        let index = process.callbacks.iter().position(|callback| callback.callback_id == callback_id);
        Ok(index.map(|index| Target { process, index }))
    }

    /// Why a callback is not to have this URL.
    pub(crate) async fn refusal(&self, url: &str) -> Option<String> {
        self.guard.refusal(url, system_lookup).await
    }

    /// What the view does not have may have been written a moment ago: the bucket itself has the last word.
    async fn process(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Result<Option<Arc<Configured>>, Unreadable> {
        let key = process_key(project_id, process_id);
        match self.view.get(&key) {
            Some(process) => Ok(Some(process)),
            None => self.stored(&key).await,
        }
    }

    /// What the bucket holds.
    async fn stored(&self, key: &str) -> Result<Option<Arc<Configured>>, Unreadable> {
        let unreadable = |cause| Unreadable { key: key.to_owned(), cause };
        match self.bucket.get(key).await.map_err(|e| unreadable(error_chain(&e)))? {
            Some(value) => serde_json::from_slice(&value).map(Some).map_err(|e| unreadable(redacted_error(&e))),
            None => Ok(None),
        }
    }

    /// Says whose secrets cannot be opened, in the log once and in readiness as long as it is so, until shutdown.
    pub(crate) async fn follow_locked(&self, readiness: &Readiness, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut told = HashSet::new();
        loop {
            self.tell_locked(readiness, &mut told);
            tokio::select! {
                () = tokio::time::sleep(LOCKED_INTERVAL) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Says once of each callback that its secrets cannot be opened, and lets readiness show it as long as it is so.
    fn tell_locked(&self, readiness: &Readiness, told: &mut HashSet<ObjectId>) {
        let locked = self.locked();
        told.retain(|callback_id| locked.iter().any(|(locked, _)| locked == callback_id));
        for (callback_id, e) in &locked {
            if told.insert(*callback_id) {
                tracing::error!(%callback_id, "its secrets cannot be opened, so its deliveries wait: {e}");
            }
        }
        match locked.first() {
            None => readiness.ready("secrets"),
            Some((callback_id, e)) => readiness
                .not_ready("secrets", format!("of {} callbacks cannot be opened: {callback_id} is {e}", locked.len())),
        }
    }
}

fn who_wants(process: &Arc<Configured>, success: bool) -> Vec<Target> {
    let callbacks = &process.callbacks;
    let wants = |index: &usize| callbacks[*index].wants(success);
    (0..callbacks.len()).filter(wants).map(|index| Target { process: process.clone(), index }).collect()
}

//! 7 Deliver, 8 Retry: the callbacks of an event, and the current configuration of a delivery's callback.

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
    event_kind::DeliveryKind,
    json::redacted_error,
    process::{Callback, EventValues, Ordering, Process, Source},
    subject::process_key,
};
use secrets::{OpenError, SealingKeys};
use serde::Deserialize;
use service_kit::{health::Readiness, kv::BucketCache, nats::error_chain};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::endpoint::Endpoint,
    callback_health::{CallbackHealth, Hold},
    http::{dns::Dns, guard::Guard, request::PreparedCallback},
    store::health::ConfiguredIn,
};

/// How often callbacks are checked for secrets that cannot be opened. A longer interval reports them later; a check
/// reads memory only.
const LOCKED_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The configuration could not be read, so nothing may be decided about the delivery.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the process {key} from its bucket: {cause}")]
pub(crate) struct ProcessUnreadable {
    key: String,
    cause: String,
    /// The entry exists but is not a valid process. Otherwise NATS did not answer.
    pub(crate) is_malformed: bool,
}

impl ProcessUnreadable {
    pub(crate) fn new(key: impl Into<String>, cause: impl Into<String>, is_malformed: bool) -> Self {
        Self { key: key.into(), cause: cause.into(), is_malformed }
    }
}

#[derive(Debug)]
pub(crate) struct Callbacks {
    /// Follows the bucket `processes`.
    pub(crate) view: Arc<BucketCache<ConfiguredProcess>>,
    bucket: kv::Store,
    pub(crate) health: CallbackHealth,
    keys: SealingKeys,
    guard: Guard,
    dns: Arc<Dns>,
}

/// A revision of a process. The secrets of each callback and source are opened once, when they are first needed.
#[derive(Debug, Deserialize)]
#[serde(from = "Process")]
pub(crate) struct ConfiguredProcess {
    process: Process,
    prepared: Vec<OnceLock<Result<PreparedCallback, OpenError>>>,
    opened_sources: Vec<OnceLock<Result<Arc<Source>, OpenError>>>,
}

impl From<Process> for ConfiguredProcess {
    fn from(process: Process) -> Self {
        let prepared = process.callbacks.iter().map(|_| OnceLock::new()).collect();
        let opened_sources = process.sources.iter().map(|_| OnceLock::new()).collect();
        Self { process, prepared, opened_sources }
    }
}

impl ConfiguredProcess {
    /// Why the secrets of a callback cannot be opened, as far as this can be decided without opening them.
    fn locked(&self, index: usize, keys: &SealingKeys) -> Option<OpenError> {
        match self.prepared[index].get() {
            Some(prepared) => prepared.as_ref().err().copied(),
            None => {
                let key_ids = self.callbacks[index].secrets().filter_map(|secret| secret.key_id());
                key_ids.filter(|key_id| !keys.has(*key_id)).map(OpenError::UnknownKey).next()
            }
        }
    }
}

impl Deref for ConfiguredProcess {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

/// A callback in a revision of its process.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    process: Arc<ConfiguredProcess>,
    index: usize,
}

/// A callback, and the kind of delivery that it gets.
pub(crate) type Subscription = (Target, DeliveryKind);

impl Target {
    /// None for the project's fallback callbacks.
    pub(crate) fn process_id(&self) -> Option<ObjectId> {
        self.process.process_id
    }

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

/// The callback of a recorded delivery, as it is configured now.
#[derive(Debug, Clone)]
pub(crate) enum CallbackLookup {
    Enabled(Target),
    /// Its deliveries wait until it may be called again.
    Held(Hold),
    /// Its secrets cannot be opened: its deliveries wait until they can.
    Locked,
    /// Its deliveries end as exhausted.
    Removed,
    /// Its process is not in the configuration. It may return: a lost bucket is filled again from Postgres.
    NoProcess,
}

/// A source of call reports, as it is configured now.
#[derive(Debug, Clone)]
pub(crate) enum SourceLookup {
    /// With its secrets in clear.
    Enabled(Arc<Source>),
    /// There is none, or it is switched off.
    Unknown,
    /// Its secrets cannot be opened.
    Locked(OpenError),
}

impl Callbacks {
    pub(crate) fn new(
        bucket: kv::Store,
        health: CallbackHealth,
        keys: SealingKeys,
        guard: Guard,
        dns: Arc<Dns>,
    ) -> Self {
        Self { view: Arc::default(), bucket, health, keys, guard, dns }
    }

    /// The callback with its secrets in clear: opened for the first attempt under a revision of its process, and kept
    /// as long as the revision.
    pub(crate) fn prepare<'a>(&self, target: &'a Target) -> Result<&'a PreparedCallback, OpenError> {
        let ConfiguredProcess { process, prepared, .. } = target.process.as_ref();
        let prepared = prepared[target.index].get_or_init(|| {
            let callback = self.keys.open_callback(process.project_id, target)?;
            Ok(PreparedCallback::new(callback, &self.guard))
        });
        prepared.as_ref().map_err(|e| *e)
    }

    /// The enabled callbacks whose secrets cannot be opened.
    fn locked(&self) -> Vec<(ObjectId, OpenError)> {
        let locked = |process: &ConfiguredProcess| {
            let callbacks = process.callbacks.iter().enumerate().filter(|(_, callback)| callback.enabled);
            callbacks
                .filter_map(|(index, callback)| Some((callback.callback_id, process.locked(index, &self.keys)?)))
                .collect::<Vec<_>>()
        };
        self.view.all().iter().flat_map(|process| locked(process)).collect()
    }

    /// The callbacks that are off, paused or disabled.
    pub(crate) fn held(&self) -> Vec<ObjectId> {
        let all = self.view.all();
        let callbacks = all.iter().flat_map(|process| &process.callbacks);
        callbacks.filter(|callback| self.health.hold(callback).is_some()).map(|callback| callback.callback_id).collect()
    }

    /// The process that configures a callback, as far as memory has it.
    pub(crate) fn process_of(&self, callback_id: ObjectId) -> Option<ConfiguredIn> {
        let has = |process: &&Arc<ConfiguredProcess>| {
            process.callbacks.iter().any(|callback| callback.callback_id == callback_id)
        };
        let all = self.view.all();
        let process = all.iter().find(has)?;
        Some(ConfiguredIn { project_id: process.project_id, process_id: process.process_id })
    }

    /// Whether a callback was removed from its process, which still exists. Reads the bucket, because memory may lag
    /// behind it.
    pub(crate) async fn is_removed(
        &self,
        callback_id: ObjectId,
        process: ConfiguredIn,
    ) -> Result<bool, ProcessUnreadable> {
        let process = self.stored_process(process.project_id, process.process_id).await?;
        let lacks = |process: Arc<ConfiguredProcess>| {
            process.callbacks.iter().all(|callback| callback.callback_id != callback_id)
        };
        Ok(process.is_some_and(lacks))
    }

    /// Whether any callback has `ordering: "lead"`.
    pub(crate) fn any_ordered(&self) -> bool {
        self.view
            .all()
            .iter()
            .any(|process| process.callbacks.iter().any(|callback| callback.ordering == Ordering::Lead))
    }

    /// The deliveries of an event; `None` if its process is not in the configuration.
    pub(crate) async fn for_event(
        &self,
        event: &CompletionEvent,
    ) -> Result<Option<Vec<Subscription>>, ProcessUnreadable> {
        let process = self.process(event.project_id, event.process_id).await?;
        Ok(process.map(|process| subscribed(&process, event)))
    }

    /// The deliveries to the project's fallback callbacks, for an event whose process does not exist.
    pub(crate) async fn fallback(&self, event: &CompletionEvent) -> Result<Vec<Subscription>, ProcessUnreadable> {
        let process = self.process(event.project_id, None).await?;
        Ok(process.map(|process| subscribed(&process, event)).unwrap_or_default())
    }

    /// Checks that the callbacks for the events of a process can be read; without `process_id`, those for events of the
    /// project that have no process.
    ///
    /// # Errors
    /// Its entry, or the entry of the fallback callbacks that replace a missing process, cannot be read.
    pub(crate) async fn check_readable(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Result<(), ProcessUnreadable> {
        if self.process(project_id, process_id).await?.is_none() {
            self.process(project_id, None).await?;
        }
        Ok(())
    }

    pub(crate) async fn look_up(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
        callback_id: ObjectId,
    ) -> Result<CallbackLookup, ProcessUnreadable> {
        let process = self.process(project_id, process_id).await?;
        Ok(self.look_up_in(process.as_ref(), callback_id))
    }

    /// Looks up a callback in its process, which is `None` if it is not in the configuration.
    pub(crate) fn look_up_in(&self, process: Option<&Arc<ConfiguredProcess>>, callback_id: ObjectId) -> CallbackLookup {
        let Some(process) = process else { return CallbackLookup::NoProcess };
        let callbacks = &process.callbacks;
        let Some(index) = callbacks.iter().position(|callback| callback.callback_id == callback_id) else {
            return CallbackLookup::Removed;
        };
        if let Some(hold) = self.health.hold(&callbacks[index]) {
            return CallbackLookup::Held(hold);
        }
        let target = Target { process: process.clone(), index };
        if self.prepare(&target).is_ok() { CallbackLookup::Enabled(target) } else { CallbackLookup::Locked }
    }

    /// A callback as the bucket has it at this moment, enabled or not.
    pub(crate) async fn read(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
        callback_id: ObjectId,
    ) -> Result<Option<Target>, ProcessUnreadable> {
        let Some(process) = self.stored_process(project_id, process_id).await? else { return Ok(None) };
        let index = process.callbacks.iter().position(|callback| callback.callback_id == callback_id);
        Ok(index.map(|index| Target { process, index }))
    }

    /// The source with its secrets in clear: opened for its first report under a revision of its process.
    pub(crate) async fn source(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
        source_id: ObjectId,
    ) -> Result<SourceLookup, ProcessUnreadable> {
        let process = self.process(project_id, process_id).await?;
        let found = process.as_ref().and_then(|process| {
            let index = process.sources.iter().position(|source| source.source_id == source_id && source.enabled)?;
            Some((process, index))
        });
        let Some((process, index)) = found else { return Ok(SourceLookup::Unknown) };
        let open = || self.keys.open_source(project_id, &process.sources[index]).map(Arc::new);
        let opened = process.opened_sources[index].get_or_init(open);
        Ok(opened.as_ref().map_or_else(|e| SourceLookup::Locked(*e), |source| SourceLookup::Enabled(source.clone())))
    }

    /// Why a callback of this project may not have this URL.
    pub(crate) async fn url_refusal(&self, project_id: ObjectId, url: &str) -> Option<String> {
        self.guard.refusal(url, async |name| self.dns.look_up_for(project_id, name).await).await
    }

    /// The process, if memory has it.
    pub(crate) fn process_in_memory(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Option<Arc<ConfiguredProcess>> {
        self.view.get(&process_key(project_id, process_id))
    }

    /// The process. Reads the bucket if memory lacks it, because it may have been written a moment ago.
    pub(crate) async fn process(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Result<Option<Arc<ConfiguredProcess>>, ProcessUnreadable> {
        match self.process_in_memory(project_id, process_id) {
            Some(process) => Ok(Some(process)),
            None => self.stored_process(project_id, process_id).await,
        }
    }

    /// The process as the bucket has it at this moment.
    pub(crate) async fn stored_process(
        &self,
        project_id: ObjectId,
        process_id: Option<ObjectId>,
    ) -> Result<Option<Arc<ConfiguredProcess>>, ProcessUnreadable> {
        self.stored(&process_key(project_id, process_id)).await
    }

    async fn stored(&self, key: &str) -> Result<Option<Arc<ConfiguredProcess>>, ProcessUnreadable> {
        let unreadable = |cause, is_malformed| ProcessUnreadable::new(key, cause, is_malformed);
        match self.bucket.get(key).await.map_err(|e| unreadable(error_chain(&e), false))? {
            Some(value) => serde_json::from_slice(&value).map(Some).map_err(|e| unreadable(redacted_error(&e), true)),
            None => Ok(None),
        }
    }

    /// Reports callbacks whose secrets cannot be opened, once in the log and all the time in readiness, until shutdown.
    pub(crate) async fn watch_locked(&self, readiness: &Readiness, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut reported = HashSet::new();
        loop {
            self.report_locked(readiness, &mut reported);
            tokio::select! {
                () = tokio::time::sleep(LOCKED_CHECK_INTERVAL) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    fn report_locked(&self, readiness: &Readiness, reported: &mut HashSet<ObjectId>) {
        let locked = self.locked();
        let still_locked = locked.iter().map(|(callback_id, _)| *callback_id).collect::<HashSet<_>>();
        reported.retain(|callback_id| still_locked.contains(callback_id));
        for (callback_id, e) in &locked {
            if reported.insert(*callback_id) {
                tracing::error!(%callback_id, "the callback's secrets cannot be opened, its deliveries wait: {e}");
            }
        }
        match locked.first() {
            None => readiness.ready("secrets"),
            Some((callback_id, e)) => readiness.not_ready(
                "secrets",
                format!("the secrets of {} callbacks cannot be opened, e.g. of {callback_id}: {e}", locked.len()),
            ),
        }
    }
}

fn subscribed(process: &Arc<ConfiguredProcess>, event: &CompletionEvent) -> Vec<Subscription> {
    let callbacks = process.callbacks.iter().enumerate();
    let values = EventValues::of(event);
    let subscribed =
        callbacks.flat_map(|(index, callback)| callback.deliveries(&values).map(move |kind| (index, kind)));
    subscribed.map(|(index, kind)| (Target { process: process.clone(), index }, kind)).collect()
}

//! 7 Deliver, 8 Retry: who is told. The callbacks of an event, and how a delivery's callback stands now.

use std::{ops::Deref, sync::Arc};

use async_nats::jetstream::kv;
use contract::{
    ObjectId,
    event::CompletionEvent,
    process::{Callback, Process},
    subject::process_key,
};
use service_kit::{kv::View, nats::chain};

use crate::{health::Health, slots::Endpoint};

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
    pub(crate) health: Health,
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
    /// It will not be told, and why.
    Refused(String),
    /// Its process is not in the configuration. It may come back: a bucket can be lost and made anew.
    NoProcess,
}

impl Callbacks {
    /// What is known of callbacks through this bucket.
    pub(crate) fn new(bucket: kv::Store, health: Health) -> Self {
        Self { view: Arc::default(), bucket, health }
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
        let found = process.callbacks.iter().position(|callback| callback.callback_id == callback_id);
        Ok(match found {
            Some(index) if process.callbacks[index].enabled && self.health.disabled(callback_id).is_some() => {
                Found::Disabled
            }
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
}

fn who_wants(process: &Arc<Process>, success: bool) -> Vec<Target> {
    let wants = |index: &usize| process.callbacks[*index].wants(success);
    (0..process.callbacks.len()).filter(wants).map(|index| Target { process: process.clone(), index }).collect()
}

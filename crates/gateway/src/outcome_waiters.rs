//! 1 Accept: requests that wait for outcomes (`Prefer: wait`).
//!
//! A gateway has one core NATS subscription to all events, and only while requests wait, so that waiting costs
//! JetStream and Postgres nothing. A missed event, for example during a reconnect, is not read later: its wait times
//! out.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, Message, SubscribeError, Subscriber};
use bytes::Bytes;
use contract::{ObjectId, headers::MESSAGE_ID, subject};
use futures::StreamExt;
use service_kit::shares::{Permit, Pool};
use tokio::{sync::watch, task::JoinHandle};

/// Most requests that wait at once, with a share per project; further requests get their response at once, as without
/// the preference. Each holds a connection and, once it has arrived, the event.
const MAX_WAITING: usize = 4096;
/// How often the subscription is checked: it ends when no request waits at two checks in a row. Shorter subscribes more
/// often; longer receives more events that no request waits for.
const LINGER: Duration = Duration::from_secs(10);

/// The project and the update: ids of updates are unique only in their project.
type Key = (ObjectId, ObjectId);

#[derive(Debug)]
pub(crate) struct OutcomeWaiters {
    pool: Arc<Pool<ObjectId>>,
    waiting: Mutex<Waiting>,
    /// The task that reads events. Locked while it starts or ends, so that no request continues before the subscription
    /// exists.
    reader: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Waiting {
    events: HashMap<Key, watch::Sender<Option<Bytes>>>,
    closed: bool,
}

/// A registered request; dropping it unregisters.
#[derive(Debug)]
pub(crate) struct OutcomeWaiter {
    waiters: Arc<OutcomeWaiters>,
    key: Key,
    event: Option<watch::Receiver<Option<Bytes>>>,
    _permit: Permit<ObjectId>,
}

impl OutcomeWaiters {
    pub(crate) fn new() -> Self {
        Self { pool: Pool::new(MAX_WAITING), waiting: Mutex::default(), reader: tokio::sync::Mutex::default() }
    }

    /// Registers a request before its update is published, so that no event is missed. None if the request cannot wait:
    /// the project has used up its share, the gateway stops, or the subscription failed.
    pub(crate) async fn register(
        self: &Arc<Self>,
        client: &Client,
        project_id: ObjectId,
        update_id: ObjectId,
    ) -> Option<OutcomeWaiter> {
        let waiter = self.insert((project_id, update_id))?;
        match self.ensure_reader(client).await {
            Ok(()) => Some(waiter),
            Err(e) => {
                tracing::warn!("cannot subscribe to events, requests do not wait for outcomes: {e}");
                None
            }
        }
    }

    /// Ends all waits and accepts no more.
    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.events.clear();
    }

    fn insert(self: &Arc<Self>, key: Key) -> Option<OutcomeWaiter> {
        let permit = self.pool.try_acquire(key.0).ok()?;
        let mut waiting = self.lock();
        if waiting.closed {
            return None;
        }
        let event = waiting.events.entry(key).or_insert_with(|| watch::Sender::new(None)).subscribe();
        Some(OutcomeWaiter { waiters: self.clone(), key, event: Some(event), _permit: permit })
    }

    async fn ensure_reader(self: &Arc<Self>, client: &Client) -> Result<(), SubscribeError> {
        let mut reader = self.reader.lock().await;
        if let Some(ended) = reader.take_if(|task| task.is_finished())
            && let Err(e) = ended.await
        {
            tracing::error!("the reader of outcomes died and is restarted: {e}");
        }
        if reader.is_none() {
            let events = client.subscribe(subject::ALL_EVENTS).await?;
            // The next request that registers restarts a dead reader; requests that wait when it dies time out.
            *reader = Some(tokio::spawn(self.clone().read_events(events)));
        }
        Ok(())
    }

    /// Reads events until no request has waited for a while.
    async fn read_events(self: Arc<Self>, mut events: Subscriber) {
        let mut idle_check = tokio::time::interval(LINGER);
        idle_check.tick().await;
        let mut was_idle = false;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => self.deliver(event),
                    // The connection is closed for good.
                    None => return,
                },
                _ = idle_check.tick() => {
                    let mut reader = self.reader.lock().await;
                    // A request that registers from here on finds no reader and subscribes.
                    if std::mem::replace(&mut was_idle, self.is_idle()) && was_idle {
                        *reader = None;
                        return;
                    }
                }
            }
        }
    }

    /// Delivers an event to the requests that wait for it. Only the headers are parsed: most events have no waiter, and
    /// may be large.
    fn deliver(&self, event: Message) {
        let Some(key) = key(&event) else { return };
        if let Some(sender) = self.lock().events.remove(&key) {
            sender.send_replace(Some(event.payload));
        }
    }

    fn is_idle(&self) -> bool {
        self.lock().events.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The update of an event.
fn key(event: &Message) -> Option<Key> {
    let project_id = subject::event_project(&event.subject)?;
    let id = event.headers.as_ref()?.get(MESSAGE_ID)?.as_str();
    // The id of the update is followed by the project and, unless it is 0, the generation.
    let update_id = id.split_once('-').map_or(id, |(id, _)| id);
    Some((project_id, update_id.parse().ok()?))
}

impl OutcomeWaiter {
    /// Waits for the event. None if the event can no longer arrive. Callers set the timeout.
    pub(crate) async fn event(&mut self) -> Option<Bytes> {
        self.event.as_mut()?.wait_for(Option::is_some).await.ok()?.clone()
    }
}

impl Drop for OutcomeWaiter {
    fn drop(&mut self) {
        self.event = None;
        let mut waiting = self.waiters.lock();
        if waiting.events.get(&self.key).is_some_and(|event| event.receiver_count() == 0) {
            waiting.events.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderMap;
    use contract::event::OutcomeKind;

    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([1; 12]);
    const UPDATE: ObjectId = ObjectId::from_bytes([2; 12]);

    fn event(project_id: ObjectId, id: &str, payload: &'static str) -> Message {
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, id);
        Message {
            subject: subject::event(project_id, None, OutcomeKind::Update, true).into(),
            reply: None,
            payload: payload.into(),
            headers: Some(headers),
            status: None,
            description: None,
            length: 0,
        }
    }

    #[tokio::test]
    async fn all_requests_that_wait_for_an_update_get_its_event() {
        let waiters = Arc::new(OutcomeWaiters::new());
        let mut waiting = [0; 3].map(|_| waiters.insert((PROJECT, UPDATE)).unwrap());
        waiters.deliver(event(UPDATE, &UPDATE.to_string(), "of another project"));
        waiters.deliver(event(PROJECT, &PROJECT.to_string(), "of another update"));
        waiters.deliver(event(PROJECT, "odd", "odd"));
        waiters.deliver(event(PROJECT, &format!("{UPDATE}-1"), "mine"));
        assert!(waiters.is_idle());
        // A later request does not get the earlier event, and stays registered when the earlier requests are dropped.
        let mut late = waiters.insert((PROJECT, UPDATE)).unwrap();
        for waiter in &mut waiting {
            assert_eq!(waiter.event().await.unwrap(), "mine");
        }
        drop(waiting);
        assert!(!waiters.is_idle());
        waiters.deliver(event(PROJECT, &UPDATE.to_string(), "again"));
        assert_eq!(late.event().await.unwrap(), "again");
    }

    #[tokio::test]
    async fn the_reader_restarts_after_it_died() {
        let nats = test_support::nats().await;
        let config = service_kit::config::NatsConfig::at(nats.url());
        let client = service_kit::nats::connect(&config, "gateway", &Default::default()).await.unwrap();
        let waiters = Arc::new(OutcomeWaiters::new());
        for round in 0..3 {
            let mut waiter = waiters.register(&client, PROJECT, UPDATE).await.unwrap();
            let reader = waiters.reader.lock().await.as_ref().map(JoinHandle::abort_handle).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(MESSAGE_ID, UPDATE.to_string());
            let subject = subject::event(PROJECT, None, OutcomeKind::Update, true);
            client.publish_with_headers(subject, headers, "mine".into()).await.unwrap();
            let event = tokio::time::timeout(Duration::from_secs(10), waiter.event()).await;
            assert_eq!(event.unwrap().unwrap(), "mine", "round {round}");
            reader.abort();
            while !reader.is_finished() {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_or_closed_leaves_nothing_behind() {
        let waiters = Arc::new(OutcomeWaiters::new());
        let (one, two) = (waiters.insert((PROJECT, UPDATE)), waiters.insert((PROJECT, UPDATE)));
        drop(one);
        assert!(!waiters.is_idle());
        drop(two);
        assert!(waiters.is_idle());

        let mut last = waiters.insert((PROJECT, UPDATE)).unwrap();
        waiters.close();
        assert_eq!(last.event().await, None);
        assert!(waiters.insert((PROJECT, UPDATE)).is_none());
    }

    #[test]
    fn a_project_has_a_share_of_the_waits() {
        let waiters = Arc::new(OutcomeWaiters::new());
        let id = |n: usize| ObjectId::new(contract::Timestamp::from_millis(0), (n as u64).to_be_bytes());
        let registered: Vec<_> = (0..MAX_WAITING / 2).map(|n| waiters.insert((PROJECT, id(n))).unwrap()).collect();
        assert!(waiters.insert((PROJECT, id(MAX_WAITING))).is_none());
        assert!(waiters.insert((UPDATE, id(0))).is_some(), "another project");
        drop(registered);
        assert!(waiters.insert((PROJECT, id(MAX_WAITING))).is_some());
    }
}

//! 1 Accept: outcomes that requests wait for (`Prefer: wait`).
//!
//! One subscription per gateway to the events as they are published, plain NATS and no consumer, and only while somebody
//! waits: who waits costs JetStream and Postgres nothing. An event that is missed, as when the connection is lost for a
//! moment, is not asked after: the wait ends as one that took too long.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, Message, SubscribeError, Subscriber};
use bytes::Bytes;
use contract::{ObjectId, headers::MESSAGE_ID, subject};
use futures::StreamExt;
use tokio::{sync::watch, task::JoinHandle};

/// Most requests that wait at once; further ones are answered at once, as if they had not asked to wait. Each is a
/// connection and, once its event is there, the event.
const MAX_WAITING: usize = 4096;
/// How long events are still read after the last one waited. Shorter subscribes anew more often, longer reads more events
/// for nobody.
const LINGER: Duration = Duration::from_secs(10);

/// Ids of updates are unique in their project.
type Key = (ObjectId, ObjectId);

/// Those who wait, by what they wait for.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    waiting: Mutex<Waiting>,
    /// What reads events, while they are read. Locked while that changes, so that nobody goes on before the subscription is
    /// there.
    reading: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Waiting {
    events: HashMap<Key, watch::Sender<Option<Bytes>>>,
    closed: bool,
}

/// A place among those who wait; it is given up when dropped.
#[derive(Debug)]
pub(crate) struct Waiter {
    outcomes: Arc<Outcomes>,
    key: Key,
    event: Option<watch::Receiver<Option<Bytes>>>,
}

impl Outcomes {
    /// Takes a place, to be taken before the update is published: no event is missed then. None where there is no room.
    pub(crate) async fn wait_for(
        self: &Arc<Self>,
        client: &Client,
        project_id: ObjectId,
        update_id: ObjectId,
    ) -> Option<Waiter> {
        let waiter = self.register((project_id, update_id))?;
        match self.read(client).await {
            Ok(()) => Some(waiter),
            Err(e) => {
                tracing::warn!("cannot subscribe to events, nobody can wait for outcomes: {e}");
                None
            }
        }
    }

    /// Lets all who wait go, and nobody wait any more.
    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.events.clear();
    }

    fn register(self: &Arc<Self>, key: Key) -> Option<Waiter> {
        let mut waiting = self.lock();
        if waiting.closed || waiting.events.len() >= MAX_WAITING {
            return None;
        }
        let event = waiting.events.entry(key).or_insert_with(|| watch::Sender::new(None)).subscribe();
        Some(Waiter { outcomes: self.clone(), key, event: Some(event) })
    }

    /// Makes sure that events are read.
    async fn read(self: &Arc<Self>, client: &Client) -> Result<(), SubscribeError> {
        let mut reading = self.reading.lock().await;
        if let Some(ended) = reading.take_if(|task| task.is_finished())
            && let Err(e) = ended.await
        {
            tracing::error!("what reads outcomes died, and is started again: {e}");
        }
        if reading.is_none() {
            let events = client.subscribe(subject::ALL_EVENTS).await?;
            // Supervised by the next who waits; those who wait when it ends give up by the clock.
            *reading = Some(tokio::spawn(self.clone().follow(events)));
        }
        Ok(())
    }

    /// Reads events until nobody has waited for a while.
    async fn follow(self: Arc<Self>, mut events: Subscriber) {
        let mut look = tokio::time::interval(LINGER);
        look.tick().await;
        let mut was_idle = false;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => self.tell(event),
                    // The connection is gone for good.
                    None => return,
                },
                _ = look.tick() => {
                    let mut reading = self.reading.lock().await;
                    // Whoever comes from here on finds nothing, and subscribes.
                    if std::mem::replace(&mut was_idle, self.is_idle()) && was_idle {
                        *reading = None;
                        return;
                    }
                }
            }
        }
    }

    /// Tells who waits for this event. Read off its envelope: most events are nobody's, and may be large.
    fn tell(&self, event: Message) {
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

/// The update that an event tells of.
fn key(event: &Message) -> Option<Key> {
    let project_id = subject::event_project(&event.subject)?;
    let id = event.headers.as_ref()?.get(MESSAGE_ID)?.as_str();
    // What is announced again after a recovery has the recovery's number behind the id.
    let update_id = id.split_once('-').map_or(id, |(id, _)| id);
    Some((project_id, update_id.parse().ok()?))
}

impl Waiter {
    /// Waits for the event. None when it cannot come any more; callers bound how long that may take.
    pub(crate) async fn event(&mut self) -> Option<Bytes> {
        self.event.as_mut()?.wait_for(Option::is_some).await.ok()?.clone()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.event = None;
        let mut waiting = self.outcomes.lock();
        if waiting.events.get(&self.key).is_some_and(|event| event.receiver_count() == 0) {
            waiting.events.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderMap;

    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([1; 12]);
    const UPDATE: ObjectId = ObjectId::from_bytes([2; 12]);

    fn event(project_id: ObjectId, id: &str, payload: &'static str) -> Message {
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, id);
        Message {
            subject: subject::event(project_id, None, true).into(),
            reply: None,
            payload: payload.into(),
            headers: Some(headers),
            status: None,
            description: None,
            length: 0,
        }
    }

    #[tokio::test]
    async fn all_who_wait_for_an_update_are_told_and_forgotten() {
        let outcomes = Arc::new(Outcomes::default());
        let mut waiters = [0; 3].map(|_| outcomes.register((PROJECT, UPDATE)).unwrap());
        outcomes.tell(event(UPDATE, &UPDATE.to_string(), "of another project"));
        outcomes.tell(event(PROJECT, &PROJECT.to_string(), "of another update"));
        outcomes.tell(event(PROJECT, "odd", "odd"));
        outcomes.tell(event(PROJECT, &format!("{UPDATE}-1"), "mine"));
        assert!(outcomes.is_idle());
        // A later one is not told, and does not go with the earlier ones.
        let mut late = outcomes.register((PROJECT, UPDATE)).unwrap();
        for waiter in &mut waiters {
            assert_eq!(waiter.event().await.unwrap(), "mine");
        }
        drop(waiters);
        assert!(!outcomes.is_idle());
        outcomes.tell(event(PROJECT, &UPDATE.to_string(), "again"));
        assert_eq!(late.event().await.unwrap(), "again");
    }

    #[tokio::test]
    async fn events_are_read_again_after_what_reads_them_died() {
        let nats = test_support::nats().await;
        let config = service_kit::config::NatsConfig::at(nats.url());
        let client = service_kit::nats::connect(&config, "gateway", &Default::default()).await.unwrap();
        let outcomes = Arc::new(Outcomes::default());
        for round in 0..3 {
            let mut waiter = outcomes.wait_for(&client, PROJECT, UPDATE).await.unwrap();
            let reader = outcomes.reading.lock().await.as_ref().map(JoinHandle::abort_handle).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(MESSAGE_ID, UPDATE.to_string());
            let subject = subject::event(PROJECT, None, true);
            client.publish_with_headers(subject, headers, "mine".into()).await.unwrap();
            let heard = tokio::time::timeout(Duration::from_secs(10), waiter.event()).await;
            assert_eq!(heard.unwrap().unwrap(), "mine", "round {round}");
            reader.abort();
            while !reader.is_finished() {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn who_gives_up_or_is_sent_away_leaves_nothing_behind() {
        let outcomes = Arc::new(Outcomes::default());
        let (one, two) = (outcomes.register((PROJECT, UPDATE)), outcomes.register((PROJECT, UPDATE)));
        drop(one);
        assert!(!outcomes.is_idle());
        drop(two);
        assert!(outcomes.is_idle());

        let mut last = outcomes.register((PROJECT, UPDATE)).unwrap();
        outcomes.close();
        assert_eq!(last.event().await, None);
        assert!(outcomes.register((PROJECT, UPDATE)).is_none());
    }

    #[test]
    fn no_more_wait_than_may() {
        let outcomes = Arc::new(Outcomes::default());
        let id = |n: usize| ObjectId::new(contract::Timestamp::from_millis(0), (n as u64).to_be_bytes());
        let waiters: Vec<_> = (0..MAX_WAITING).map(|n| outcomes.register((PROJECT, id(n))).unwrap()).collect();
        assert!(outcomes.register((PROJECT, id(MAX_WAITING))).is_none());
        drop(waiters);
        assert!(outcomes.register((PROJECT, id(MAX_WAITING))).is_some());
    }
}

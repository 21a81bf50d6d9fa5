//! 1 Accept: `GET /api/v1/events`: the outcomes of a project's updates as Server-Sent Events, from `LEAD_EVENTS`.
//!
//! Each client has a consumer of its own, which acks nothing and goes with it. Whatever goes wrong ends the answer: a client
//! comes again with the last id that it saw, and misses nothing.

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
    stream::Stream,
};
use axum::{
    body::Body,
    extract::Request,
    http::{
        HeaderMap, HeaderName, HeaderValue,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::Response,
};
use bytes::Bytes;
use contract::{
    ObjectId,
    event::{CompletionEvent, WebhookPayload},
    key::{ApiKey, Scope},
    rpc::RpcError,
    streams::{LEAD_EVENTS, identity},
    subject::events_of,
};
use futures::StreamExt;
use serde::Serialize;
use service_kit::clock;
use tokio_util::sync::CancellationToken;

use crate::{error::ApiError, fields::Fields, routes::Answer, server::App};

/// How often something is said where nothing happens, and looked whether the key still holds. Shorter notices a client that
/// is gone sooner, and asks NATS more often.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a client waits before it comes again.
const RETRY: Duration = Duration::from_secs(2);
/// What is asked of JetStream at once for a client; what is held for one is about twice that.
const PULL_MESSAGES: usize = 32;
const PULL_BYTES: usize = 2 << 20;
/// How long a pull waits at the server, how long that may be silent, and after how long it forgets a client that is gone.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const PULL_HEARTBEAT: Duration = Duration::from_secs(5);
const FORGET: Duration = Duration::from_secs(60);
/// What part of all places a single key may have.
const SHARE: usize = 4;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The clients that listen.
#[derive(Debug)]
pub(crate) struct Listeners {
    most: usize,
    /// How many each key has; only keys that have any.
    of_keys: Mutex<HashMap<ObjectId, usize>>,
    /// Ends all answers.
    stopping: CancellationToken,
}

impl Listeners {
    /// At most so many at once.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, of_keys: Mutex::default(), stopping: CancellationToken::new() }
    }

    /// Ends all answers, and lets no new ones begin.
    pub(crate) fn stop(&self) {
        self.stopping.cancel();
    }

    /// A place for one more, if there is one for this key.
    fn enter(self: &Arc<Self>, key_id: ObjectId) -> Option<Place> {
        let mut of_keys = self.of_keys.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = of_keys.values().sum();
        let of_key = of_keys.get(&key_id).copied().unwrap_or_default();
        if all >= self.most || of_key >= self.most.div_ceil(SHARE) || self.stopping.is_cancelled() {
            return None;
        }
        of_keys.insert(key_id, of_key + 1);
        Some(Place { listeners: self.clone(), key_id })
    }
}

/// A client's place, given back when it is dropped.
#[derive(Debug)]
struct Place {
    listeners: Arc<Listeners>,
    key_id: ObjectId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_keys = self.listeners.of_keys.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = of_keys.get_mut(&self.key_id) {
            *count -= 1;
            if *count == 0 {
                of_keys.remove(&self.key_id);
            }
        }
    }
}

/// A place in the events: which stream, and behind which of its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
struct EventId {
    stream: String,
    sequence: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.stream, self.sequence)
    }
}

impl FromStr for EventId {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        let parts = text.rsplit_once('-').and_then(|(stream, sequence)| Some((stream, sequence.parse().ok()?)));
        match parts {
            Some((stream, sequence)) if !stream.is_empty() => Ok(Self { stream: stream.to_owned(), sequence }),
            _ => Err(ApiError::field("Last-Event-ID", "must be the id of an event")),
        }
    }
}

/// What became of an update, as an event tells it: as the webhooks do, and why it failed for programs.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Event"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct Told<'a> {
    #[serde(flatten)]
    payload: WebhookPayload<'a>,
    /// Why it failed, for programs.
    error_code: Option<&'a str>,
}

impl<'a> From<&'a CompletionEvent> for Told<'a> {
    fn from(event: &'a CompletionEvent) -> Self {
        Self { payload: event.into(), error_code: event.error_code.as_deref() }
    }
}

/// Answers with events, until the client goes, the key ends or the gateway stops.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let after = last_event_id(&request)?;
    let broker = app.broker()?;
    let place = app.listeners.enter(key.key_id).ok_or(ApiError::TooManyListeners)?;
    let unavailable =
        |e: &dyn fmt::Display| RpcError::new(503, "unavailable", format!("the events cannot be read: {e}"));
    let stream = broker.js.get_stream(LEAD_EVENTS).await.map_err(|e| unavailable(&e))?;
    let info = stream.cached_info();
    let begin = begin(after, identity(info), info.state.first_sequence, info.state.last_sequence)?;
    let config = pull::Config {
        // Named, so that its subject is in the request, where NATS permissions see it.
        name: Some(format!("events-{}", clock::new_id())),
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: begin.sequence + 1 },
        ack_policy: AckPolicy::None,
        filter_subject: events_of(key.project_id),
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: FORGET,
        ..Default::default()
    };
    let consumer: PullConsumer = stream.create_consumer(config).await.map_err(|e| unavailable(&e))?;
    let messages = consumer
        .stream()
        .max_messages_per_batch(PULL_MESSAGES)
        .max_bytes_per_batch(PULL_BYTES)
        .expires(PULL_EXPIRES)
        .heartbeat(PULL_HEARTBEAT)
        .messages()
        .await
        .map_err(|e| unavailable(&e))?;
    let first = Bytes::from(format!("retry: {}\nid: {begin}\n\n", RETRY.as_millis()));
    let headers = request.headers().clone();
    let listening = Listening {
        app: app.clone(),
        headers,
        stream,
        consumer,
        messages,
        name: begin.stream,
        received: 0,
        _place: place,
    };
    let frames = futures::stream::once(std::future::ready(Ok::<_, Infallible>(first)))
        .chain(futures::stream::unfold(listening, Listening::next));
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// The id behind which a client wants to go on: from the header that browsers send, or a parameter for whoever cannot.
fn last_event_id(request: &Request) -> Result<Option<EventId>, ApiError> {
    let mut fields = Fields::from_query(request.uri().query().unwrap_or_default())?;
    let parameter = fields.text("lastEventId")?;
    let header = match request.headers().get(LAST_EVENT_ID) {
        None => None,
        Some(value) => {
            let text = value.to_str().map_err(|_| ApiError::field("Last-Event-ID", "must be the id of an event"))?;
            Some(text.to_owned()).filter(|text| !text.is_empty())
        }
    };
    header.or(parameter).map(|text| text.parse()).transpose()
}

/// Behind which message a client begins: the one that it names, else the last there is.
fn begin(after: Option<EventId>, stream: String, first: u64, last: u64) -> Result<EventId, ApiError> {
    match after {
        None => Ok(EventId { stream, sequence: last }),
        Some(id) if id.stream == stream && (first..=last + 1).contains(&(id.sequence.saturating_add(1))) => Ok(id),
        Some(_) => Err(ApiError::EventsGone),
    }
}

/// A client that listens.
struct Listening {
    app: Arc<App>,
    /// Of its request: its key is looked at again from time to time.
    headers: HeaderMap,
    stream: Stream,
    consumer: PullConsumer,
    messages: pull::Stream,
    /// The stream's identity.
    name: String,
    /// How many messages came.
    received: u64,
    _place: Place,
}

impl Listening {
    /// What is said next; nothing when it is over.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let stopping = self.app.listeners.stopping.clone();
        let frame = tokio::select! {
            () = stopping.cancelled() => None,
            frame = self.frame() => frame,
        };
        frame.map(|frame| (Ok(frame), self))
    }

    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            let message = match tokio::time::timeout(HEARTBEAT, self.messages.next()).await {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(e))) => {
                    tracing::debug!("a client's events broke off: {e}");
                    return None;
                }
                Ok(None) => return None,
                Err(_) => return self.heartbeat().await,
            };
            let sequence = self.sequence(&message)?;
            match serde_json::from_slice::<CompletionEvent>(&message.payload) {
                Ok(event) => {
                    let payload = serde_json::to_string(&Told::from(&event)).ok()?;
                    return Some(frame(&EventId { stream: self.name.clone(), sequence }, &payload).into());
                }
                // The webhook-notifier puts it among the dead letters.
                Err(e) => tracing::warn!(sequence, "an event cannot be read: {e}"),
            }
        }
    }

    /// A message's place in its stream; none where one before it went astray.
    fn sequence(&mut self, message: &jetstream::Message) -> Option<u64> {
        let info = message.info().ok()?;
        self.received += 1;
        (info.consumer_sequence == self.received).then_some(info.stream_sequence)
    }

    /// Says that the connection lives, and how far the events are where there are none to tell: who comes again much later
    /// must not be told that events are gone which were not his.
    async fn heartbeat(&mut self) -> Option<Bytes> {
        let key = self.app.authorize(&self.headers, Scope::LeadsRead);
        if key.is_err() {
            return None;
        }
        // In this order: what came between the two questions is pending.
        let last = self.stream.get_info().await.ok().map(|info| info.state.last_sequence);
        let told = self.consumer.get_info().await.ok();
        let all_told = told.filter(|info| info.num_pending == 0 && info.delivered.consumer_sequence == self.received);
        Some(match last.zip(all_told) {
            Some((sequence, _)) => format!("id: {}\n\n", EventId { stream: self.name.clone(), sequence }).into(),
            None => Bytes::from_static(b":\n\n"),
        })
    }
}

/// An event as it is sent. A line break ends a field, so a text of several lines is several fields.
fn frame(id: &EventId, text: &str) -> String {
    let mut frame = format!("id: {id}\n");
    for line in text.split(['\n', '\r']) {
        frame.push_str("data: ");
        frame.push_str(line);
        frame.push('\n');
    }
    frame.push('\n');
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CRM: ObjectId = ObjectId::from_bytes([1; 12]);
    const IMPORT: ObjectId = ObjectId::from_bytes([2; 12]);

    #[test]
    fn places_are_bounded_and_no_key_has_them_all() {
        let listeners = Arc::new(Listeners::new(8));
        let held = [CRM, CRM].map(|key_id| listeners.enter(key_id).unwrap());
        assert!(listeners.enter(CRM).is_none(), "a quarter");
        let others = (2..8).map(|n| listeners.enter(ObjectId::from_bytes([n / 2 + 1; 12]))).collect::<Vec<_>>();
        assert!(others.iter().all(Option::is_some));
        assert!(listeners.enter(ObjectId::from_bytes([9; 12])).is_none(), "all");
        drop((held, others));
        assert!(listeners.of_keys.lock().unwrap().is_empty());
        let _held = listeners.enter(IMPORT).unwrap();
        listeners.stop();
        assert!(listeners.enter(CRM).is_none());
    }

    #[test]
    fn where_a_client_begins() {
        let id = |stream: &str, sequence| Some(EventId { stream: stream.into(), sequence });
        let begin = |after| begin(after, "s".into(), 5, 9).map(|id| id.sequence);
        assert_eq!(begin(None), Ok(9));
        for sequence in 4..=9 {
            assert_eq!(begin(id("s", sequence)), Ok(sequence));
        }
        for gone in [id("s", 3), id("s", 10), id("s", u64::MAX), id("other", 7)] {
            assert_eq!(begin(gone), Err(ApiError::EventsGone));
        }
    }

    #[test]
    fn an_event_on_the_wire() {
        let id: EventId = "6b0426971c73026dafa27e40-7".parse().unwrap();
        assert_eq!(frame(&id, "{\"a\":\r\n1}"), "id: 6b0426971c73026dafa27e40-7\ndata: {\"a\":\ndata: \ndata: 1}\n\n");
        for odd in ["", "7", "-7", "x-", "x-y"] {
            assert!(odd.parse::<EventId>().is_err(), "{odd}");
        }
    }

    proptest! {
        #[test]
        fn ids_round_trip(stream in "[0-9a-f]{1,24}", sequence: u64) {
            let id = EventId { stream, sequence };
            prop_assert_eq!(id.to_string().parse::<EventId>().unwrap(), id);
        }

        /// As https://html.spec.whatwg.org/multipage/server-sent-events.html reads it.
        #[test]
        fn what_is_sent_is_what_is_read(lines in prop::collection::vec("[^\r\n]*", 1..5)) {
            let text = lines.join("\n");
            let frame = frame(&EventId { stream: "s".into(), sequence: 1 }, &text);
            let (fields, end) = frame.split_at(frame.len() - 1);
            let data = fields.lines().filter_map(|line| line.strip_prefix("data: ")).collect::<Vec<_>>();
            prop_assert_eq!(data.join("\n"), text);
            prop_assert_eq!(end, "\n");
        }
    }
}

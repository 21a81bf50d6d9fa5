//! 1 Accept: `GET /api/v1/events`: the outcomes of a project's updates as Server-Sent Events, from `LEAD_EVENTS`.
//!
//! Each client has its own consumer without acks, which the server deletes once it is idle. Any error ends the
//! response: the client reconnects with the last id that it received and misses nothing.

use std::{convert::Infallible, fmt, str::FromStr, sync::Arc, time::Duration};

use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
    stream::Stream,
};
use axum::{
    body::Body,
    extract::Request,
    http::{
        HeaderName, HeaderValue,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::Response,
};
use bytes::Bytes;
use contract::{
    ObjectId,
    event::CompletionEvent,
    key::ApiKey,
    streams::{LEAD_EVENTS, identity},
    subject::events_of,
};
use futures::StreamExt;
use http_api::Event;
use service_kit::{clock, shares::Permit};

use crate::{app::App, auth::KeyCheck, error::ApiError, request::fields, response::HandlerResult};

/// How often an idle stream sends a frame. Shorter detects a client that hung up sooner, but sends NATS more requests.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long a client waits before it reconnects.
const RETRY: Duration = Duration::from_secs(2);
/// The size of a pull from JetStream. The stream of a client holds about twice as much.
const PULL_MESSAGES: usize = 32;
const PULL_BYTES: usize = 2 << 20;
/// How long a pull waits at the server, how often the server sends a heartbeat meanwhile, and after how long it deletes
/// an idle consumer.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const PULL_HEARTBEAT: Duration = Duration::from_secs(5);
const INACTIVE: Duration = Duration::from_secs(60);

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// A position in the events: the identity of the stream, and the sequence of the last message before the position.
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

/// Streams events until the client disconnects, the key becomes invalid or the gateway stops.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> HandlerResult {
    let after = last_event_id(&request)?;
    let broker = app.connection()?;
    let permit = app.event_subscribers.acquire(key.project_id)?;
    let stream = broker.js.get_stream(LEAD_EVENTS).await.map_err(|e| unavailable(&e))?;
    let info = stream.cached_info();
    let start = start(after, identity(info), info.state.first_sequence, info.state.last_sequence)?;
    let config = pull::Config {
        // The name becomes a part of the request's subject, so that NATS permissions apply to it.
        name: Some(format!("events-{}", clock::new_id())),
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: start.sequence + 1 },
        ack_policy: AckPolicy::None,
        filter_subject: events_of(key.project_id),
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: INACTIVE,
        ..Default::default()
    };
    let consumer: PullConsumer = stream.create_consumer(config).await.map_err(|e| unavailable(&e))?;
    // The stream may have been purged before the consumer was created.
    let info = stream.get_info().await.map_err(|e| unavailable(&e))?;
    if info.state.first_sequence > start.sequence + 1 {
        return Err(ApiError::EventsGone);
    }
    let pending = consumer.cached_info().num_pending;
    let messages = consumer
        .stream()
        .max_messages_per_batch(PULL_MESSAGES)
        .max_bytes_per_batch(PULL_BYTES)
        .expires(PULL_EXPIRES)
        .heartbeat(PULL_HEARTBEAT)
        .messages()
        .await
        .map_err(|e| unavailable(&e))?;
    let first = Bytes::from(format!("retry: {}\nid: {start}\n\n", RETRY.as_millis()));
    let events = EventStream {
        app: app.clone(),
        key: KeyCheck::of(request.headers()),
        reader: EventReader { stream, consumer, messages, name: start.stream, received: 0, pending },
        _permit: permit,
    };
    let frames = futures::stream::once(std::future::ready(Ok::<_, Infallible>(first)))
        .chain(futures::stream::unfold(events, EventStream::next));
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn unavailable(error: &dyn fmt::Display) -> ApiError {
    tracing::warn!("events cannot be read: {error}");
    ApiError::Unavailable
}

/// The position to resume from: the header that browsers send, or a parameter for clients that cannot set headers.
fn last_event_id(request: &Request) -> Result<Option<EventId>, ApiError> {
    let mut fields = fields::from_query(request.uri().query().unwrap_or_default())?;
    let parameter = fields.text("lastEventId")?;
    // With a misspelt one, the client would miss events.
    fields.refuse_rest()?;
    let header = match request.headers().get(LAST_EVENT_ID) {
        None => None,
        Some(value) => {
            let text = value.to_str().map_err(|_| ApiError::field("Last-Event-ID", "must be the id of an event"))?;
            Some(text.to_owned()).filter(|text| !text.is_empty())
        }
    };
    header.or(parameter).map(|text| text.parse()).transpose()
}

/// Where the stream of a client starts: at the position it sent, else after the last event.
fn start(after: Option<EventId>, stream: String, first: u64, last: u64) -> Result<EventId, ApiError> {
    match after {
        None => Ok(EventId { stream, sequence: last }),
        Some(id) if id.stream == stream && (first..=last + 1).contains(&(id.sequence.saturating_add(1))) => Ok(id),
        Some(_) => Err(ApiError::EventsGone),
    }
}

/// The events for one client.
struct EventStream {
    app: Arc<App>,
    key: KeyCheck,
    reader: EventReader,
    _permit: Permit<ObjectId>,
}

/// Reads the events of a project.
struct EventReader {
    stream: Stream,
    consumer: PullConsumer,
    messages: pull::Stream,
    /// The stream's identity, a part of event ids.
    name: String,
    received: u64,
    /// How many events followed the last message.
    pending: u64,
}

impl EventStream {
    /// The next frame; none at the end.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let app = self.app.clone();
        let Self { key, reader, .. } = &mut self;
        let frame = tokio::select! {
            // Checked first, so that a stream that always has a next event ends, too.
            biased;
            () = app.event_subscribers.stopped() => None,
            _ = key.ended(&app.keys, &app.key_uses) => None,
            frame = reader.frame() => frame,
        };
        frame.map(|frame| (Ok(frame), self))
    }
}

impl EventReader {
    /// The next event, or a heartbeat; none at the end.
    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            let message = match tokio::time::timeout(HEARTBEAT, self.messages.next()).await {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(e))) => {
                    tracing::debug!("a client's event stream ended: {e}");
                    return None;
                }
                Ok(None) => return None,
                Err(_) => return Some(self.heartbeat().await),
            };
            let sequence = self.sequence(&message)?;
            match serde_json::from_slice::<CompletionEvent>(&message.payload) {
                Ok(event) => {
                    let payload = serde_json::to_string(&Event::from(event)).ok()?;
                    return Some(frame(&EventId { stream: self.name.clone(), sequence }, &payload).into());
                }
                // webhook-notifier makes it a dead letter.
                Err(e) => tracing::warn!(sequence, "cannot parse an event: {e}"),
            }
        }
    }

    /// A message's sequence in the stream; none if a message before it was lost.
    fn sequence(&mut self, message: &jetstream::Message) -> Option<u64> {
        let info = message.info().ok()?;
        self.received += 1;
        // If the stream is purged, the consumer goes on with the first message that is left, without a gap in its
        // sequences.
        let is_purged = info.pending + 1 < self.pending;
        self.pending = info.pending;
        (info.consumer_sequence == self.received && !is_purged).then_some(info.stream_sequence)
    }

    /// Keeps the connection alive. If all events were sent, advances the client's position to the end of the stream: a
    /// client that reconnects much later must not get an error because other projects' events are gone.
    async fn heartbeat(&mut self) -> Bytes {
        // In this order, so that a message that arrives between the two requests counts as pending.
        let last = self.stream.get_info().await.ok().map(|info| info.state.last_sequence);
        let consumer = self.consumer.get_info().await.ok();
        let all_sent =
            consumer.filter(|info| info.num_pending == 0 && info.delivered.consumer_sequence == self.received);
        match last.zip(all_sent) {
            Some((sequence, _)) => format!("id: {}\n\n", EventId { stream: self.name.clone(), sequence }).into(),
            None => Bytes::from_static(b":\n\n"),
        }
    }
}

/// An event on the wire. A line break ends a field, so a text of several lines is several fields.
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
pub(crate) fn operation() -> crate::openapi::Operation {
    use crate::openapi::text;
    crate::openapi::Operation::new("Events", "followEvents", "Follow events")
        .description(
            "Server-Sent Events with the outcomes of the project's updates. `data` of each is the body of the webhooks, with \
             `errorCode`. Resumable: with `Last-Event-ID` the stream continues after that event.",
        )
        .header("Last-Event-ID")
        .query("lastEventId", "As `Last-Event-ID`, for clients that cannot set headers", text())
        .streams::<Event>("text/event-stream", "Events", |event| {
            format!("id: 6b0426971c73026dafa27e40-7\ndata: {event}\n\n")
        })
        .errors(&[410])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_client_resumes_only_at_a_position_that_is_kept() {
        let id = |stream: &str, sequence| Some(EventId { stream: stream.into(), sequence });
        let start = |after| start(after, "s".into(), 5, 9).map(|id| id.sequence);
        assert_eq!(start(None), Ok(9));
        for sequence in 4..=9 {
            assert_eq!(start(id("s", sequence)), Ok(sequence));
        }
        for gone in [id("s", 3), id("s", 10), id("s", u64::MAX), id("other", 7)] {
            assert_eq!(start(gone), Err(ApiError::EventsGone));
        }
    }

    #[test]
    fn a_frame_has_an_id_and_lines_of_data() {
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

        /// Reads frames as <https://html.spec.whatwg.org/multipage/server-sent-events.html> specifies.
        #[test]
        fn frames_are_read_as_they_were_written(lines in prop::collection::vec("[^\r\n]*", 1..5)) {
            let text = lines.join("\n");
            let frame = frame(&EventId { stream: "s".into(), sequence: 1 }, &text);
            let (fields, end) = frame.split_at(frame.len() - 1);
            let data = fields.lines().filter_map(|line| line.strip_prefix("data: ")).collect::<Vec<_>>();
            prop_assert_eq!(data.join("\n"), text);
            prop_assert_eq!(end, "\n");
        }
    }
}

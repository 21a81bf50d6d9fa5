//! 1 Accept: bulk requests: many updates or call events in one body, parsed, logged and confirmed as they arrive.
//!
//! The commands of a body are logged in its order: the lines that have arrived form a chunk, and a chunk is published
//! after the previous one is acked. An invalid line does not affect the others. Memory holds one chunk of the body and
//! up to [`RESPONSE_BYTES`] of results, so that a client may send the whole body before it reads the first result.

use std::{convert::Infallible, num::NonZeroU32, sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream},
    extract::Request,
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{CONTENT_ENCODING, CONTENT_TYPE, IF_MATCH},
    },
    response::Response,
};
use bytes::Bytes;
use contract::{ObjectId, event::OutcomeKind, fields::BodyError, json::JsonFault, key::ApiKey};
use futures::{FutureExt, StreamExt, stream};
use http_api::BulkUpdateResult;
use http_body_util::{LengthLimitError, Limited};
use service_kit::{clock, shares::Permit};
use sha2::{Digest, Sha256};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tracing::Instrument;

use crate::{
    app::App,
    auth::KeyCheck,
    command::Command,
    command_log::{LogEntry, LogForm},
    error::ApiError,
    idempotency::{self, Claim, IDEMPOTENT_REPLAYED},
    json_splitter::{Item, JsonSplitter},
    outage::PendingRequest,
    request::{body, fields, trace::RequestTrace},
    response::HandlerResult,
};

/// Most updates in a body. A retry of more would repeat too much.
pub(crate) const MAX_LINES: usize = 10_000;
/// Most updates in a chunk. Larger chunks delay results; smaller ones sync the log more often.
const CHUNK_LINES: usize = 500;
/// Most bytes in a chunk, unless one line has more.
const CHUNK_BYTES: usize = 1 << 20;
/// Most bytes of results that wait for a slow client. Beyond them, the gateway stops reading the client's body. Ten
/// thousand results without errors or warnings are less than a quarter of the limit.
const RESPONSE_BYTES: usize = 4 << 20;
/// Most bytes that an encoded body may decode to. Without a limit, a few compressed megabytes could cause hours of
/// work.
const MAX_DECODED_BYTES: usize = 256 << 20;
/// How long the gateway waits for a body in total, not counting its own work.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a chunk waits for admission. The gateway reads no more of the body meanwhile.
const ADMISSION_PATIENCE: Duration = Duration::from_secs(30);
/// Longest `error` of a line, in characters: it may quote the request.
const ERROR_CHARS: usize = 500;

/// Serves a bulk request: responds with one line per command.
pub(crate) async fn serve(
    app: Arc<App>,
    key: Arc<ApiKey>,
    request: Request,
    kind: OutcomeKind,
    path: &'static str,
) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, path, request.headers());
    let admitted = match fields::refuse_query(&request) {
        Ok(()) => admit(&app, &key, kind, request.headers()).await,
        Err(e) => Err(e),
    };
    trace.record(admitted.as_ref().map(|_| StatusCode::OK));
    let (permit, claim) = admitted?;
    let is_encoded = request.headers().contains_key(CONTENT_ENCODING);
    let key_check = KeyCheck::of(request.headers());
    let mut body = body::decoded(request)?;
    if is_encoded {
        body = Body::new(Limited::new(body, MAX_DECODED_BYTES));
    }
    let (sender, receiver) = mpsc::unbounded_channel();
    let bulk = Bulk {
        app,
        kind,
        key,
        key_check,
        ids: claim.map(|claim| claim.update_id),
        trace,
        response: ResponseSender { sender, capacity: Arc::new(Semaphore::new(RESPONSE_BYTES)) },
        halted: None,
        _permit: permit,
    };
    // Not supervised: the task ends with the connection, and the command log tracks what it published.
    tokio::spawn(bulk.run(body.into_data_stream()).in_current_span());
    let chunks = stream::unfold(receiver, |mut receiver| async move {
        let ResponseChunk { text, .. } = receiver.recv().await?;
        Some((Ok::<_, Infallible>(text), receiver))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    if claim.is_some_and(|claim| claim.replayed) {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// The error of a body that ends early.
fn unreadable(error: &axum::BoxError) -> ApiError {
    match error.is::<LengthLimitError>() {
        true => ApiError::BodyTooLarge(MAX_DECODED_BYTES),
        false => ApiError::UnreadableBody(error.to_string()),
    }
}

/// Checks a request before its body is read.
async fn admit(
    app: &App,
    key: &ApiKey,
    kind: OutcomeKind,
    headers: &HeaderMap,
) -> Result<(Permit<ObjectId>, Option<Claim>), ApiError> {
    if !body::is_json_or_lines(headers) {
        return Err(ApiError::UnsupportedMediaType);
    }
    if headers.contains_key(IF_MATCH) {
        return Err(ApiError::field("If-Match", "applies to one lead: give $expectedVersion in each line"));
    }
    let client_key = idempotency::key(headers)?;
    let permit = app.bulk_permit(key.project_id)?;
    let broker = app.broker()?;
    let claim = match client_key {
        Some(client_key) => {
            // The body has not been read yet.
            let pending = PendingRequest { began: std::time::Instant::now(), bytes: 0 };
            Some(app.idempotency.claim_bulk(&broker.js, key.project_id, kind, &client_key, pending).await?)
        }
        None => None,
    };
    Ok((permit, claim))
}

/// A bulk request in progress.
struct Bulk {
    app: Arc<App>,
    kind: OutcomeKind,
    key: Arc<ApiKey>,
    key_check: KeyCheck,
    /// The id from which the ids of the commands are derived, if the request has an idempotency key.
    ids: Option<ObjectId>,
    /// Its span lasts until the response is complete.
    trace: RequestTrace,
    response: ResponseSender,
    /// Why nothing more is published: the log is unavailable or full, and each further chunk would time out; or the key
    /// is no longer valid.
    halted: Option<ApiError>,
    _permit: Permit<ObjectId>,
}

struct Line {
    number: usize,
    update: Result<Update, ApiError>,
}

/// A valid update.
struct Update {
    update_id: ObjectId,
    command: LogEntry,
    warnings: Vec<String>,
}

/// Lines that are published together.
#[derive(Default)]
struct Chunk {
    lines: Vec<Line>,
    bytes: usize,
}

struct ClientGone;

impl Bulk {
    async fn run(mut self, mut body: BodyDataStream) {
        let mut timeout = BODY_TIMEOUT;
        if let Err(ClientGone) = self.read(&mut body, &mut timeout).await {
            tracing::debug!("a client hung up on its bulk request");
            return;
        }
        // Closing a connection with unread data resets it, and the client may lose the last results.
        let rest = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = tokio::time::timeout(timeout, rest).await;
    }

    /// Processes the body as far as possible.
    async fn read(&mut self, body: &mut BodyDataStream, timeout: &mut Duration) -> Result<(), ClientGone> {
        let mut splitter = JsonSplitter::new(self.app.max_body_bytes);
        let mut chunk = Chunk::default();
        let mut number = 0;
        let max = self.app.rates.max_updates().map_or(CHUNK_LINES, |max| CHUNK_LINES.min(max.get() as usize));
        let app = self.app.clone();
        loop {
            while let Some(item) = splitter.next() {
                number += 1;
                let max = max.min(app.command_log.budget.affordable(self.key.project_id, std::time::Instant::now()));
                if !self.add_line(&mut chunk, number, item) {
                    return self.publish(&mut chunk).await;
                }
                if chunk.lines.len() >= max || chunk.bytes >= CHUNK_BYTES {
                    self.publish(&mut chunk).await?;
                }
            }
            let arrived = match body.next().now_or_never() {
                Some(arrived) => Ok(arrived),
                // Results do not wait for lines that may take long to arrive.
                None => {
                    self.publish(&mut chunk).await?;
                    let started = Instant::now();
                    let arrived = tokio::time::timeout(*timeout, body.next()).await;
                    *timeout = timeout.saturating_sub(started.elapsed());
                    arrived
                }
            };
            let error = match arrived {
                Ok(Some(Ok(bytes))) => {
                    splitter.push(bytes);
                    continue;
                }
                Ok(None) => {
                    if let Some(item) = splitter.finish() {
                        self.add_line(&mut chunk, number + 1, item);
                    }
                    return self.publish(&mut chunk).await;
                }
                Ok(Some(Err(e))) => unreadable(&e.into_inner()),
                Err(_) => ApiError::BodyTimeout(BODY_TIMEOUT.as_secs()),
            };
            chunk.lines.push(Line { number: number + 1, update: Err(error) });
            return self.publish(&mut chunk).await;
        }
    }

    /// Adds a line to the chunk; returns false if no line can follow.
    fn add_line(&self, chunk: &mut Chunk, number: usize, item: Item) -> bool {
        let item_bytes = if let Item::Text(text) = &item { text.len() } else { 0 };
        let (update, last) = match item {
            _ if number > MAX_LINES => (Err(ApiError::TooManyLines(MAX_LINES)), true),
            Item::Text(text) => (self.parse(&text, number), false),
            Item::TooLong => (Err(ApiError::BodyTooLarge(self.app.max_body_bytes)), false),
            Item::Broken(why) => (Err(BodyError::InvalidJson(JsonFault::Invalid(why.into())).into()), true),
        };
        // An invalid line counts with its own size: its error may quote it.
        chunk.bytes += update.as_ref().map_or(item_bytes, |update| update.command.payload.len());
        chunk.lines.push(Line { number, update });
        !last
    }

    fn parse(&self, text: &[u8], number: usize) -> Result<Update, ApiError> {
        let (mut command, warnings) = Command::parse_line(self.kind, text, self.key.project_id)?;
        let update_id = match self.ids {
            Some(ids) => line_id(ids, number, text),
            None => clock::new_id(),
        };
        command.identify(update_id, Some(self.key.key_id));
        let command = LogEntry::new(self.key.project_id, update_id, &command)?;
        Ok(Update { update_id, command, warnings })
    }

    /// Publishes a chunk and sends the results of its lines.
    async fn publish(&mut self, chunk: &mut Chunk) -> Result<(), ClientGone> {
        let lines = std::mem::take(chunk).lines;
        let Some(count) = u32::try_from(lines.len()).ok().and_then(NonZeroU32::new) else { return Ok(()) };
        while let Some(wait) = self.app.rates.take_updates(self.key.key_id, count) {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.response.sender.closed() => return Err(ClientGone),
            }
        }
        if let (None, Err(error)) = (&self.halted, self.key_check.check(&self.app.keys, &self.app.key_uses)) {
            self.halted = Some(error);
        }
        let updates: Vec<_> = lines.iter().flat_map(|line| &line.update).map(|update| update.command.clone()).collect();
        let broker = match &self.halted {
            Some(error) => Err(error.clone()),
            None => self.app.broker(),
        };
        let logged = match broker {
            Ok(broker) => {
                let log = &self.app.command_log;
                let (project_id, trace) = (self.key.project_id, Some(&*self.trace.traceparent));
                let deadline = std::time::Instant::now() + ADMISSION_PATIENCE;
                let logged = log.append_all(&broker.commands, project_id, updates, trace, LogForm::Packs, deadline);
                tokio::select! {
                    logged = logged => logged,
                    // The publish in progress continues in a task of the command log.
                    () = self.response.sender.closed() => return Err(ClientGone),
                }
            }
            Err(error) => vec![Err(error); updates.len()],
        };
        let mut logged = logged.into_iter();
        let mut text = Vec::new();
        for Line { number, update } in lines {
            let accepted = update.and_then(|update| {
                let logged = logged.next().unwrap_or(Err(ApiError::Internal));
                logged.map(|_| update)
            });
            if let Err(error) = &accepted {
                self.app.metrics.count_refusal(error.label());
                self.halt_after(error);
            }
            write_result(&mut text, number, accepted);
        }
        self.response.send(text.into()).await
    }

    /// Publishes nothing more after an error that every further line would get, too.
    fn halt_after(&mut self, error: &ApiError) {
        if self.halted.is_none() {
            self.halted = match error {
                ApiError::LogUnavailable | ApiError::LogFull | ApiError::LogRefused(_) => Some(error.clone()),
                ApiError::BrokerUnavailable | ApiError::NotConfirmed(_) => Some(ApiError::BrokerUnavailable),
                _ => None,
            };
        }
    }
}

/// The id of a line's update if the request has an idempotency key: in a repeated request, the same line at the same
/// position is the same update.
fn line_id(ids: ObjectId, number: usize, text: &[u8]) -> ObjectId {
    let mut digest = Sha256::new();
    digest.update(ids.as_bytes());
    digest.update((number as u64).to_be_bytes());
    digest.update(text);
    let mut random = [0; 8];
    random.copy_from_slice(&digest.finalize()[..8]);
    ObjectId::new(ids.timestamp(), random)
}

fn write_result(text: &mut Vec<u8>, line: usize, accepted: Result<Update, ApiError>) {
    let result = match accepted {
        Ok(Update { update_id, warnings, .. }) => {
            BulkUpdateResult { line, success: true, update_id: Some(update_id), error: None, code: None, warnings }
        }
        Err(error) => BulkUpdateResult {
            line,
            success: false,
            update_id: None,
            error: Some(error.to_string().chars().take(ERROR_CHARS).collect()),
            code: Some(error.code().to_owned().into()),
            warnings: Vec::new(),
        },
    };
    // Writing numbers and texts to memory cannot fail.
    let _ = serde_json::to_writer(&mut *text, &result);
    text.push(b'\n');
}

/// A part of the response. It holds its part of [`RESPONSE_BYTES`] until the client reads it.
struct ResponseChunk {
    text: Bytes,
    _capacity: OwnedSemaphorePermit,
}

struct ResponseSender {
    sender: mpsc::UnboundedSender<ResponseChunk>,
    capacity: Arc<Semaphore>,
}

impl ResponseSender {
    /// Sends a part of the response once there is capacity for it.
    async fn send(&self, text: Bytes) -> Result<(), ClientGone> {
        let bytes = u32::try_from(text.len().min(RESPONSE_BYTES)).unwrap_or(u32::MAX);
        let capacity = tokio::select! {
            capacity = self.capacity.clone().acquire_many_owned(bytes) => capacity.map_err(|_| ClientGone)?,
            () = self.sender.closed() => return Err(ClientGone),
        };
        self.sender.send(ResponseChunk { text, _capacity: capacity }).map_err(|_| ClientGone)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn results_name_their_line_and_truncate_errors() {
        let mut text = Vec::new();
        let update = |warnings: &[&str]| Update {
            update_id: ObjectId::from_bytes([1; 12]),
            command: LogEntry::new(
                ObjectId::from_bytes([2; 12]),
                ObjectId::from_bytes([1; 12]),
                &Command::CallStarted(Default::default()),
            )
            .unwrap(),
            warnings: warnings.iter().map(|&text| text.to_owned()).collect(),
        };
        write_result(&mut text, 1, Ok(update(&[])));
        write_result(&mut text, 2, Err(ApiError::field("x".repeat(600), "is odd")));
        write_result(&mut text, 3, Ok(update(&["disposition is ignored without targetState"])));
        write_result(&mut text, 10_001, Err(ApiError::TooManyLines(MAX_LINES)));
        let text = String::from_utf8(text).unwrap().replace(&"x".repeat(500), "xxx…");
        insta::assert_snapshot!(text, @r#"
        {"line":1,"success":true,"updateId":"010101010101010101010101"}
        {"line":2,"success":false,"error":"xxx…","code":"invalid_field"}
        {"line":3,"success":true,"updateId":"010101010101010101010101","warnings":["disposition is ignored without targetState"]}
        {"line":10001,"success":false,"error":"A bulk request may have 10000 updates; this one and all later ones were not read","code":"too_many_lines"}
        "#);
    }

    proptest! {
        #[test]
        fn a_line_is_the_same_update_only_at_the_same_place_of_the_same_request(
            ids: [u8; 12], other: [u8; 12], number in 1_usize..10, text: Vec<u8>, byte: u8,
        ) {
            let ids = ObjectId::from_bytes(ids);
            let id = line_id(ids, number, &text);
            prop_assert_eq!(line_id(ids, number, &text), id);
            prop_assert_eq!(id.timestamp(), ids.timestamp());
            prop_assert_ne!(line_id(ids, number + 1, &text), id);
            prop_assert_ne!(line_id(ids, number, &[&text[..], &[byte]].concat()), id);
            prop_assume!(other != *ids.as_bytes());
            prop_assert_ne!(line_id(ObjectId::from_bytes(other), number, &text), id);
        }
    }
}

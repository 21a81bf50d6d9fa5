//! 1 Accept: `POST /api/v1/leads/update/bulk`: many updates in one body, read, logged and answered as they arrive.
//!
//! The updates of a body are logged in its order: they are gathered to chunks of what is there, and a chunk is published
//! after the one before is acked. What is wrong with a line is that line's. Of a body, one chunk is held at a time, and
//! answers up to [`ANSWER_BYTES`]: a client may send all of it before it takes the first answer.

use std::{convert::Infallible, num::NonZeroU32, sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream},
    extract::Request,
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{CONTENT_TYPE, IF_MATCH},
    },
    response::Response,
};
use bytes::Bytes;
use contract::{ObjectId, json::JsonFault, key::ApiKey};
use futures::{FutureExt, StreamExt, stream};
use serde::Serialize;
use service_kit::{clock, traces::Span};
use sha2::{Digest, Sha256};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tracing::Instrument;

use crate::{
    body,
    error::ApiError,
    idempotency::{self, Claim, IDEMPOTENT_REPLAYED},
    lines::{Cutter, Piece},
    routes::{
        Answer,
        update_lead::{self, Asked},
    },
    server::App,
};

/// Where it is served.
pub(crate) const ROUTE: &str = "/api/v1/leads/update/bulk";

/// Most updates in a body. Retries of more would be too much to do twice.
pub(crate) const MAX_LINES: usize = 10_000;
/// Most updates that are published together. More of them wait longer for their answers, fewer sync the log more often.
const CHUNK_LINES: usize = 500;
/// Most bytes that are published together, unless one line has more.
const CHUNK_BYTES: usize = 1 << 20;
/// Most bytes of answers that are held for a client that does not take them yet; with more it is read no further. Ten
/// thousand plain answers are less than a quarter of it.
const ANSWER_BYTES: usize = 4 << 20;
/// How long the gateway waits for a body to arrive, all in all; what it does itself is not counted.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest `error` of a line, in characters: it may quote what was sent.
const ERROR_CHARS: usize = 500;

/// Answers with a line per update.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let (mut span, traceparent) = update_lead::begin_trace(&app, ROUTE, request.headers());
    let begun = begin(&app, &key, request.headers()).await;
    update_lead::note_answer(&mut span, begun.as_ref().map(|_| StatusCode::OK));
    let (slot, claim) = begun?;
    let (answers, told) = mpsc::unbounded_channel();
    let bulk = Bulk {
        app,
        key,
        ids: claim.map(|claim| claim.update_id),
        traceparent,
        answers: Answers { out: answers, room: Arc::new(Semaphore::new(ANSWER_BYTES)) },
        halted: None,
        _slot: slot,
        _span: span,
    };
    // Not supervised: it ends with the connection, and what it published is supervised by the command log.
    tokio::spawn(bulk.run(request.into_body().into_data_stream()).in_current_span());
    let text = stream::unfold(told, |mut told| async move {
        let Told { text, .. } = told.recv().await?;
        Some((Ok::<_, Infallible>(text), told))
    });
    let mut response = Response::new(Body::from_stream(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    if claim.is_some_and(|claim| claim.replayed) {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// What a request needs before its body is read.
async fn begin(
    app: &App,
    key: &ApiKey,
    headers: &HeaderMap,
) -> Result<(OwnedSemaphorePermit, Option<Claim>), ApiError> {
    if !body::is_json_or_lines(headers) {
        return Err(ApiError::UnsupportedMediaType);
    }
    if headers.contains_key(IF_MATCH) {
        return Err(ApiError::field("If-Match", "is about one lead: give expectedVersion in each line"));
    }
    let client_key = idempotency::key(headers)?;
    let slot = app.bulk_slot()?;
    let broker = app.broker()?;
    let claim = match client_key {
        Some(client_key) => Some(app.idempotency.claim_bulk(&broker.js, key.project_id, &client_key).await?),
        None => None,
    };
    Ok((slot, claim))
}

/// A bulk request under way.
struct Bulk {
    app: Arc<App>,
    key: Arc<ApiKey>,
    /// What the updates' ids follow from, where the request has an idempotency key.
    ids: Option<ObjectId>,
    traceparent: String,
    answers: Answers,
    /// Why no more is published: the log is away or full, and to try again with every chunk would take for ever.
    halted: Option<ApiError>,
    _slot: OwnedSemaphorePermit,
    /// The request's: it lasts until the body is read and answered.
    _span: Span,
}

/// A line that was read.
struct Line {
    number: usize,
    read: Result<Update, ApiError>,
}

/// An update that may be logged.
struct Update {
    update_id: ObjectId,
    command: Bytes,
    warnings: Vec<String>,
}

/// Lines that are published together.
#[derive(Default)]
struct Chunk {
    lines: Vec<Line>,
    bytes: usize,
}

/// The client hung up.
struct Gone;

impl Bulk {
    async fn run(mut self, mut body: BodyDataStream) {
        let mut patience = PATIENCE;
        if let Err(Gone) = self.read(&mut body, &mut patience).await {
            tracing::debug!("a client hung up on its bulk request");
            return;
        }
        // A connection with something unread is reset when it is closed, and may take the last answers with it.
        let rest = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = tokio::time::timeout(patience, rest).await;
    }

    /// Reads and answers the body, as far as it can be.
    async fn read(&mut self, body: &mut BodyDataStream, patience: &mut Duration) -> Result<(), Gone> {
        let mut cutter = Cutter::new(self.app.max_body_bytes);
        let mut chunk = Chunk::default();
        let mut number = 0;
        let most = self.app.rates.most_updates().map_or(CHUNK_LINES, |most| CHUNK_LINES.min(most.get() as usize));
        loop {
            while let Some(piece) = cutter.next() {
                number += 1;
                if !self.take(&mut chunk, number, piece) {
                    return self.publish(&mut chunk).await;
                }
                if chunk.lines.len() >= most || chunk.bytes >= CHUNK_BYTES {
                    self.publish(&mut chunk).await?;
                }
            }
            let arrived = match body.next().now_or_never() {
                Some(arrived) => Ok(arrived),
                // Nobody waits for lines that may be long in coming.
                None => {
                    self.publish(&mut chunk).await?;
                    let begun = Instant::now();
                    let arrived = tokio::time::timeout(*patience, body.next()).await;
                    *patience = patience.saturating_sub(begun.elapsed());
                    arrived
                }
            };
            let error = match arrived {
                Ok(Some(Ok(bytes))) => {
                    cutter.push(bytes);
                    continue;
                }
                Ok(None) => {
                    if let Some(piece) = cutter.finish() {
                        self.take(&mut chunk, number + 1, piece);
                    }
                    return self.publish(&mut chunk).await;
                }
                Ok(Some(Err(e))) => ApiError::UnreadableBody(e.to_string()),
                Err(_) => ApiError::BodyTimeout(PATIENCE.as_secs()),
            };
            chunk.lines.push(Line { number: number + 1, read: Err(error) });
            return self.publish(&mut chunk).await;
        }
    }

    /// Takes a line into the chunk; false if no other can follow.
    fn take(&self, chunk: &mut Chunk, number: usize, piece: Piece) -> bool {
        let (read, last) = match piece {
            _ if number > MAX_LINES => (Err(ApiError::TooManyLines(MAX_LINES)), true),
            Piece::Text(text) => (self.parse(&text, number), false),
            Piece::TooLong => (Err(ApiError::LineTooLarge(self.app.max_body_bytes)), false),
            Piece::Broken(why) => (Err(ApiError::InvalidJson(JsonFault::Invalid(why.into()))), true),
        };
        chunk.bytes += read.as_ref().map_or(0, |update| update.command.len());
        chunk.lines.push(Line { number, read });
        !last
    }

    fn parse(&self, text: &[u8], number: usize) -> Result<Update, ApiError> {
        let Asked { mut command, warnings, dry_run } = update_lead::parse(text, &self.key)?;
        if dry_run {
            return Err(ApiError::field("dryRun", "is for single updates"));
        }
        let update_id = match self.ids {
            Some(ids) => line_id(ids, number, text),
            None => clock::new_id(),
        };
        command.update_id = Some(update_id);
        let command = serde_json::to_vec(&command).map_err(|_| ApiError::Internal)?;
        Ok(Update { update_id, command: command.into(), warnings })
    }

    /// Publishes a chunk and answers its lines.
    async fn publish(&mut self, chunk: &mut Chunk) -> Result<(), Gone> {
        let lines = std::mem::take(chunk).lines;
        let Some(count) = u32::try_from(lines.len()).ok().and_then(NonZeroU32::new) else { return Ok(()) };
        while let Some(wait) = self.app.rates.take_updates(self.key.key_id, count) {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.answers.out.closed() => return Err(Gone),
            }
        }
        let updates: Vec<_> =
            lines.iter().flat_map(|line| &line.read).map(|update| (update.update_id, update.command.clone())).collect();
        let broker = match &self.halted {
            Some(error) => Err(error.clone()),
            None => self.app.broker(),
        };
        let logged = match broker {
            Ok(broker) => {
                let log = &self.app.command_log;
                log.append_all(&broker.commands, self.key.project_id, updates, &self.traceparent).await
            }
            Err(error) => vec![Err(error); updates.len()],
        };
        let mut logged = logged.into_iter();
        let mut text = Vec::new();
        for Line { number, read } in lines {
            let accepted = read.and_then(|update| {
                let logged = logged.next().unwrap_or(Err(ApiError::Internal));
                logged.map(|()| update)
            });
            if let Err(error) = &accepted {
                self.app.metrics.refused(error);
                self.halt_after(error);
            }
            write_answer(&mut text, number, &accepted);
        }
        self.answers.tell(text.into()).await
    }

    /// Whether what a line met will be met by all that follow.
    fn halt_after(&mut self, error: &ApiError) {
        if self.halted.is_none() {
            self.halted = match error {
                ApiError::LogFull => Some(ApiError::LogFull),
                ApiError::BrokerUnavailable | ApiError::NotConfirmed(_) => Some(ApiError::BrokerUnavailable),
                _ => None,
            };
        }
    }
}

/// The id of a line's update where the request has an idempotency key: the same line at the same place is the same update,
/// whichever request brings it.
fn line_id(ids: ObjectId, number: usize, text: &[u8]) -> ObjectId {
    let mut digest = Sha256::new();
    digest.update(ids.as_bytes());
    digest.update((number as u64).to_be_bytes());
    digest.update(text);
    let mut random = [0; 8];
    random.copy_from_slice(&digest.finalize()[..8]);
    ObjectId::new(ids.timestamp(), random)
}

/// A line of the answer.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "LineAnswer"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct LineAnswer<'a> {
    line: usize,
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    update_id: Option<ObjectId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

fn write_answer(text: &mut Vec<u8>, line: usize, accepted: &Result<Update, ApiError>) {
    let answer = match accepted {
        Ok(Update { update_id, warnings, .. }) => {
            LineAnswer { line, success: true, update_id: Some(*update_id), error: None, code: None, warnings }
        }
        Err(error) => {
            let told = error.to_string().chars().take(ERROR_CHARS).collect();
            LineAnswer {
                line,
                success: false,
                update_id: None,
                error: Some(told),
                code: Some(error.code()),
                warnings: &[],
            }
        }
    };
    // Numbers and texts into memory: nothing that can fail.
    let _ = serde_json::to_writer(&mut *text, &answer);
    text.push(b'\n');
}

/// What was answered; it has its room until the client takes it.
struct Told {
    text: Bytes,
    _room: OwnedSemaphorePermit,
}

/// The way to the client.
struct Answers {
    out: mpsc::UnboundedSender<Told>,
    room: Arc<Semaphore>,
}

impl Answers {
    /// Answers, as soon as there is room for it.
    async fn tell(&self, text: Bytes) -> Result<(), Gone> {
        let bytes = u32::try_from(text.len().min(ANSWER_BYTES)).unwrap_or(u32::MAX);
        let room = tokio::select! {
            room = self.room.clone().acquire_many_owned(bytes) => room.map_err(|_| Gone)?,
            () = self.out.closed() => return Err(Gone),
        };
        self.out.send(Told { text, _room: room }).map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn answers_of_lines() {
        let mut text = Vec::new();
        let update = |warnings: &[&str]| Update {
            update_id: ObjectId::from_bytes([1; 12]),
            command: Bytes::new(),
            warnings: warnings.iter().map(|&text| text.to_owned()).collect(),
        };
        write_answer(&mut text, 1, &Ok(update(&[])));
        write_answer(&mut text, 2, &Err(ApiError::field("x".repeat(600), "is odd")));
        write_answer(&mut text, 3, &Ok(update(&["disposition is ignored without targetState"])));
        write_answer(&mut text, 10_001, &Err(ApiError::TooManyLines(MAX_LINES)));
        let text = String::from_utf8(text).unwrap().replace(&"x".repeat(500), "xxx…");
        insta::assert_snapshot!(text, @r#"
        {"line":1,"success":true,"updateId":"010101010101010101010101"}
        {"line":2,"success":false,"error":"xxx…","code":"invalid_field"}
        {"line":3,"success":true,"updateId":"010101010101010101010101","warnings":["disposition is ignored without targetState"]}
        {"line":10001,"success":false,"error":"A bulk request takes 10000 updates; this one and what comes after it was not read","code":"too_many_lines"}
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

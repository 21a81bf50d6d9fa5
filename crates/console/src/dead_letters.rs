//! Reads dead letters: commands and events that could not be parsed or applied.

use std::{collections::BTreeMap, pin::pin};

use async_nats::{
    HeaderMap,
    jetstream::{
        self,
        message::StreamMessage,
        stream::{LastRawMessageErrorKind, Stream},
    },
};
use contract::{Timestamp, headers, replay::Replay, streams::LEAD_DEAD_LETTERS, subject};
use futures::{StreamExt, TryStreamExt, stream};
use service_kit::nats::error_chain;

use crate::fault::Fault;

/// How many letters are listed.
const NEWEST: usize = 50;
/// How many messages of the stream are read for them. Each replay adds two notes.
const MOST_READ: u64 = 500;
const CONCURRENT_READS: usize = 16;

/// A dead letter, without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Letter {
    /// Its sequence in the stream.
    pub(crate) number: u64,
    pub(crate) reason: String,
    pub(crate) error: String,
    /// The subject of the original message.
    pub(crate) subject: String,
    pub(crate) dead_since: Timestamp,
    /// The original length of a truncated body.
    pub(crate) truncated_from: Option<u64>,
    /// The last note about a replay, and its sequence.
    pub(crate) replay: Option<(u64, Replay)>,
}

impl Letter {
    fn new(message: &StreamMessage) -> Self {
        let header = |name| text(&message.headers, name);
        Self {
            number: message.sequence,
            reason: message.subject.rsplit('.').next().unwrap_or_default().to_owned(),
            error: header(headers::DEAD_LETTER_ERROR).unwrap_or_default(),
            subject: header(headers::ORIGIN_SUBJECT).unwrap_or_default(),
            dead_since: message.time.into(),
            truncated_from: header(headers::TRUNCATED_FROM).and_then(|text| text.parse().ok()),
            replay: None,
        }
    }
}

/// The newest letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Newest {
    /// The newest first.
    pub(crate) letters: Vec<Letter>,
    /// Whether the stream may have older ones.
    pub(crate) may_have_more: bool,
}

fn text(map: &HeaderMap, name: &str) -> Option<String> {
    map.get(name).map(|value| value.as_str().to_owned())
}

/// The newest letters.
pub(crate) async fn newest(js: &jetstream::Context) -> Result<Newest, Fault> {
    let stream = open(js).await?;
    let state = &stream.cached_info().state;
    let first = state.first_sequence.max(state.last_sequence.saturating_sub(MOST_READ - 1));
    let messages = stream::iter((first..=state.last_sequence).rev()).map(|sequence| read(&stream, sequence));
    let mut messages = pin!(messages.buffered(CONCURRENT_READS));
    let (mut letters, mut notes) = (Vec::new(), BTreeMap::new());
    while letters.len() < NEWEST
        && let Some(message) = messages.try_next().await?
    {
        let Some(message) = message else { continue };
        match subject::replayed_letter(&message.subject) {
            // The newest note comes first, and all notes of a letter before the letter.
            Some(number) => {
                notes.entry(number).or_insert_with(|| note(&message));
            }
            None => {
                let replay = notes.remove(&message.sequence).flatten();
                letters.push(Letter { replay, ..Letter::new(&message) });
            }
        }
    }
    let may_have_more = letters.len() == NEWEST || first > state.first_sequence;
    Ok(Newest { letters, may_have_more })
}

/// One letter and its body.
pub(crate) async fn get(js: &jetstream::Context, number: u64) -> Result<(Letter, StreamMessage), Fault> {
    let stream = open(js).await?;
    let message = read(&stream, number).await?.filter(|message| subject::replayed_letter(&message.subject).is_none());
    let message = message.ok_or_else(|| Fault::NotFound(format!("There is no dead letter {number}.")))?;
    let last = optional(stream.get_last_raw_message_by_subject(&subject::replayed(number)).await)?;
    let letter = Letter { replay: last.as_ref().and_then(note), ..Letter::new(&message) };
    Ok((letter, message))
}

fn note(message: &StreamMessage) -> Option<(u64, Replay)> {
    Some((message.sequence, text(&message.headers, headers::REPLAY)?.parse().ok()?))
}

async fn open(js: &jetstream::Context) -> Result<Stream, Fault> {
    js.get_stream(LEAD_DEAD_LETTERS).await.map_err(|e| unavailable(&e))
}

async fn read(stream: &Stream, sequence: u64) -> Result<Option<StreamMessage>, Fault> {
    // A stream that never had a message ends at 0, which the server refuses to look up.
    if sequence == 0 {
        return Ok(None);
    }
    optional(stream.get_raw_message(sequence).await)
}

/// None if the stream does not have the message.
fn optional(
    message: Result<StreamMessage, async_nats::error::Error<LastRawMessageErrorKind>>,
) -> Result<Option<StreamMessage>, Fault> {
    match message {
        Ok(message) => Ok(Some(message)),
        Err(e) if e.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(unavailable(&e)),
    }
}

fn unavailable(error: &(dyn std::error::Error + 'static)) -> Fault {
    tracing::warn!("cannot read {LEAD_DEAD_LETTERS}: {}", error_chain(error));
    Fault::Unavailable("The dead letters cannot be read. Reload the page to try again.".into())
}

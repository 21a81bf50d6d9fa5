//! Reads dead letters: messages of the command log that could not be applied.

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

/// How many messages of the stream are read for the newest letters. Notes about replays are among them.
const NEWEST: u64 = 50;
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

fn text(map: &HeaderMap, name: &str) -> Option<String> {
    map.get(name).map(|value| value.as_str().to_owned())
}

/// The newest letters, newest first.
pub(crate) async fn newest(js: &jetstream::Context) -> Result<Vec<Letter>, Fault> {
    let stream = open(js).await?;
    let state = &stream.cached_info().state;
    let first = state.first_sequence.max(state.last_sequence.saturating_sub(NEWEST - 1));
    let messages: Vec<_> = stream::iter((first..=state.last_sequence).rev())
        .map(|sequence| read(&stream, sequence))
        .buffered(CONCURRENT_READS)
        .try_filter_map(async |message| Ok(message))
        .try_collect()
        .await?;
    let mut letters: Vec<Letter> = Vec::new();
    let mut notes = std::collections::BTreeMap::new();
    for message in &messages {
        match subject::replayed_letter(&message.subject) {
            // The newest note comes first, and all notes of a letter before the letter.
            Some(number) => {
                notes.entry(number).or_insert_with(|| note(message));
            }
            None => letters.push(Letter::new(message)),
        }
    }
    for letter in &mut letters {
        letter.replay = notes.remove(&letter.number).flatten();
    }
    Ok(letters)
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

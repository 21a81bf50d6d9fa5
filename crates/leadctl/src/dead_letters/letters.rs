//! Reads the stream of dead letters, and replays letters with a note in the same stream.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use async_nats::{
    HeaderMap,
    jetstream::{
        self,
        message::StreamMessage,
        stream::{LastRawMessageErrorKind, Stream},
    },
};
use bytes::Bytes;
use contract::{Timestamp, headers, replay::Replay, rpc::RpcError, streams::LEAD_DEAD_LETTERS, subject};
use serde::Serialize;
use service_kit::{
    nats,
    publish::{self, PublishError},
    replay_note::write_replay_note,
};

use crate::{
    clients::{admin::Admin, stream_reader::StreamReader},
    output::progress::Progress,
};

/// A dead letter, without its body.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
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
    /// The dead letter whose replay became this one.
    pub(crate) replay_of: Option<u64>,
    /// The last note about a replay.
    pub(crate) replay: Option<Note>,
}

/// A note about a replay.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Note {
    #[serde(skip)]
    pub(crate) sequence: u64,
    pub(crate) at: Timestamp,
    #[serde(flatten)]
    pub(crate) replay: Replay,
}

impl Letter {
    fn new(number: u64, dead_since: Timestamp, subject: &str, map: &HeaderMap) -> Self {
        let header = |name| map.get(name).map(|value| value.as_str().to_owned());
        let number_in = |name| header(name)?.parse().ok();
        Self {
            number,
            reason: subject.rsplit('.').next().unwrap_or_default().to_owned(),
            error: header(headers::DEAD_LETTER_ERROR).unwrap_or_default(),
            subject: header(headers::ORIGIN_SUBJECT).unwrap_or_default(),
            dead_since,
            truncated_from: number_in(headers::TRUNCATED_FROM),
            replay_of: number_in(headers::REPLAY_OF),
            replay: None,
        }
    }

    pub(crate) fn was_replayed(&self) -> bool {
        matches!(self.replay, Some(Note { replay: Replay::Sent { .. }, .. }))
    }

    /// Remarks for the end of a line.
    pub(crate) fn remarks(&self) -> String {
        let mut remarks = String::new();
        if let Some(bytes) = self.truncated_from {
            remarks.push_str(&format!("  (truncated from {bytes} bytes)"));
        }
        if let Some(letter) = self.replay_of {
            remarks.push_str(&format!("  (replay of dead letter {letter})"));
        }
        match self.replay.map(|note| note.replay) {
            Some(Replay::Sent { sequence }) => remarks.push_str(&format!("  (replayed as entry {sequence})")),
            Some(Replay::Begun) => remarks.push_str("  (maybe replayed)"),
            Some(Replay::NotSent) | None => {}
        }
        remarks
    }
}

impl Note {
    fn new(sequence: u64, at: Timestamp, map: &HeaderMap) -> anyhow::Result<Self> {
        let replay = map.get(headers::REPLAY).map(|value| value.as_str().parse());
        let replay = replay.with_context(|| format!("note {sequence} has no {}", headers::REPLAY))?;
        Ok(Self { sequence, at, replay: replay.with_context(|| format!("note {sequence} cannot be parsed"))? })
    }
}

pub(crate) struct Letters {
    js: jetstream::Context,
    stream: Stream,
}

impl Letters {
    pub(crate) async fn open(admin: &Admin) -> anyhow::Result<Self> {
        let js = nats::jetstream(&admin.connect().await?);
        let stream = js.get_stream(LEAD_DEAD_LETTERS).await;
        let stream =
            stream.with_context(|| format!("cannot find the stream {LEAD_DEAD_LETTERS}; lead-state creates it"))?;
        Ok(Self { js, stream })
    }

    /// Reads all letters, oldest first.
    pub(crate) async fn all(&self) -> anyhow::Result<Vec<Letter>> {
        let mut letters = BTreeMap::new();
        let reader = StreamReader {
            stream: &self.stream,
            last: self.stream.cached_info().state.last_sequence,
            from: None,
            subjects: subject::ALL_DEAD_LETTERS.into(),
            headers_only: true,
        };
        let mut progress = Progress::start();
        let read = reader.run(&mut progress, async |message| {
            let (sequence, at) = (message.sequence, message.logged_at);
            let map = message.headers.unwrap_or_default();
            match subject::replayed_letter(&message.subject) {
                None => {
                    letters.insert(sequence, Letter::new(sequence, at, &message.subject, &map));
                }
                // The letter of a note may have been deleted.
                Some(letter) => {
                    if let Some(letter) = letters.get_mut(&letter) {
                        letter.replay = Some(Note::new(sequence, at, &map)?);
                    }
                }
            }
            Ok(())
        });
        read.await?;
        Ok(letters.into_values().collect())
    }

    pub(crate) async fn get(&self, number: u64) -> anyhow::Result<(Letter, StreamMessage)> {
        let message = optional(self.stream.get_raw_message(number).await).context("cannot read the dead letter")?;
        let message = message.filter(|message| subject::replayed_letter(&message.subject).is_none());
        let message = message.ok_or_else(|| {
            let message = format!("there is no dead letter {number}; list them with leadctl dead-letters list");
            RpcError::received(404, "dead_letter_not_found", message)
        })?;
        let note = self.stream.get_last_raw_message_by_subject(&subject::replayed(number)).await;
        let note = optional(note).context("cannot read the notes about its replays")?;
        let note = note.map(|note| Note::new(note.sequence, note.time.into(), &note.headers)).transpose()?;
        let letter = Letter::new(number, message.time.into(), &message.subject, &message.headers);
        Ok((Letter { replay: note, ..letter }, message))
    }

    /// Replays a letter; returns its sequence in the command log.
    ///
    /// A note is written before and after. The first one is a compare-and-set on the letter's last note, so of two
    /// concurrent replays one fails. After a crash in between, the first note shows that the letter may have been sent.
    ///
    /// # Errors
    /// The letter was not sent, or it is unknown whether it was; the text says which.
    pub(crate) async fn replay(&self, letter: &Letter, subject: String, body: Bytes) -> anyhow::Result<u64> {
        let number = letter.number;
        let last = letter.replay.map_or(0, |note| note.sequence);
        let started = self.note(number, last, Replay::Begun).await;
        let started = started.with_context(|| {
            format!("dead letter {number} was not replayed: its note was rejected (is another replay running?)")
        })?;
        let mut command = publish::message(subject, &format!("replay-{number}-{started}"), None, body);
        command.headers.get_or_insert_default().insert(headers::REPLAY_OF, number.to_string());
        match publish::publish(&self.js, command).await {
            Ok(ack) => {
                let noted = self.note(number, started, Replay::Sent { sequence: ack.sequence }).await;
                noted.with_context(|| {
                    format!(
                        "dead letter {number} was replayed as entry {} of the log, but this could not be noted",
                        ack.sequence
                    )
                })?;
                Ok(ack.sequence)
            }
            Err(e @ PublishError::Unconfirmed) => {
                Err(e).with_context(|| format!("it is unknown whether dead letter {number} was replayed"))
            }
            Err(e) => {
                if let Err(e) = self.note(number, started, Replay::NotSent).await {
                    bail!("dead letter {number} was not replayed, but its note says that it may have been: {e}");
                }
                Err(e).with_context(|| format!("dead letter {number} was not replayed"))
            }
        }
    }

    async fn note(&self, letter: u64, last: u64, replay: Replay) -> Result<u64, PublishError> {
        write_replay_note(&self.js, letter, last, replay).await
    }
}

/// None if the stream does not have the message.
fn optional(
    message: Result<StreamMessage, async_nats::error::Error<LastRawMessageErrorKind>>,
) -> anyhow::Result<Option<StreamMessage>> {
    match message {
        Ok(message) => Ok(Some(message)),
        Err(e) if e.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

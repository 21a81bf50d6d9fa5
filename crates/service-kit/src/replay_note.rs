//! Writes the notes about replays of dead letters. See [`contract::replay`].

use async_nats::jetstream;
use bytes::Bytes;
use contract::{headers, replay::Replay, subject};

use crate::{
    clock,
    publish::{self, PublishError},
};

/// Writes a note about a replay of a dead letter; returns the note's sequence.
///
/// # Errors
/// `last` is not the sequence of the letter's last note (0 if it has none): another replay is running. Or NATS did not
/// store it.
pub async fn write_replay_note(
    js: &jetstream::Context,
    letter: u64,
    last: u64,
    replay: Replay,
) -> Result<u64, PublishError> {
    let id = clock::new_id().to_string();
    let mut note = publish::message(subject::replayed(letter), &id, None, Bytes::new());
    let map = note.headers.get_or_insert_default();
    map.insert(headers::REPLAY, replay.to_string());
    map.insert(headers::EXPECTED_LAST_SUBJECT_SEQUENCE, last.to_string());
    Ok(publish::publish(js, note).await?.sequence)
}

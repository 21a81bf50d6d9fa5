//! 4 Decide: publishes the entries that cannot be applied to the dead letters. A command of a pack becomes a message of
//! its own.

use async_nats::{HeaderMap, jetstream, jetstream::message::OutboundMessage};
use contract::{
    headers,
    position::{EventPosition, LogPosition},
    text::{MAX_ERROR_CHARS, prefix},
};
use service_kit::publish::{PublishError, publish_all};

use crate::core::entry::{DeadLetter, LogMessage};

/// Reserved for the headers of a dead letter whose body is truncated.
const HEADER_ROOM: usize = 16 << 10;

pub(crate) struct DeadLetterPublisher {
    pub(crate) js: jetstream::Context,
    /// The generation of the checkpoint.
    pub(crate) generation: i32,
}

impl DeadLetterPublisher {
    /// Must succeed before the checkpoint passes the entries. After a crash in between they are published again under
    /// the same message ids.
    pub(crate) async fn publish_dead_letters(
        &self,
        entries: &[&LogMessage],
        dead_letters: &[DeadLetter],
    ) -> Result<(), PublishError> {
        let mut letters = Vec::new();
        for dead in dead_letters {
            let LogPosition { epoch, sequence, index } = dead.position;
            tracing::warn!(sequence, index, reason = dead.reason.as_str(), "dead letter: {dead}");
            if let Some(entry) = entries.iter().find(|entry| entry.position(epoch) == dead.position) {
                letters.push((dead, *entry));
            }
        }
        let outbound = |limit| -> Vec<_> {
            letters.iter().map(|(dead, message)| dead_letter(dead, message, self.generation, limit)).collect()
        };
        match publish_all(&self.js, outbound(usize::MAX)).await {
            Err(PublishError::TooLarge) => {
                // The added headers exceed NATS's limit: truncate the body.
                let limit = self.js.client().server_info().max_payload.saturating_sub(HEADER_ROOM);
                publish_all(&self.js, outbound(limit)).await
            }
            published => published,
        }
    }
}

/// The original message, with the error and its origin in headers.
fn dead_letter(dead: &DeadLetter, message: &LogMessage, generation: i32, limit: usize) -> OutboundMessage {
    let position = EventPosition { generation, log: dead.position };
    let mut map = HeaderMap::new();
    map.insert(headers::MESSAGE_ID, format!("dead-{}", dead.position));
    // A header is one line. Errors may quote the body, which can be as long as a message.
    let error = prefix(&dead.error, MAX_ERROR_CHARS);
    map.insert(headers::DEAD_LETTER_ERROR, error.replace(|c: char| c.is_control(), " "));
    map.insert(headers::POSITION, position.to_string());
    map.insert(headers::ORIGIN_SUBJECT, message.subject.as_str());
    map.insert(headers::ORIGIN_SEQUENCE, message.sequence.to_string());
    map.insert(headers::ORIGIN_TIME, message.logged_at.to_iso());
    let replay_of = message.headers.as_ref().and_then(|map| map.get(headers::REPLAY_OF)?.as_str().parse::<u64>().ok());
    if let Some(number) = replay_of {
        map.insert(headers::REPLAY_OF, number.to_string());
    }
    let mut payload = message.payload.clone();
    if payload.len() > limit {
        map.insert(headers::TRUNCATED_FROM, payload.len().to_string());
        payload.truncate(limit);
    }
    OutboundMessage { subject: dead.reason.subject().into(), headers: Some(map), payload }
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderName;
    use contract::{Timestamp, subject::DeadLetterReason};

    use super::*;

    #[test]
    fn a_dead_letter_carries_its_error_and_origin_and_is_truncated_to_the_limit() {
        let message = LogMessage {
            sequence: 9,
            index: 3,
            ends_message: false,
            logged_at: Timestamp::from_millis(1_768_193_759_048),
            subject: "leads.cmd.x.update".into(),
            headers: Some(HeaderMap::from_iter([(HeaderName::from_static(headers::REPLAY_OF), "7".into())])),
            payload: "0123456789".into(),
        };
        let position = message.position(2);
        let dead = DeadLetter { position, reason: DeadLetterReason::InvalidSubject, error: "a\r\nb".into() };

        let outbound = dead_letter(&dead, &message, 0, 4);

        assert_eq!(outbound.subject.as_str(), "leads.dead.invalid_subject");
        assert_eq!(outbound.payload, "0123");
        let map = outbound.headers.unwrap();
        let header = |name| map.get(name).unwrap().as_str();
        assert_eq!(header(headers::MESSAGE_ID), "dead-2.9.3");
        assert_eq!(header(headers::DEAD_LETTER_ERROR), "a  b");
        assert_eq!(header(headers::ORIGIN_SUBJECT), "leads.cmd.x.update");
        assert_eq!(header(headers::ORIGIN_SEQUENCE), "9");
        assert_eq!(header(headers::POSITION), "0.2.9.3");
        assert_eq!(header(headers::ORIGIN_TIME), "2026-01-12T04:55:59.048Z");
        assert_eq!(header(headers::REPLAY_OF), "7");
        assert_eq!(header(headers::TRUNCATED_FROM), "10");
        assert_eq!(dead_letter(&dead, &message, 0, 10).payload, "0123456789");

        let quoting = DeadLetter { error: "e".repeat(1 << 20), ..dead };
        let error = dead_letter(&quoting, &message, 0, 10).headers.unwrap().get(headers::DEAD_LETTER_ERROR).cloned();
        assert_eq!(error.unwrap().as_str().len(), MAX_ERROR_CHARS);
    }
}

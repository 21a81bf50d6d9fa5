//! 1 Accept, 6 Announce: messages that are stored one by one and acked together, as a fast-ingest batch (NATS ADR-50, nats-server 2.14).
//!
//! Where each message has its ack, the publisher keeps an entry, a channel and a timer for each. Here
//! the server acks the first message, some on the way if others publish to the stream too, and the last one, for all.
//! The ack says how many messages the batch had, not where each of them is: others may have come between.

use std::{
    fmt::Write,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{
    Client, Subject, Subscriber,
    jetstream::{self, ErrorCode, message::OutboundMessage},
};
use futures::StreamExt;
use serde::Deserialize;

/// How seldom the server may ack what is on its way, in messages. It acks more often where it wants to.
const ACK_EVERY: u16 = 1000;

/// Most subscriptions that are kept for batches to come. Fewer subscribe anew after a burst, more hold what a burst took.
const MOST_KEPT: usize = 8;

/// Why a batch is not known to be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IngestError {
    /// No ack came in time: some or all messages may be stored.
    #[error("JetStream did not confirm in time")]
    Unconfirmed,
    /// The stream or its server takes no such batches. What it stored nevertheless it knows again by its message ids.
    #[error("the stream takes no fast-ingest batches")]
    Disabled,
    /// Not all of it is stored. What is will be known again by its message ids.
    #[error("not stored as a whole: {0}")]
    Refused(String),
}

/// Publishes such batches, several at once.
#[derive(Debug)]
pub(crate) struct Ingest {
    client: Client,
    timeout: Duration,
    /// Those that no batch uses.
    lines: Mutex<Vec<Line>>,
}

/// Where the answers to a batch come.
#[derive(Debug)]
struct Line {
    inbox: String,
    answers: Subscriber,
}

impl Ingest {
    /// On this connection. An ack may take as long as `timeout`.
    pub(crate) fn new(client: Client, timeout: Duration) -> Self {
        Self { client, timeout, lines: Mutex::default() }
    }

    /// Publishes messages in this order, and waits until the stream has them all, or had them before.
    pub(crate) async fn publish(&self, messages: &[OutboundMessage]) -> Result<(), IngestError> {
        let mut line = self.line().await?;
        // A line is used again, so what comes late for the batch before must be told apart.
        let batch = format!("{:016x}", rand::random::<u64>());
        for (place, message) in (1..).zip(messages) {
            let OutboundMessage { subject, payload, headers } = message;
            let reply = reply(&line.inbox, &batch, place, messages.len());
            let headers = headers.clone().unwrap_or_default();
            let sent = self.client.publish_with_reply_and_headers(subject.clone(), reply, headers, payload.clone());
            sent.await.map_err(|e| IngestError::Refused(e.to_string()))?;
        }
        let ours = format!("{}.{batch}.", line.inbox);
        let acked = async {
            loop {
                let Some(answer) = line.answers.next().await else {
                    return Err(IngestError::Unconfirmed);
                };
                if answer.subject.starts_with(&ours)
                    && let Some(outcome) = outcome(&answer.payload, &batch, messages.len() as u64)
                {
                    return outcome;
                }
            }
        };
        tokio::time::timeout(self.timeout, acked).await.unwrap_or(Err(IngestError::Unconfirmed))?;
        // After anything else more answers may come, and the line is closed.
        let mut lines = self.lines();
        if lines.len() < MOST_KEPT {
            lines.push(line);
        }
        Ok(())
    }

    fn lines(&self) -> MutexGuard<'_, Vec<Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn line(&self) -> Result<Line, IngestError> {
        if let Some(line) = self.lines().pop() {
            return Ok(line);
        }
        let inbox = self.client.new_inbox();
        let answers = self.client.subscribe(format!("{inbox}.>")).await;
        Ok(Line { inbox, answers: answers.map_err(|e| IngestError::Refused(e.to_string()))? })
    }
}

/// Where a message of a batch is answered, which is also how the server knows it for one:
/// `<inbox>.<batch>.<ack every>.<on a gap>.<place>.<operation>.$FI`. After a gap nothing more is stored.
fn reply(inbox: &str, batch: &str, place: usize, messages: usize) -> Subject {
    let operation = match place {
        _ if place == messages => 2,
        1 => 0,
        _ => 1,
    };
    let mut reply = String::with_capacity(inbox.len() + batch.len() + 32);
    // Writing to a string cannot fail.
    let _ = write!(reply, "{inbox}.{batch}.{ACK_EVERY}.fail.{place}.{operation}.$FI");
    reply.into()
}

/// What an answer says of its batch as a whole; none if there is more to come.
fn outcome(answer: &[u8], batch: &str, messages: u64) -> Option<Result<(), IngestError>> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "type")]
        kind: Option<String>,
        error: Option<jetstream::Error>,
        batch: Option<String>,
        count: Option<u64>,
    }
    // Nobody answered for the stream: an empty message.
    let Ok(answer) = serde_json::from_slice::<Answer>(answer) else {
        return Some(Err(IngestError::Refused("the server's answer cannot be read".into())));
    };
    Some(match (answer.kind.as_deref(), answer.error) {
        (_, Some(error)) if error.error_code() == ErrorCode::BATCH_PUBLISH_DISABLED => Err(IngestError::Disabled),
        (_, Some(error)) => Err(IngestError::Refused(error.to_string())),
        (Some("ack"), None) => return None,
        (Some(_), None) => Err(IngestError::Refused("a message was lost on the way".into())),
        (None, None) if answer.batch.as_deref() == Some(batch) && answer.count == Some(messages) => Ok(()),
        (None, None) if answer.batch.is_some() => Err(IngestError::Refused("the server ended the batch early".into())),
        // An ack of one message: from a server that does not know such batches, as there may be one in a cluster.
        (None, None) => Err(IngestError::Disabled),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_begin_and_commit_the_batch() {
        let replies = (1..=3).map(|place| reply("_INBOX.x", "b", place, 3).to_string()).collect::<Vec<_>>();
        let expected = ["_INBOX.x.b.1000.fail.1.0.$FI", "_INBOX.x.b.1000.fail.2.1.$FI", "_INBOX.x.b.1000.fail.3.2.$FI"];
        assert_eq!(replies, expected);
    }

    #[test]
    fn only_an_ack_of_all_is_one() {
        let outcome = |answer: &str| outcome(answer.as_bytes(), "b", 3);
        assert_eq!(outcome(r#"{"type":"ack","seq":0,"msgs":10}"#), None);
        assert_eq!(outcome(r#"{"stream":"S","seq":9,"batch":"b","count":3}"#), Some(Ok(())));
        // A server that knows no such batches acks each message.
        assert_eq!(outcome(r#"{"stream":"S","seq":9}"#), Some(Err(IngestError::Disabled)));
        assert_eq!(
            outcome(
                r#"{"stream":"S","error":{"code":400,"err_code":10205,"description":"batch publish is disabled"}}"#
            ),
            Some(Err(IngestError::Disabled))
        );
        for refused in [
            "",
            r#"{"stream":"S","seq":9,"batch":"b","count":2}"#,
            r#"{"stream":"S","seq":9,"batch":"a","count":3}"#,
            r#"{"type":"gap","last_seq":1,"seq":3}"#,
            r#"{"type":"err","seq":2,"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}"#,
            r#"{"stream":"S","error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}"#,
        ] {
            assert!(matches!(outcome(refused), Some(Err(IngestError::Refused(_)))), "{refused}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_taken_for_more_than_it_says(answer: Vec<u8>, count: u64) {
            let _ = outcome(&answer, "b", 3);
            let ack = format!(r#"{{"stream":"S","seq":9,"batch":"b","count":{count}}}"#);
            prop_assert_eq!(outcome(ack.as_bytes(), "b", 3).is_some_and(|outcome| outcome.is_ok()), count == 3);
        }
    }
}

//! Fast-ingest batches (NATS ADR-50, nats-server 2.14): messages that are stored one by one and acknowledged together.
//!
//! With one acknowledgement per message, the publisher keeps an entry, a channel and a timer for each. Here the server
//! acknowledges the first message, some in between if others publish to the stream too, and the last one, for all of them.
//! The acknowledgement counts the batch's messages but does not name their sequences: other messages may lie between.

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

/// Messages between two acknowledgements, at most; the server may acknowledge more often.
const ACK_EVERY: u16 = 1000;

/// Inboxes kept for later batches. Fewer subscribe again after a burst, more hold the subscriptions of the largest burst.
const MAX_IDLE_INBOXES: usize = 8;

/// Why a batch is not known to be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IngestError {
    /// No acknowledgement came in time: some or all messages may be stored.
    #[error("JetStream did not acknowledge in time")]
    Unconfirmed,
    /// The stream or its server does not support such batches. The stream recognizes what it stored by the message ids.
    #[error("the stream does not allow fast-ingest batches")]
    Disabled,
    /// Not all messages are stored. The stream recognizes those that are by their message ids.
    #[error("not stored as a whole: {0}")]
    Refused(String),
}

/// Publishes fast-ingest batches, several at once.
#[derive(Debug)]
pub(crate) struct FastIngest {
    client: Client,
    timeout: Duration,
    /// The inboxes that no batch uses.
    idle: Mutex<Vec<ReplyInbox>>,
}

/// The inbox for the replies to a batch.
#[derive(Debug)]
struct ReplyInbox {
    inbox: String,
    replies: Subscriber,
}

impl FastIngest {
    /// Publishes on this connection; an acknowledgement may take `timeout`.
    pub(crate) fn new(client: Client, timeout: Duration) -> Self {
        Self { client, timeout, idle: Mutex::default() }
    }

    /// Publishes messages in this order, waits until the stream has them all, and returns the sequence of the last one.
    pub(crate) async fn publish(&self, messages: &[OutboundMessage]) -> Result<u64, IngestError> {
        let mut inbox = self.reply_inbox().await?;
        // An inbox is reused, so late replies to an earlier batch must be recognized.
        let batch = format!("{:016x}", rand::random::<u64>());
        for (place, message) in (1..).zip(messages) {
            let OutboundMessage { subject, payload, headers } = message;
            let reply = reply(&inbox.inbox, &batch, place, messages.len());
            let headers = headers.clone().unwrap_or_default();
            let sent = self.client.publish_with_reply_and_headers(subject.clone(), reply, headers, payload.clone());
            sent.await.map_err(|e| IngestError::Refused(e.to_string()))?;
        }
        let ours = format!("{}.{batch}.", inbox.inbox);
        let acked = async {
            loop {
                let Some(reply) = inbox.replies.next().await else {
                    return Err(IngestError::Unconfirmed);
                };
                if reply.subject.starts_with(&ours)
                    && let Some(outcome) = outcome(&reply.payload, &batch, messages.len() as u64)
                {
                    return outcome;
                }
            }
        };
        let last = tokio::time::timeout(self.timeout, acked).await.unwrap_or(Err(IngestError::Unconfirmed))?;
        // After an error more replies may come, so the inbox is closed.
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE_INBOXES {
            idle.push(inbox);
        }
        Ok(last)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<ReplyInbox>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reply_inbox(&self) -> Result<ReplyInbox, IngestError> {
        if let Some(inbox) = self.idle().pop() {
            return Ok(inbox);
        }
        let inbox = self.client.new_inbox();
        let replies = self.client.subscribe(format!("{inbox}.>")).await;
        Ok(ReplyInbox { inbox, replies: replies.map_err(|e| IngestError::Refused(e.to_string()))? })
    }
}

/// The reply subject of a message, by which the server recognizes the batch:
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

/// The outcome of the batch according to a reply, or the last message's sequence; none if more replies follow.
fn outcome(reply: &[u8], batch: &str, messages: u64) -> Option<Result<u64, IngestError>> {
    #[derive(Deserialize)]
    struct Reply {
        #[serde(rename = "type")]
        kind: Option<String>,
        error: Option<jetstream::Error>,
        batch: Option<String>,
        count: Option<u64>,
        #[serde(default)]
        seq: u64,
    }
    // Without a stream, NATS itself replies with an empty message.
    let Ok(reply) = serde_json::from_slice::<Reply>(reply) else {
        return Some(Err(IngestError::Refused("the server's reply cannot be read".into())));
    };
    Some(match (reply.kind.as_deref(), reply.error) {
        (_, Some(error)) if error.error_code() == ErrorCode::BATCH_PUBLISH_DISABLED => Err(IngestError::Disabled),
        (_, Some(error)) => Err(IngestError::Refused(error.to_string())),
        (Some("ack"), None) => return None,
        (Some(_), None) => Err(IngestError::Refused("a message was lost on the way".into())),
        (None, None) if reply.batch.as_deref() == Some(batch) && reply.count == Some(messages) => Ok(reply.seq),
        (None, None) if reply.batch.is_some() => Err(IngestError::Refused("the server ended the batch early".into())),
        // An acknowledgement of one message, from a server without fast ingest, as one member of a cluster may be.
        (None, None) => Err(IngestError::Disabled),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_message_begins_the_batch_and_the_last_commits_it() {
        let replies = (1..=3).map(|place| reply("_INBOX.x", "b", place, 3).to_string()).collect::<Vec<_>>();
        let expected = ["_INBOX.x.b.1000.fail.1.0.$FI", "_INBOX.x.b.1000.fail.2.1.$FI", "_INBOX.x.b.1000.fail.3.2.$FI"];
        assert_eq!(replies, expected);
    }

    #[test]
    fn only_an_ack_of_all_messages_confirms_the_batch() {
        let outcome = |reply: &str| outcome(reply.as_bytes(), "b", 3);
        assert_eq!(outcome(r#"{"type":"ack","seq":0,"msgs":10}"#), None);
        assert_eq!(outcome(r#"{"stream":"S","seq":9,"batch":"b","count":3}"#), Some(Ok(9)));
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
        fn only_the_exact_count_confirms_the_batch(reply: Vec<u8>, count: u64) {
            let _ = outcome(&reply, "b", 3);
            let ack = format!(r#"{{"stream":"S","seq":9,"batch":"b","count":{count}}}"#);
            prop_assert_eq!(outcome(ack.as_bytes(), "b", 3).is_some_and(|outcome| outcome.is_ok()), count == 3);
        }
    }
}

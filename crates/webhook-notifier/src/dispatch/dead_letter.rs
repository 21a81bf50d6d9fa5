//! 7 Deliver: publishes events that cannot be parsed to `LEAD_DEAD_LETTERS`, with their origin.

use async_nats::jetstream;
use bytes::Bytes;
use contract::{
    Timestamp, headers,
    streams::LEAD_EVENTS,
    subject::DeadLetterReason,
    text::{MAX_ERROR_CHARS, prefix},
};
use service_kit::publish::{self, PublishError};

/// How much of a body is kept when it does not fit into a message together with the headers.
const MAX_TRUNCATED: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct DeadLetter {
    pub(crate) message: async_nats::Message,
    pub(crate) sequence: u64,
    pub(crate) logged_at: Timestamp,
    pub(crate) reason: DeadLetterReason,
    pub(crate) error: String,
}

/// Publishes a dead letter, truncated if it is too large, and waits for the ack.
pub(crate) async fn publish(js: &jetstream::Context, letter: &DeadLetter) -> Result<(), PublishError> {
    let body = &letter.message.payload;
    match publish_body(js, letter, body.clone()).await {
        Err(PublishError::TooLarge) => publish_body(js, letter, body.slice(..body.len().min(MAX_TRUNCATED))).await,
        published => published,
    }
}

async fn publish_body(js: &jetstream::Context, letter: &DeadLetter, body: Bytes) -> Result<(), PublishError> {
    let length = body.len();
    let id = format!("{LEAD_EVENTS}-{}", letter.sequence);
    let mut message = publish::message(letter.reason.subject(), &id, None, body);
    let headers = message.headers.get_or_insert_default();
    // A header is one line. Errors may quote the body, which can be as long as a message.
    let error = prefix(&letter.error, MAX_ERROR_CHARS);
    headers.insert(headers::DEAD_LETTER_ERROR, error.replace(['\r', '\n'], " "));
    headers.insert(headers::ORIGIN_SUBJECT, letter.message.subject.as_str());
    headers.insert(headers::ORIGIN_SEQUENCE, letter.sequence.to_string());
    headers.insert(headers::ORIGIN_TIME, letter.logged_at.to_iso());
    if length < letter.message.payload.len() {
        headers.insert(headers::TRUNCATED_FROM, letter.message.payload.len().to_string());
    }
    publish::publish(js, message).await.map(drop)
}

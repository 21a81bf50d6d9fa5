//! Publishes to a stream and waits for its acknowledgement.

use std::error::Error;

use async_nats::{
    Client, HeaderMap, Subject,
    connection::State,
    jetstream::{
        self, ErrorCode,
        context::{PublishAckFuture, PublishErrorKind},
        message::OutboundMessage,
        publish::PublishAck,
    },
};
use bytes::Bytes;
use contract::headers;
use futures::future::BoxFuture;

use crate::nats::error_chain;

/// Why a message is not in its stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The message was not sent.
    #[error("NATS is not connected")]
    NotConnected,
    /// No stream has the subject, or its servers have no leader. Nothing was stored.
    #[error("no stream answers: it does not exist, or its servers have no leader")]
    NoResponder,
    /// The acknowledgement did not come in time: the message may or may not be stored.
    #[error("JetStream did not acknowledge in time")]
    Unconfirmed,
    /// The stream is full. Nothing was stored; purging old messages makes space.
    #[error("the stream is full")]
    Full,
    /// The message is larger than the server's `max_payload`. It will never be stored.
    #[error("the message is larger than the max_payload of NATS")]
    TooLarge,
    /// The message was to be stored behind another sequence than the stream's last one, which is this. Nothing was
    /// stored.
    #[error("the last sequence of the stream is {0}")]
    WrongLast(u64),
    /// JetStream refused the message for another reason. Nothing was stored.
    #[error("JetStream refused the message: {0}")]
    Refused(String),
}

impl PublishError {
    /// Whether the stream may accept the message after a while: once it has a leader, or the connection is back.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::NotConnected | Self::NoResponder | Self::Unconfirmed)
    }

    /// The error of a message that was sent twice. If one of the two may be stored, the message may be stored.
    #[must_use]
    pub(crate) fn followed_by(self, next: Self) -> Self {
        if self == Self::Unconfirmed { self } else { next }
    }
}

impl From<jetstream::context::PublishError> for PublishError {
    fn from(error: jetstream::context::PublishError) -> Self {
        let answer = error.source().and_then(|source| source.downcast_ref::<jetstream::Error>());
        match (error.kind(), error_code(&error)) {
            (PublishErrorKind::MaxPayloadExceeded, _) | (_, Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)) => {
                Self::TooLarge
            }
            (PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe, _) => Self::Unconfirmed,
            (PublishErrorKind::StreamNotFound, _) => Self::NoResponder,
            (PublishErrorKind::WrongLastSequence, _) if let Some(last) = answer.and_then(last_sequence) => {
                Self::WrongLast(last)
            }
            // The same message was sent before, and its replicas have not stored it yet.
            (_, Some(ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT)) => Self::Unconfirmed,
            // "maximum bytes exceeded" and "maximum messages exceeded" come under this code, as does a store that is
            // closed because its server stops.
            (_, Some(ErrorCode::STREAM_STORE_FAILED))
                if answer.is_some_and(|e| e.to_string().starts_with("maximum")) =>
            {
                Self::Full
            }
            _ if answer.is_some_and(|e| e.code() == 503) => Self::NoResponder,
            _ => Self::Refused(error_chain(&error)),
        }
    }
}

/// The stream's last sequence, from the text of the error: "wrong last sequence: 17 (code 400, …)".
fn last_sequence(error: &jetstream::Error) -> Option<u64> {
    let text = error.to_string();
    let (_, rest) = text.split_once("wrong last sequence: ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

pub(crate) fn error_code(error: &jetstream::context::PublishError) -> Option<ErrorCode> {
    error.source()?.downcast_ref::<jetstream::Error>().map(jetstream::Error::error_code)
}

/// A message with its deduplication id and trace context.
pub fn message(subject: impl Into<Subject>, id: &str, traceparent: Option<&str>, payload: Bytes) -> OutboundMessage {
    let mut map = HeaderMap::new();
    map.insert(headers::MESSAGE_ID, id);
    if let Some(traceparent) = traceparent {
        map.insert(headers::TRACEPARENT, traceparent);
    }
    OutboundMessage { subject: subject.into(), payload, headers: Some(map) }
}

/// Fails without a connection. The client would keep a message and send it after a reconnect, long after its caller
/// gave up.
pub(crate) fn connected(client: &Client) -> Result<(), PublishError> {
    match client.connection_state() {
        State::Connected => Ok(()),
        _ => Err(PublishError::NotConnected),
    }
}

/// Sends a message; the returned future is its acknowledgement and must be awaited.
pub(crate) async fn send(js: &jetstream::Context, message: OutboundMessage) -> Result<PublishAckFuture, PublishError> {
    use jetstream::context::traits::Publisher;
    connected(&js.client())?;
    Ok(js.publish_message(message).await?)
}

/// Publishes a message and waits until the stream has it.
pub fn publish(js: &jetstream::Context, message: OutboundMessage) -> BoxFuture<'_, Result<PublishAck, PublishError>> {
    Box::pin(async { Ok(send(js, message).await?.await?) })
}

/// Publishes messages in this order without waiting between them, then waits until the stream has them all.
///
/// # Errors
/// Some may be stored. Publish all of them again; the stream recognizes duplicates by their message ids.
pub async fn publish_all(
    js: &jetstream::Context,
    messages: impl IntoIterator<Item = OutboundMessage>,
) -> Result<(), PublishError> {
    let mut acks = Vec::new();
    for message in messages {
        acks.push(send(js, message).await?);
    }
    for ack in acks {
        ack.await?;
    }
    Ok(())
}

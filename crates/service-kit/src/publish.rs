//! Publishing to a stream, the ack always awaited.

use std::error::Error;

use async_nats::{
    Client, HeaderMap,
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

use crate::nats::error_chain;

/// Why a message is not in its stream.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The stream is full and refuses. Nothing was stored; room comes when old entries are purged.
    #[error("the stream is full")]
    Full,
    /// NATS is not connected, or nobody answers for the stream. Nothing was stored.
    #[error("NATS is not available: {0}")]
    Unavailable(String),
    /// The ack did not come in time: the message may or may not be stored.
    #[error("JetStream did not confirm in time")]
    Unconfirmed,
    /// The message is larger than the server takes. It will never be stored.
    #[error("the message is larger than NATS takes (max_payload)")]
    TooLarge,
    /// Anything else that JetStream answered. Nothing was stored.
    #[error("JetStream refused: {0}")]
    Refused(String),
}

impl From<jetstream::context::PublishError> for PublishError {
    fn from(error: jetstream::context::PublishError) -> Self {
        match (error.kind(), error_code(&error)) {
            (PublishErrorKind::MaxPayloadExceeded, _) | (_, Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)) => {
                Self::TooLarge
            }
            (PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe, _) => Self::Unconfirmed,
            (PublishErrorKind::StreamNotFound, _) => Self::Unavailable("no stream takes this subject".into()),
            // "maximum bytes exceeded" and "maximum messages exceeded" come under this code.
            (_, Some(ErrorCode::STREAM_STORE_FAILED)) => Self::Full,
            _ => Self::Refused(error_chain(&error)),
        }
    }
}

/// JetStream's own code of why it refused a message.
pub(crate) fn error_code(error: &jetstream::context::PublishError) -> Option<ErrorCode> {
    error.source()?.downcast_ref::<jetstream::Error>().map(jetstream::Error::error_code)
}

/// Makes a message with its deduplication id and trace context.
pub fn message(subject: String, id: &str, traceparent: Option<&str>, payload: Bytes) -> OutboundMessage {
    let mut map = HeaderMap::new();
    map.insert(headers::MESSAGE_ID, id);
    if let Some(traceparent) = traceparent {
        map.insert(headers::TRACEPARENT, traceparent);
    }
    OutboundMessage { subject: subject.into(), payload, headers: Some(map) }
}

/// Refuses while there is no connection. The client would keep a message and send it after a reconnect, long after its
/// caller gave up.
pub(crate) fn connected(client: &Client) -> Result<(), PublishError> {
    match client.connection_state() {
        State::Connected => Ok(()),
        _ => Err(PublishError::Unavailable("not connected".into())),
    }
}

/// Sends a message; the future that comes back is its ack, and must be awaited.
pub(crate) async fn send(js: &jetstream::Context, message: OutboundMessage) -> Result<PublishAckFuture, PublishError> {
    use jetstream::context::traits::Publisher;
    connected(&js.client())?;
    Ok(js.publish_message(message).await?)
}

/// Publishes a message and waits until the stream has it.
pub async fn publish(js: &jetstream::Context, message: OutboundMessage) -> Result<PublishAck, PublishError> {
    Ok(send(js, message).await?.await?)
}

/// Publishes messages in this order without waiting between them, then waits until the stream has them all.
///
/// After an error some may be stored: publish them all again, their message ids keep them from being stored twice.
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

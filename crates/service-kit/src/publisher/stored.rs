//! What an acknowledgement says about a message.

use async_nats::jetstream::publish::PublishAck;

/// A message is in its stream, stored now or by an earlier publish under the same message id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its sequence in the stream.
    pub sequence: u64,
    /// Whether an earlier publish is known to have stored it.
    pub is_duplicate: bool,
}

impl Stored {
    pub(super) fn at(sequence: u64) -> Self {
        Self { sequence, is_duplicate: false }
    }
}

impl From<PublishAck> for Stored {
    fn from(ack: PublishAck) -> Self {
        Self { is_duplicate: ack.duplicate, ..Self::at(ack.sequence) }
    }
}

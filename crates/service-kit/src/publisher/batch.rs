//! How many messages a batch takes.

use async_nats::jetstream::message::OutboundMessage;

/// Messages per batch: the server's limit.
pub(super) const BATCH_MESSAGES: usize = 1000;
/// Bytes per batch. A larger batch delays the messages of the next one; a smaller one syncs more often.
pub(super) const BATCH_BYTES: usize = 1 << 20;
/// Bytes of a message besides its subject and payload.
const OVERHEAD: usize = 256;

/// An upper estimate of a message's bytes on the wire.
pub(super) fn wire_size(message: &OutboundMessage) -> usize {
    message.subject.len() + message.payload.len() + OVERHEAD
}

/// Splits messages into batches, in order.
pub(super) fn batches(
    messages: impl IntoIterator<Item = OutboundMessage>,
) -> impl Iterator<Item = Vec<OutboundMessage>> {
    let mut messages = messages.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut budget = BatchBudget::default();
        let mut batch = Vec::new();
        while let Some(message) = messages.next_if(|message| budget.try_add(wire_size(message))) {
            batch.push(message);
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// The messages and bytes that a batch holds so far.
#[derive(Debug, Default)]
pub(super) struct BatchBudget {
    messages: usize,
    bytes: usize,
}

impl BatchBudget {
    /// Adds a message of this size, or returns false if the batch is full. The first message always fits.
    pub(super) fn try_add(&mut self, size: usize) -> bool {
        let fits = self.messages == 0 || (self.messages < BATCH_MESSAGES && self.bytes + size <= BATCH_BYTES);
        if fits {
            self.messages += 1;
            self.bytes += size;
        }
        fits
    }
}

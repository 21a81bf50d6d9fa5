//! 4 Decide: parses the next batch, and reads what the cache lacks of it, while the batch before is being written.
//!
//! The rows read may therefore be older than what earlier batches make of them. Each prefetched batch carries the
//! number of batches written at that time; the [cache](crate::cache) has the changes of the others.

use std::{sync::Arc, time::SystemTime};

use contract::{Timestamp, position::LogPosition};
use service_kit::{
    clock,
    postgres::{PinnedConnection, Pool},
};
use tokio::sync::mpsc;

use super::reader::ReadMessage;
use crate::{
    cache::SharedCache,
    core::{
        batch::{BatchState, LeadKeys},
        entry::{DeadLetter, Entry, LogMessage, parse},
    },
    store::{StoreError, batch_state},
};

/// Limit of the messages in a transaction. A larger batch applies faster and delays each update: 2000 gain a tenth over
/// 500 and take three times as long.
const BATCH_MESSAGES: usize = 500;

pub(crate) struct PrefetchedBatch {
    pub(crate) messages: Vec<ReadMessage>,
    /// When they were taken from the reader.
    pub(crate) read_at: SystemTime,
    pub(crate) parsed: ParsedBatch,
    /// None if Postgres did not answer or has more than fits.
    pub(crate) rows: Option<PrefetchedRows>,
}

/// Consecutive messages of the log, parsed. At least one.
pub(crate) struct ParsedBatch {
    pub(crate) entries: Vec<Entry>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    pub(crate) messages: usize,
    /// The position of the last message.
    pub(crate) last: LogPosition,
    /// When the log stored the last message.
    pub(crate) logged_at: Timestamp,
}

pub(crate) struct PrefetchedRows {
    pub(crate) state: BatchState,
    /// How many batches were written before the rows were read.
    pub(crate) written: u64,
}

/// Prefetches one batch ahead of the applier, until either channel is closed.
pub(crate) async fn prefetch(
    pool: Pool,
    epoch: i32,
    mut log: mpsc::Receiver<ReadMessage>,
    cache: Arc<SharedCache>,
    out: mpsc::Sender<PrefetchedBatch>,
) {
    let mut connection = PinnedConnection::new(pool);
    // A batch starts only when the applier has room for it; until then messages collect in the channel.
    while let Ok(room) = out.reserve().await {
        let mut messages = Vec::with_capacity(BATCH_MESSAGES.min(log.len().max(1)));
        // All available messages, at least one: a single update is not delayed to fill a batch.
        log.recv_many(&mut messages, BATCH_MESSAGES).await;
        let read_at = clock::precise();
        let Some(parsed) = parse_messages(messages.iter().map(|read| &read.message), epoch) else { return };
        let (missing, written) = cache.lock().missing(&LeadKeys::of(&parsed.entries));
        let budget = if messages.len() == 1 { usize::MAX } else { batch_state::MAX_BYTES };
        // After an error the applier reads again, and reports what is wrong.
        let state = load_missing(&mut connection, &missing, budget).await.ok().flatten();
        let rows = state.map(|state| PrefetchedRows { state, written });
        room.send(PrefetchedBatch { messages, read_at, parsed, rows });
    }
}

/// None if it is more than `budget` bytes.
async fn load_missing(
    pinned: &mut PinnedConnection,
    missing: &LeadKeys,
    budget: usize,
) -> Result<Option<BatchState>, StoreError> {
    if missing.leads.is_empty() && missing.references.is_empty() {
        return Ok(Some(BatchState::default()));
    }
    let mut connection = pinned.take().await?;
    let state = batch_state::read(&mut connection, missing, budget).await?;
    pinned.keep(connection);
    Ok(state)
}

/// None if there are no messages.
pub(crate) fn parse_messages<'a>(
    messages: impl IntoIterator<Item = &'a LogMessage>,
    epoch: i32,
) -> Option<ParsedBatch> {
    let mut messages = messages.into_iter().peekable();
    let first: &LogMessage = messages.peek().copied()?;
    let mut batch = ParsedBatch {
        entries: Vec::with_capacity(messages.size_hint().0),
        dead_letters: Vec::new(),
        messages: 0,
        last: LogPosition::message(epoch, first.sequence),
        logged_at: first.logged_at,
    };
    for message in messages {
        match parse(message, epoch) {
            Ok(entry) => batch.entries.push(entry),
            Err(dead) => batch.dead_letters.push(dead),
        }
        batch.messages += 1;
        batch.last = LogPosition::message(epoch, message.sequence);
        batch.logged_at = message.logged_at;
    }
    Some(batch)
}

//! 4 Decide: parses the next batch, and reads the leads that the cache lacks, while the previous batch is being
//! written.
//!
//! The rows may therefore be older than the changes of earlier batches. Each prefetched batch carries the number of
//! batches that were written when its rows were read; the [cache](crate::cache) has the changes of all later ones.

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

/// A batch with this many entries gets no further message. A larger batch applies faster and delays each update: 2000
/// entries gain a tenth over 500 and take three times as long. A batch consists of whole messages, so the checkpoint is
/// inside a pack only after a batch was split.
const BATCH_ENTRIES: usize = 500;

pub(crate) struct PrefetchedBatch {
    pub(crate) messages: Vec<ReadMessage>,
    /// When the messages were taken from the reader.
    pub(crate) read_at: SystemTime,
    pub(crate) parsed: ParsedBatch,
    /// None if Postgres did not answer, or the rows exceed the memory budget.
    pub(crate) rows: Option<PrefetchedRows>,
}

/// Consecutive entries of the log, parsed. At least one.
pub(crate) struct ParsedBatch {
    pub(crate) entries: Vec<Entry>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// The number of entries and dead letters.
    pub(crate) count: usize,
    /// The position of the last one.
    pub(crate) last: LogPosition,
    /// When the log stored the last one.
    pub(crate) logged_at: Timestamp,
    /// Whether the last one is the last of its message.
    pub(crate) ends_message: bool,
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
        // All available messages, at least one: a single update is not delayed to fill a batch.
        let Some(first) = log.recv().await else { return };
        let mut count = first.entries.len();
        let mut messages = Vec::with_capacity(BATCH_ENTRIES.min(log.len() + 1));
        messages.push(first);
        while count < BATCH_ENTRIES
            && let Ok(next) = log.try_recv()
        {
            count += next.entries.len();
            messages.push(next);
        }
        let read_at = clock::precise();
        let Some(parsed) = parse_entries(messages.iter().flat_map(|read| &read.entries), epoch) else { return };
        let (missing, written) = cache.lock().missing(&LeadKeys::of(&parsed.entries));
        let budget = if count == 1 { usize::MAX } else { batch_state::MAX_BYTES };
        // After an error the applier reads again, and reports the error.
        let state = load_missing(&mut connection, &missing, budget).await.ok().flatten();
        let rows = state.map(|state| PrefetchedRows { state, written });
        room.send(PrefetchedBatch { messages, read_at, parsed, rows });
    }
}

/// None if the rows have more than `budget` bytes.
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

/// None if there are no entries.
pub(crate) fn parse_entries<'a>(entries: impl IntoIterator<Item = &'a LogMessage>, epoch: i32) -> Option<ParsedBatch> {
    let mut entries = entries.into_iter().peekable();
    let first: &LogMessage = entries.peek().copied()?;
    let mut batch = ParsedBatch {
        entries: Vec::with_capacity(entries.size_hint().0),
        dead_letters: Vec::new(),
        count: 0,
        last: first.position(epoch),
        logged_at: first.logged_at,
        ends_message: first.ends_message,
    };
    for entry in entries {
        match parse(entry, epoch) {
            Ok(parsed) => batch.entries.push(parsed),
            Err(dead) => batch.dead_letters.push(dead),
        }
        batch.count += 1;
        batch.last = entry.position(epoch);
        batch.logged_at = entry.logged_at;
        batch.ends_message = entry.ends_message;
    }
    Some(batch)
}

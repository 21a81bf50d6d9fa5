//! 4 Decide: a batch's entries and what must be read of the database to decide them, read while the batch before is still
//! being written.
//!
//! So what is read may be older than what the batches before make of it. Each batch says how many were written when it was
//! read; the [cache](crate::cache) has what the others made.

use std::{sync::Arc, time::SystemTime};

use service_kit::{clock, postgres::PinnedConnection};
use sqlx::PgPool;
use tokio::sync::mpsc;

use super::reader::Read;
use crate::{
    cache::Shared,
    core::{
        batch::{Names, World},
        entry::{DeadLetter, Entry, LogMessage, parse},
    },
    store::{StoreError, batch},
};

/// Most log entries in a transaction. More of them apply faster and make each one wait longer: 2000 gain a tenth over
/// 500 and take three times as long.
const BATCH_MESSAGES: usize = 500;

/// What there was in the log, at least one message.
pub(crate) struct Ahead {
    pub(crate) read: Vec<Read>,
    /// When they were taken out of the log.
    pub(crate) read_at: SystemTime,
    pub(crate) entries: Vec<Entry>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// What was not known of what they name. None where the database did not answer or has too much of it.
    pub(crate) unknown: Option<World>,
    /// How many batches were written before that was read.
    pub(crate) written: u64,
}

/// Takes batches out of the log and reads their worlds, one ahead of whoever takes them, until either end is closed.
pub(crate) async fn prefetch(
    pool: PgPool,
    mut log: mpsc::Receiver<Read>,
    cache: Arc<Shared>,
    out: mpsc::Sender<Ahead>,
) {
    let mut session = PinnedConnection::new(pool);
    // No batch is begun before there is room for it: what comes meanwhile goes along.
    while let Ok(room) = out.reserve().await {
        let mut read = Vec::with_capacity(BATCH_MESSAGES.min(log.len().max(1)));
        // What is there, at least one: an update alone waits for no company.
        if log.recv_many(&mut read, BATCH_MESSAGES).await == 0 {
            return;
        }
        let read_at = clock::precise();
        let (entries, dead_letters) = understand(read.iter().map(|read| &read.message));
        let (unknown, written) = cache.lock().unknown(&Names::of(&entries));
        let budget = if read.len() == 1 { usize::MAX } else { batch::BYTES };
        // The applier reads anew what could not be read, and says what is wrong.
        let unknown = learn(&mut session, &unknown, budget).await.ok().flatten();
        room.send(Ahead { read, read_at, entries, dead_letters, unknown, written });
    }
}

/// Reads what is not known. None if it is more than `budget` bytes.
async fn learn(session: &mut PinnedConnection, unknown: &Names, budget: usize) -> Result<Option<World>, StoreError> {
    if unknown.leads.is_empty() && unknown.references.is_empty() {
        return Ok(Some(World::default()));
    }
    let mut connection = session.take().await?;
    let world = batch::read(&mut connection, unknown, budget).await?;
    session.keep(connection);
    Ok(world)
}

/// Parses messages; those that cannot be are dead letters.
pub(crate) fn understand<'a>(messages: impl Iterator<Item = &'a LogMessage>) -> (Vec<Entry>, Vec<DeadLetter>) {
    let mut dead_letters = Vec::new();
    let entries = messages.filter_map(|message| parse(message).map_err(|dead| dead_letters.push(dead)).ok());
    let entries = entries.collect();
    (entries, dead_letters)
}

//! 3 Read in order, 6 Announce: how far the log was read and announced.

use contract::{Timestamp, position::Position};
use sqlx::PgPool;

use super::{StoreError, time};

/// A log's checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// The log's name.
    pub(crate) stream: String,
    /// The log's identity: when it was created.
    pub(crate) stream_created_at: String,
    /// Which of the logs there have been.
    pub(crate) epoch: i32,
    /// The last entry that was applied.
    pub(crate) last_seq: u64,
    /// The last entry whose event was announced.
    pub(crate) published_seq: u64,
}

impl Checkpoint {
    /// The position of an entry of this log.
    pub(crate) fn position(&self, sequence: u64) -> Position {
        Position { generation: 0, epoch: self.epoch, sequence }
    }
}

/// Reads a log's checkpoint; makes one at 0 for a database that has none.
pub(crate) async fn load(
    pool: &PgPool,
    stream: &str,
    stream_created_at: &str,
    now: Timestamp,
) -> Result<Checkpoint, StoreError> {
    sqlx::query!(
        r#"INSERT INTO lead_state.checkpoints (stream, stream_created_at, epoch, last_seq, published_seq, updated_at)
           VALUES ($1, $2, 1, 0, 0, $3) ON CONFLICT DO NOTHING"#,
        stream,
        stream_created_at,
        time(now)
    )
    .execute(pool)
    .await?;
    get(pool, stream).await?.ok_or_else(|| StoreError::Corrupt { table: "checkpoints", fault: format!("no {stream}") })
}

/// Reads a log's checkpoint.
pub(crate) async fn get(pool: &PgPool, stream: &str) -> Result<Option<Checkpoint>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT stream, stream_created_at, epoch, last_seq, published_seq
           FROM lead_state.checkpoints WHERE stream = $1"#,
        stream
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| Checkpoint {
        stream: row.stream,
        stream_created_at: row.stream_created_at,
        epoch: row.epoch,
        last_seq: row.last_seq as u64,
        published_seq: row.published_seq as u64,
    }))
}

/// Starts a new epoch on a new log: whatever the old one held and was not applied is lost and not waited for.
/// Compare-and-set: false if somebody else did it.
pub(crate) async fn start_epoch(
    pool: &PgPool,
    from: &Checkpoint,
    stream_created_at: &str,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        r#"UPDATE lead_state.checkpoints
           SET stream_created_at = $1, epoch = epoch + 1, last_seq = 0, published_seq = 0, updated_at = $2
           WHERE stream = $3 AND epoch = $4 AND last_seq = $5 AND published_seq = last_seq"#,
        stream_created_at,
        time(now),
        from.stream,
        from.epoch,
        from.last_seq as i64
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Notes that everything up to `published_seq` is announced. Never moves back, and does nothing for a leader of
/// another epoch.
pub(crate) async fn set_published(
    pool: &PgPool,
    of: &Checkpoint,
    published_seq: u64,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"UPDATE lead_state.checkpoints SET published_seq = $1, updated_at = $2
           WHERE stream = $3 AND epoch = $4 AND published_seq < $1"#,
        published_seq as i64,
        time(now),
        of.stream,
        of.epoch
    )
    .execute(pool)
    .await?;
    Ok(())
}

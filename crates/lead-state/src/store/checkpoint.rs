//! 3 Read in order, 6 Announce: how far the log was read and announced.

use contract::{Timestamp, position::LogPosition};
use sqlx::{PgExecutor, PgPool};

use super::{StoreError, time};

/// A log's checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// The log's name.
    pub(crate) stream: String,
    /// The log's identity: when it was created.
    pub(crate) stream_created_at: String,
    /// How often the announcements were rewound, by a recovery or because events were lost.
    pub(crate) generation: i32,
    /// The last entry that was applied. Its epoch is the current one.
    pub(crate) applied: LogPosition,
    /// When the log stored it; None before the first.
    pub(crate) last_logged_at: Option<Timestamp>,
    /// The last entry whose event was announced. Its epoch is an older one while that is announced again.
    pub(crate) announced: LogPosition,
    /// The position up to which the webhook-notifier acked all events.
    pub(crate) delivered: LogPosition,
    /// The identity of the stream of events; None before a leader first read it.
    pub(crate) events_created_at: Option<String>,
}

/// Reads a log's checkpoint; makes one at 0 for a database that has none.
pub(crate) async fn load(
    pool: &PgPool,
    stream: &str,
    stream_created_at: &str,
    now: Timestamp,
) -> Result<Checkpoint, StoreError> {
    sqlx::query!(
        r#"INSERT INTO lead_state.checkpoints (stream, stream_created_at, epoch, last_sequence, last_index, announced_epoch, announced_sequence,
                announced_index, delivered_epoch, delivered_sequence, delivered_index, updated_at)
           VALUES ($1, $2, 1, 0, 0, 1, 0, 0, 0, 0, 0, $3) ON CONFLICT DO NOTHING"#,
        stream,
        stream_created_at,
        time(now)
    )
    .execute(pool)
    .await?;
    get(pool, stream).await?.ok_or_else(|| StoreError::Corrupt { table: "checkpoints", fault: format!("no {stream}") })
}

/// Reads a log's checkpoint.
pub(crate) async fn get(executor: impl PgExecutor<'_>, stream: &str) -> Result<Option<Checkpoint>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT stream, stream_created_at, generation, epoch, last_sequence, last_logged_at, announced_epoch, announced_sequence,
                  delivered_epoch, delivered_sequence, events_created_at
           FROM lead_state.checkpoints WHERE stream = $1"#,
        stream
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| Checkpoint {
        stream: row.stream,
        stream_created_at: row.stream_created_at,
        generation: row.generation,
        applied: LogPosition::message(row.epoch, row.last_sequence as u64),
        last_logged_at: row.last_logged_at.map(Into::into),
        announced: LogPosition::message(row.announced_epoch, row.announced_sequence as u64),
        delivered: LogPosition::message(row.delivered_epoch, row.delivered_sequence as u64),
        events_created_at: row.events_created_at,
    }))
}

/// Puts the checkpoint elsewhere, by compare-and-set on all that a leader moves: false if somebody else moved it. Of `to`,
/// everything but the stream's name is written. A leader of before is cut off by the generation or epoch, of which at
/// least one must differ.
pub(crate) async fn put(pool: &PgPool, from: &Checkpoint, to: &Checkpoint, now: Timestamp) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        r#"UPDATE lead_state.checkpoints
           SET stream_created_at = $1, generation = $2, epoch = $3, last_sequence = $4, last_logged_at = $5,
               announced_epoch = $6, announced_sequence = $7, delivered_epoch = $8, delivered_sequence = $9, events_created_at = $10,
               updated_at = $11
           WHERE stream = $12 AND generation = $13 AND epoch = $14 AND last_sequence = $15
             AND announced_epoch = $16 AND announced_sequence = $17"#,
        to.stream_created_at,
        to.generation,
        to.applied.epoch,
        to.applied.sequence as i64,
        to.last_logged_at.map(time),
        to.announced.epoch,
        to.announced.sequence as i64,
        to.delivered.epoch,
        to.delivered.sequence as i64,
        to.events_created_at,
        time(now),
        from.stream,
        from.generation,
        from.applied.epoch,
        from.applied.sequence as i64,
        from.announced.epoch,
        from.announced.sequence as i64
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Moves the announce watermark. Never moves back, and does nothing for a
/// leader of another generation or epoch.
pub(crate) async fn set_announced(
    pool: &PgPool,
    of: &Checkpoint,
    announced: LogPosition,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"UPDATE lead_state.checkpoints SET announced_epoch = $1, announced_sequence = $2, updated_at = $3
           WHERE stream = $4 AND generation = $5 AND epoch = $6 AND (announced_epoch, announced_sequence) < ($1, $2)"#,
        announced.epoch,
        announced.sequence as i64,
        time(now),
        of.stream,
        of.generation,
        of.applied.epoch
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Moves the delivered watermark: never back, nor beyond the announce watermark.
pub(crate) async fn set_delivered(pool: &PgPool, of: &Checkpoint, delivered: LogPosition) -> Result<(), StoreError> {
    sqlx::query!(
        r#"UPDATE lead_state.checkpoints SET delivered_epoch = $1, delivered_sequence = $2
           WHERE stream = $3 AND generation = $4 AND (delivered_epoch, delivered_sequence) < ($1, $2)
             AND ($1, $2) <= (announced_epoch, announced_sequence)"#,
        delivered.epoch,
        delivered.sequence as i64,
        of.stream,
        of.generation
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Notes which stream the events are in, where none was known.
pub(crate) async fn set_events(pool: &PgPool, of: &Checkpoint, created_at: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE lead_state.checkpoints SET events_created_at = $1 WHERE stream = $2 AND events_created_at IS NULL",
        created_at,
        of.stream
    )
    .execute(pool)
    .await?;
    Ok(())
}

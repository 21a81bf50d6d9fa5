//! 3 Read in order, 6 Announce: how far a command log is applied, announced and delivered.

use contract::{Timestamp, position::LogPosition};
use service_kit::postgres::Session;
use sqlx::PgExecutor;

use super::{
    StoreError,
    row::{Row, position_columns, time},
};

/// A log's checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// The log's name.
    pub(crate) stream: String,
    /// The log's identity (see [`identity`](contract::streams::identity)).
    pub(crate) stream_created_at: String,
    /// How often the announcements were rewound, by a recovery or because events were lost.
    pub(crate) generation: i32,
    /// The last entry that was applied. Its epoch is the current one.
    pub(crate) applied: LogPosition,
    /// When the log stored it; None before the first.
    pub(crate) last_logged_at: Option<Timestamp>,
    /// Whether it is the last entry of its message. If not, a pack is applied in part.
    pub(crate) ends_message: bool,
    /// The last entry whose event was announced. Its epoch is an older one while that is announced again.
    pub(crate) announced: LogPosition,
    /// The position up to which the webhook-notifier acked all events.
    pub(crate) delivered: LogPosition,
    /// The identity of the stream of events; None before a leader first read it, and after the stream lost events under
    /// a leader.
    pub(crate) events_created_at: Option<String>,
}

impl Checkpoint {
    /// The last sequence whose entries are all known to be applied and announced.
    pub(crate) fn last_announced_message(&self) -> u64 {
        let is_whole = self.announced == self.applied && self.ends_message;
        if is_whole { self.announced.sequence } else { self.announced.sequence.saturating_sub(1) }
    }

    /// The sequence of the message with the next entry.
    pub(crate) fn next_sequence(&self) -> u64 {
        if self.ends_message { self.applied.sequence + 1 } else { self.applied.sequence }
    }
}

/// Reads a log's checkpoint. Inserts one at position 0 into a database that has none; otherwise it does not write, so
/// that it does not wait for a commit that moves the checkpoint.
pub(crate) async fn load(
    connection: &mut Session,
    stream: &str,
    stream_created_at: &str,
    now: Timestamp,
) -> Result<Checkpoint, StoreError> {
    if let Some(checkpoint) = get(&mut *connection, stream).await? {
        return Ok(checkpoint);
    }
    sqlx::query!(
        r#"INSERT INTO lead_state.checkpoints
               (stream, stream_created_at, epoch, last_sequence, last_index, announced_epoch, announced_sequence,
                announced_index, delivered_epoch, delivered_sequence, delivered_index, updated_at)
           VALUES ($1, $2, 1, 0, 0, 1, 0, 0, 0, 0, 0, $3) ON CONFLICT DO NOTHING"#,
        stream,
        stream_created_at,
        time(now)
    )
    .execute(&mut *connection)
    .await?;
    let checkpoint = get(connection, stream).await?;
    checkpoint.ok_or_else(|| StoreError::Inconsistent(format!("checkpoints has no row for {stream}")))
}

pub(crate) async fn get(executor: impl PgExecutor<'_>, stream: &str) -> Result<Option<Checkpoint>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT stream, stream_created_at, generation, epoch, last_sequence, last_index, last_logged_at, ends_message,
                  announced_epoch, announced_sequence, announced_index, delivered_epoch, delivered_sequence,
                  delivered_index, events_created_at
           FROM lead_state.checkpoints WHERE stream = $1"#,
        stream
    )
    .fetch_optional(executor)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let stored = Row::new("checkpoints", &stream);
    Ok(Some(Checkpoint {
        stream_created_at: row.stream_created_at,
        generation: row.generation,
        applied: stored.position("last_sequence", (row.epoch, row.last_sequence, row.last_index))?,
        last_logged_at: row.last_logged_at.map(Into::into),
        ends_message: row.ends_message,
        announced: stored
            .position("announced_sequence", (row.announced_epoch, row.announced_sequence, row.announced_index))?,
        delivered: stored
            .position("delivered_sequence", (row.delivered_epoch, row.delivered_sequence, row.delivered_index))?,
        events_created_at: row.events_created_at,
        stream: row.stream,
    }))
}

/// Moves the watermarks back to those of `to`, in its generation, while a leader moves the checkpoint. Returns whether
/// the generation and the epoch were still those of `from`. The former leader can write nothing afterwards.
pub(crate) async fn rewind(
    connection: &mut Session,
    from: &Checkpoint,
    to: &Checkpoint,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let (announced_epoch, announced_sequence, announced_index) = position_columns(to.announced);
    let (delivered_epoch, delivered_sequence, delivered_index) = position_columns(to.delivered);
    let updated = sqlx::query!(
        r#"UPDATE lead_state.checkpoints AS c
           SET generation = $1, events_created_at = $2, updated_at = $3,
               (announced_epoch, announced_sequence, announced_index) = (
                   SELECT * FROM (VALUES (c.announced_epoch, c.announced_sequence, c.announced_index),
                                         ($4::int, $5::bigint, $6::int)) AS watermark (epoch, sequence, index)
                   ORDER BY epoch, sequence, index LIMIT 1),
               (delivered_epoch, delivered_sequence, delivered_index) = (
                   SELECT * FROM (VALUES (c.delivered_epoch, c.delivered_sequence, c.delivered_index),
                                         ($7::int, $8::bigint, $9::int)) AS watermark (epoch, sequence, index)
                   ORDER BY epoch, sequence, index LIMIT 1)
           WHERE c.stream = $10 AND c.generation = $11 AND c.epoch = $12"#,
        to.generation,
        to.events_created_at,
        time(now),
        announced_epoch,
        announced_sequence,
        announced_index,
        delivered_epoch,
        delivered_sequence,
        delivered_index,
        from.stream,
        from.generation,
        from.applied.epoch
    )
    .execute(&mut *connection)
    .await?;
    Ok(updated.rows_affected() == 1)
}

/// Replaces the checkpoint, except the stream's name, by compare-and-set on the columns that a leader moves. Returns
/// whether `from` was still the current one. A former leader can write nothing afterwards if the generation or the
/// epoch changes, so at least one of them must.
pub(crate) async fn replace(
    connection: &mut Session,
    from: &Checkpoint,
    to: &Checkpoint,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let (epoch, last_sequence, last_index) = position_columns(to.applied);
    let (announced_epoch, announced_sequence, announced_index) = position_columns(to.announced);
    let (delivered_epoch, delivered_sequence, delivered_index) = position_columns(to.delivered);
    let (from_epoch, from_sequence, from_index) = position_columns(from.applied);
    let (from_announced_epoch, from_announced_sequence, from_announced_index) = position_columns(from.announced);
    let updated = sqlx::query!(
        r#"UPDATE lead_state.checkpoints
           SET stream_created_at = $1, generation = $2, epoch = $3, last_sequence = $4, last_index = $5,
               last_logged_at = $6, announced_epoch = $7, announced_sequence = $8, announced_index = $9,
               delivered_epoch = $10, delivered_sequence = $11, delivered_index = $12, events_created_at = $13, updated_at = $14,
               ends_message = $15
           WHERE stream = $16 AND generation = $17 AND (epoch, last_sequence, last_index) = ($18, $19, $20)
             AND (announced_epoch, announced_sequence, announced_index) = ($21, $22, $23)"#,
        to.stream_created_at,
        to.generation,
        epoch,
        last_sequence,
        last_index,
        to.last_logged_at.map(time),
        announced_epoch,
        announced_sequence,
        announced_index,
        delivered_epoch,
        delivered_sequence,
        delivered_index,
        to.events_created_at,
        time(now),
        to.ends_message,
        from.stream,
        from.generation,
        from_epoch,
        from_sequence,
        from_index,
        from_announced_epoch,
        from_announced_sequence,
        from_announced_index
    )
    .execute(connection)
    .await?;
    Ok(updated.rows_affected() == 1)
}

/// Moves the announce watermark: never back, and not for a leader of another generation or epoch.
pub(crate) async fn set_announced(
    connection: &mut Session,
    checkpoint: &Checkpoint,
    announced: LogPosition,
    now: Timestamp,
) -> Result<(), StoreError> {
    let (epoch, sequence, index) = position_columns(announced);
    sqlx::query!(
        r#"UPDATE lead_state.checkpoints
           SET announced_epoch = $1, announced_sequence = $2, announced_index = $3, updated_at = $4
           WHERE stream = $5 AND generation = $6 AND epoch = $7
             AND (announced_epoch, announced_sequence, announced_index) < ($1, $2, $3)"#,
        epoch,
        sequence,
        index,
        time(now),
        checkpoint.stream,
        checkpoint.generation,
        checkpoint.applied.epoch
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Moves the delivered watermark: never back, nor beyond the announce watermark.
pub(crate) async fn set_delivered(
    connection: &mut Session,
    checkpoint: &Checkpoint,
    delivered: LogPosition,
) -> Result<(), StoreError> {
    let (epoch, sequence, index) = position_columns(delivered);
    sqlx::query!(
        r#"UPDATE lead_state.checkpoints SET delivered_epoch = $1, delivered_sequence = $2, delivered_index = $3
           WHERE stream = $4 AND generation = $5
             AND (delivered_epoch, delivered_sequence, delivered_index) < ($1, $2, $3)
             AND ($1, $2, $3) <= (announced_epoch, announced_sequence, announced_index)"#,
        epoch,
        sequence,
        index,
        checkpoint.stream,
        checkpoint.generation
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Sets the identity of the stream of events, unless it changed since the checkpoint was read.
pub(crate) async fn set_events(
    connection: &mut Session,
    checkpoint: &Checkpoint,
    created_at: &str,
) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE lead_state.checkpoints SET events_created_at = $1
         WHERE stream = $2 AND events_created_at IS NOT DISTINCT FROM $3",
        created_at,
        checkpoint.stream,
        checkpoint.events_created_at
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets the identity of the event stream after it lost announced events, so that the next term announces again from
/// the delivered watermark. Does nothing for a leader of another generation.
pub(crate) async fn forget_events(connection: &mut Session, checkpoint: &Checkpoint) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE lead_state.checkpoints SET events_created_at = NULL WHERE stream = $1 AND generation = $2",
        checkpoint.stream,
        checkpoint.generation
    )
    .execute(connection)
    .await?;
    Ok(())
}

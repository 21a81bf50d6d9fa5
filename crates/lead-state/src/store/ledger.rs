//! 6 Announce: the ledger as outbox of the completion events, and positions in it.

use std::collections::HashSet;

use contract::{Timestamp, command::MAX_TEXT_CHARS, event::CompletionEvent, position::LogPosition};
use service_kit::postgres::Pool;

use super::{
    StoreError,
    queued_updates::update_key,
    row::{Hex, Row, position_columns},
};
use crate::core::batch::{LeadKeys, LedgerRow, UpdateKey};

pub(super) const TABLE: &str = "lead_updates";

/// An event to announce.
#[derive(Debug, Clone)]
pub(crate) struct Announcement {
    /// The log entry at which the update was decided.
    pub(crate) decided_at: LogPosition,
    pub(crate) traceparent: Option<String>,
    pub(crate) event: CompletionEvent,
}

impl From<LedgerRow> for Announcement {
    fn from(row: LedgerRow) -> Self {
        Self { decided_at: row.decided_at, traceparent: row.traceparent, event: row.event }
    }
}

/// The events of the updates that were decided at the positions in `(after, up_to]` of one epoch, in this order: at
/// least `limit` of them if there are as many, and always all events of a position.
pub(crate) async fn outbox(
    pool: &Pool,
    after: LogPosition,
    up_to: LogPosition,
    limit: i64,
) -> Result<Vec<Announcement>, StoreError> {
    let (epoch, after_sequence, after_index) = position_columns(after);
    let (_, last_sequence, last_index) = position_columns(up_to);
    let rows = sqlx::query!(
        r#"WITH own AS (
               SELECT *, log_sequence AS sequence, log_index AS index FROM lead_state.lead_updates
               WHERE log_epoch = $1 AND (log_sequence, log_index) > ($2, $3) AND (log_sequence, log_index) <= ($4, $5)
                   AND decided_sequence IS NULL
               ORDER BY log_sequence, log_index LIMIT $6
           ), later AS (
               SELECT *, decided_sequence AS sequence, decided_index AS index FROM lead_state.lead_updates
               WHERE decided_epoch = $1 AND (decided_sequence, decided_index) > ($2, $3)
                   AND (decided_sequence, decided_index) <= ($4, $5) AND decided_sequence IS NOT NULL
               ORDER BY decided_sequence, decided_index FETCH FIRST ($6) ROWS WITH TIES
           ), first AS (
               SELECT * FROM (SELECT * FROM own UNION ALL SELECT * FROM later) AS decided
               ORDER BY sequence, index FETCH FIRST ($6) ROWS WITH TIES
           )
           SELECT project_id AS "project_id!", update_id AS "update_id!", sequence AS "sequence!", index AS "index!",
                  kind AS "kind!", lead_id, process_id, reference_id, success AS "success!", error, error_code, from_state, to_state,
                  CASE WHEN success THEN disposition END AS disposition,
                  CASE WHEN kind <> 'update' THEN left(command->>'callId', $7) END AS call_id,
                  CASE WHEN kind = 'call.ended' AND success THEN command->>'result' END AS activity,
                  CASE WHEN kind = 'lead.created' AND success THEN command->>'contact' END AS contact, version, user_id,
                  warnings AS "warnings!", data::text AS data, traceparent, applied_at AS "applied_at!"
           FROM first ORDER BY sequence, index, log_epoch, log_sequence, log_index"#,
        epoch,
        after_sequence,
        after_index,
        last_sequence,
        last_index,
        limit,
        MAX_TEXT_CHARS as i32
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let stored = Row::new(TABLE, Hex(&row.update_id));
            Ok(Announcement {
                decided_at: stored.position("decided_sequence", (epoch, row.sequence, row.index))?,
                traceparent: row.traceparent,
                event: CompletionEvent {
                    kind: stored.kind(&row.kind)?,
                    update_id: stored.id("update_id", &row.update_id)?,
                    project_id: stored.id("project_id", &row.project_id)?,
                    process_id: stored.optional_id("process_id", row.process_id.as_deref())?,
                    lead_id: stored.optional_id("lead_id", row.lead_id.as_deref())?,
                    reference_id: row.reference_id,
                    success: row.success,
                    error: row.error,
                    error_code: row.error_code,
                    from_state: row.from_state,
                    to_state: row.to_state,
                    version: row.version,
                    disposition: row.disposition,
                    call_id: row.call_id,
                    activity: stored.optional_json("command", row.activity.as_deref())?,
                    contact: stored.optional_json("command", row.contact.as_deref())?,
                    user_id: row.user_id,
                    warnings: row.warnings,
                    timestamp: row.applied_at.into(),
                    data: stored.optional_object("data", row.data)?,
                },
            })
        })
        .collect()
}

/// The updates and call events of a batch that are in the ledger already.
pub(crate) async fn duplicates(pool: &Pool, keys: &LeadKeys) -> Result<HashSet<UpdateKey>, StoreError> {
    let (projects, updates): (Vec<_>, Vec<_>) =
        keys.updates.iter().map(|(project, update)| (*project.as_bytes(), *update.as_bytes())).unzip();
    // Lateral with a limit: one look-up per update, in the index of its partition.
    let rows = sqlx::query!(
        r#"SELECT u.project_id, u.update_id
           FROM unnest($1::bytea[], $2::bytea[]) AS n (project_id, update_id)
           CROSS JOIN LATERAL (
               SELECT u.project_id, u.update_id FROM lead_state.lead_updates u
               WHERE u.project_id = n.project_id AND u.update_id = n.update_id
               LIMIT 1
           ) AS u"#,
        &projects as _,
        &updates as _
    )
    .fetch_all(pool)
    .await?;
    rows.iter().map(|row| update_key(TABLE, &row.project_id, &row.update_id)).collect()
}

/// The position of the last decision at or before this one.
pub(crate) async fn last_up_to(pool: &Pool, at: LogPosition) -> Result<Option<LogPosition>, StoreError> {
    let (epoch, sequence, index) = position_columns(at);
    let row = sqlx::query!(
        r#"SELECT epoch AS "epoch!", sequence AS "sequence!", index AS "index!" FROM (
               (SELECT log_epoch AS epoch, log_sequence AS sequence, log_index AS index FROM lead_state.lead_updates
                WHERE (log_epoch, log_sequence, log_index) <= ($1, $2, $3) AND decided_sequence IS NULL
                ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT 1)
               UNION ALL
               (SELECT decided_epoch, decided_sequence, decided_index FROM lead_state.lead_updates
                WHERE (decided_epoch, decided_sequence, decided_index) <= ($1, $2, $3) AND decided_sequence IS NOT NULL
                ORDER BY decided_epoch DESC, decided_sequence DESC, decided_index DESC LIMIT 1)
           ) AS last ORDER BY epoch DESC, sequence DESC, index DESC LIMIT 1"#,
        epoch,
        sequence,
        index
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| Row::new(TABLE, &at).position("log_sequence", (row.epoch, row.sequence, row.index))).transpose()
}

/// When the first update after this position was applied.
pub(crate) async fn first_applied_after(pool: &Pool, at: LogPosition) -> Result<Option<Timestamp>, StoreError> {
    let (epoch, sequence, index) = position_columns(at);
    let applied_at = sqlx::query_scalar!(
        r#"SELECT min(applied_at) FROM (
               (SELECT applied_at FROM lead_state.lead_updates
                WHERE (log_epoch, log_sequence, log_index) > ($1, $2, $3) AND decided_sequence IS NULL
                ORDER BY log_epoch, log_sequence, log_index LIMIT 1)
               UNION ALL
               (SELECT applied_at FROM lead_state.lead_updates
                WHERE (decided_epoch, decided_sequence, decided_index) > ($1, $2, $3) AND decided_sequence IS NOT NULL
                ORDER BY decided_epoch, decided_sequence, decided_index LIMIT 1)
           ) AS first"#,
        epoch,
        sequence,
        index
    )
    .fetch_one(pool)
    .await?;
    Ok(applied_at.map(Into::into))
}

/// A position in or before the message whose updates are the first that were applied at or after this time; None if
/// there are no such updates. The times of the ledger's rows increase with their positions, so the rows are searched by
/// halves.
pub(crate) async fn position_before(
    pool: &Pool,
    since: Timestamp,
    applied: LogPosition,
) -> Result<Option<LogPosition>, StoreError> {
    // Whether the first update after this message, in the same epoch, was applied since. None if there is no update.
    let is_since = async |epoch, sequence| {
        let last = LogPosition { epoch, sequence: i64::MAX as u64, index: i32::MAX as u32 };
        let rows = outbox(pool, LogPosition::message(epoch, sequence), last, 1).await?;
        Ok::<_, StoreError>(rows.first().map(|row| row.event.timestamp >= since))
    };
    let mut found = None;
    for epoch in (0..=applied.epoch).rev() {
        match is_since(epoch, 0).await? {
            Some(true) => found = Some(LogPosition::message(epoch, 0)),
            None => {}
            Some(false) => {
                let (mut low, mut high) =
                    (0, if epoch == applied.epoch { applied.sequence + 1 } else { i64::MAX as u64 });
                while high - low > 1 {
                    let middle = low + (high - low) / 2;
                    match is_since(epoch, middle).await? {
                        Some(false) => low = middle,
                        Some(true) | None => high = middle,
                    }
                }
                let is_last = is_since(epoch, high).await?.is_none();
                return Ok(found.or((!is_last).then(|| LogPosition::message(epoch, high))));
            }
        }
    }
    Ok(found)
}

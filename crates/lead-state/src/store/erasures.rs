//! Erasures of leads: the lead itself in the batch's transaction, the content of its ledger rows in steps.

use contract::{ObjectId, Timestamp, event::ERASED, position::LogPosition, streams::LEAD_COMMANDS};
use service_kit::postgres::{Pool, Session};

use super::{
    StoreError,
    row::{Hex, Row, position_columns, time},
};
use crate::core::batch::Erasure;

/// The most failed updates that are assigned to an erased lead, because they named its external id before the lead
/// existed. A larger number makes the batch's transaction longer.
const MAX_BY_REFERENCE: i64 = 1000;
/// The ledger rows of one step. More hold their locks longer, fewer take more statements.
const STEP: i64 = 200;

/// A lead whose ledger rows still have content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PendingErasure {
    pub(crate) lead_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) position: LogPosition,
}

/// Erases the columns that only the row of a lead has, and makes the erasure of its ledger rows pending.
pub(super) async fn write(connection: &mut Session, erasures: &[Erasure], now: Timestamp) -> Result<(), StoreError> {
    // One by one: erasures are rare.
    for Erasure { lead_id, project_id, process_id, reference_id, position } in erasures {
        sqlx::query!(
            "UPDATE lead_state.leads
             SET reference_id = NULL, group_id = NULL, phone = NULL, email = NULL, erased_at = coalesce(erased_at, $2)
             WHERE lead_id = $1",
            lead_id.as_bytes(),
            time(now)
        )
        .execute(&mut *connection)
        .await?;
        // A creation that is not logged yet is dropped: its event would contain only ids.
        sqlx::query!("DELETE FROM lead_state.created_leads WHERE lead_id = $1", lead_id.as_bytes())
            .execute(&mut *connection)
            .await?;
        let (epoch, sequence, index) = position_columns(*position);
        sqlx::query!(
            "INSERT INTO lead_state.pending_erasures AS p (lead_id, project_id, log_epoch, log_sequence, log_index)
             VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (lead_id) DO UPDATE SET log_epoch = $3, log_sequence = $4, log_index = $5",
            lead_id.as_bytes(),
            project_id.as_bytes(),
            epoch,
            sequence,
            index
        )
        .execute(&mut *connection)
        .await?;
        let Some(reference_id) = reference_id else { continue };
        sqlx::query!(
            "UPDATE lead_state.lead_updates AS u SET lead_id = $1
             FROM (SELECT project_id, update_id FROM lead_state.lead_updates
                   WHERE project_id = $2 AND md5(reference_id) = md5($3) AND reference_id = $3 AND lead_id IS NULL
                       AND coalesce(lower(command->>'processId'), $4) = $4
                       AND (log_epoch, log_sequence, log_index) < ($6, $7, $8)
                   LIMIT $5) AS n
             WHERE u.project_id = n.project_id AND u.update_id = n.update_id",
            lead_id.as_bytes(),
            project_id.as_bytes(),
            reference_id,
            process_id.to_string(),
            MAX_BY_REFERENCE,
            epoch,
            sequence,
            index
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The pending erasures that are announced. All earlier updates are announced too, so the content of their rows is no
/// longer needed for events.
pub(crate) async fn announced(pool: &Pool) -> Result<Vec<PendingErasure>, StoreError> {
    let rows = sqlx::query!(
        "SELECT p.lead_id, p.project_id, p.log_epoch, p.log_sequence, p.log_index
         FROM lead_state.pending_erasures p JOIN lead_state.checkpoints c ON c.stream = $1
         WHERE (p.log_epoch, p.log_sequence, p.log_index)
                   <= (c.announced_epoch, c.announced_sequence, c.announced_index)
         LIMIT 100",
        LEAD_COMMANDS
    )
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let stored = Row::new("pending_erasures", Hex(&row.lead_id));
            Ok(PendingErasure {
                lead_id: stored.id("lead_id", &row.lead_id)?,
                project_id: stored.id("project_id", &row.project_id)?,
                position: stored.position("log_sequence", (row.log_epoch, row.log_sequence, row.log_index))?,
            })
        })
        .collect()
}

/// Erases the content of a lead's next ledger rows after `after`. Returns the position of the last one; none if there
/// are no more. Repeating a step changes nothing.
pub(crate) async fn erase_rows(
    pool: &Pool,
    erasure: &PendingErasure,
    after: Option<LogPosition>,
) -> Result<Option<LogPosition>, StoreError> {
    let (after_epoch, after_sequence, after_index) = after.map_or((-1, 0, 0), position_columns);
    let (epoch, sequence, index) = position_columns(erasure.position);
    let last = sqlx::query!(
        r#"WITH step AS MATERIALIZED (
               SELECT project_id, update_id, log_epoch, log_sequence, log_index FROM lead_state.lead_updates
               WHERE lead_id = $1 AND project_id = $2 AND (log_epoch, log_sequence, log_index) > ($3, $4, $5)
                   AND (log_epoch, log_sequence, log_index) < ($6, $7, $8)
               ORDER BY log_epoch, log_sequence, log_index LIMIT $9
           ), erased AS (
               UPDATE lead_state.lead_updates AS u
               SET command = '{}', reference_id = NULL, error = CASE WHEN u.error IS NOT NULL THEN $10 END,
                   disposition = NULL, user_id = NULL, warnings = '{}', data = NULL
               FROM step WHERE u.project_id = step.project_id AND u.update_id = step.update_id
           )
           SELECT log_epoch, log_sequence, log_index FROM step
           ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT 1"#,
        erasure.lead_id.as_bytes(),
        erasure.project_id.as_bytes(),
        after_epoch,
        after_sequence,
        after_index,
        epoch,
        sequence,
        index,
        STEP,
        ERASED
    )
    .fetch_optional(pool)
    .await?;
    let id = erasure.lead_id;
    last.map(|row| {
        Row::new("lead_updates", &id).position("log_sequence", (row.log_epoch, row.log_sequence, row.log_index))
    })
    .transpose()
}

/// Ends an erasure, unless the lead was erased again meanwhile.
pub(crate) async fn finish(pool: &Pool, erasure: &PendingErasure) -> Result<(), StoreError> {
    let (epoch, sequence, index) = position_columns(erasure.position);
    sqlx::query!(
        "DELETE FROM lead_state.pending_erasures
         WHERE lead_id = $1 AND log_epoch = $2 AND log_sequence = $3 AND log_index = $4",
        erasure.lead_id.as_bytes(),
        epoch,
        sequence,
        index
    )
    .execute(pool)
    .await?;
    Ok(())
}

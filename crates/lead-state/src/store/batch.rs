//! 5 Apply: the one transaction that a batch writes.

use contract::{ObjectId, Timestamp, position::LogPosition};
use service_kit::postgres::{PinnedConnection, Session};

use super::{
    StoreError,
    checkpoint::Checkpoint,
    columns::query_columns,
    erasures, queued_updates,
    row::{position_columns, time},
};
use crate::core::{
    batch::{LedgerRow, Plan},
    decide::Call,
    statistics::{call_facts, count_updates},
};

/// A batch to write.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    /// The checkpoint that the batch was decided at.
    pub(crate) from: &'a Checkpoint,
    /// The last log entry of the batch.
    pub(crate) last: LogPosition,
    /// When the log stored it.
    pub(crate) logged_at: Timestamp,
    /// Whether it is the last entry of its message.
    pub(crate) ends_message: bool,
    /// The processes whose rules the decision used, with the revisions of these rules.
    pub(crate) revisions: &'a [(ObjectId, i64)],
    /// The announce watermark, written with the batch.
    pub(crate) announced: LogPosition,
    pub(crate) plan: &'a Plan,
}

/// Writes a batch in one transaction: checkpoint, leads, ledger and its counts, calls, queued updates and erasures.
pub(crate) async fn write(
    connection: &mut PinnedConnection,
    batch: &Batch<'_>,
    now: Timestamp,
) -> Result<(), StoreError> {
    let plan = batch.plan;
    let mut session = connection.take().await?;
    if plan.is_plain() {
        // A single statement is a transaction without BEGIN and COMMIT, which cost a round trip each.
        write_updates(&mut session, batch, now).await?;
    } else {
        let mut transaction = session.begin().await?;
        write_updates(&mut transaction, batch, now).await?;
        write_calls(&mut transaction, &plan.calls).await?;
        queued_updates::delete(&mut transaction, &plan.released).await?;
        queued_updates::insert(&mut transaction, &plan.newly_queued).await?;
        erasures::write(&mut transaction, &plan.erasures, now).await?;
        session = transaction.commit().await?;
    }
    connection.keep(session);
    Ok(())
}

/// The statement of a batch. A macro, because its text must be a literal, and the columns are part of it.
macro_rules! batch_query {
    ($scalars:tt, $revisions:ident, $leads:ident, $rows:ident, $counts:ident) => {
        query_columns!(query_scalar, $scalars,
        "WITH moved AS (
             UPDATE lead_state.checkpoints
             SET last_sequence = $1, last_index = $2, updated_at = $3, last_logged_at = $4, ends_message = $14,
                 announced_epoch = greatest(announced_epoch, $5),
                 announced_sequence = CASE WHEN (announced_epoch, announced_sequence, announced_index) < ($5, $6, $7)
                                           THEN $6 ELSE announced_sequence END,
                 announced_index = CASE WHEN (announced_epoch, announced_sequence, announced_index) < ($5, $6, $7)
                                        THEN $7 ELSE announced_index END
             WHERE stream = $8 AND generation = $9 AND epoch = $10 AND last_sequence = $11 AND last_index = $12
                 AND NOT EXISTS (SELECT FROM "
        unnest($revisions) {
            "process_id" "bytea[]" = |(process_id, _)| *process_id.as_bytes();
            "revision" "bigint[]" = |(_, revision)| *revision;
        }
        "                        JOIN lead_state.processes p USING (process_id) WHERE p.revision <> n.revision)
             RETURNING 1
         ), changed AS (
             UPDATE lead_state.leads AS l SET name = n.name, state = n.state, disposition = n.disposition,
                 metadata = n.metadata::json, version = n.version, updated_at = $3 FROM "
        unnest($leads) {
            "lead_id" "bytea[]" = |lead| *lead.lead_id.as_bytes();
            "name" "text[]" = |lead| lead.name.as_deref();
            "state" "text[]" = |lead| lead.state.as_str();
            "disposition" "text[]" = |lead| lead.disposition.as_deref();
            "metadata" "text[]" = |lead| lead.metadata.get();
            "version" "bigint[]" = |lead| lead.version;
        }
        "    WHERE l.lead_id = n.lead_id AND EXISTS (SELECT FROM moved) RETURNING 1
         ), logged AS (
             INSERT INTO lead_state.lead_updates"
        insert($rows) {
            "project_id" "bytea[]" = |row| *row.event.project_id.as_bytes();
            "update_id" "bytea[]" = |row| *row.event.update_id.as_bytes();
            "kind" "text[]" = |row| row.event.kind.as_str();
            "log_epoch" "int[]" = |row| row.position.epoch;
            "log_sequence" "bigint[]" = |row| position_columns(row.position).1;
            "log_index" "int[]" = |row| position_columns(row.position).2;
            "logged_at" "timestamptz[]" = |row| time(row.logged_at);
            "lead_id" "bytea[]" = |row| row.event.lead_id.map(|id| *id.as_bytes());
            "process_id" "bytea[]" = |row| row.event.process_id.map(|id| *id.as_bytes());
            "reference_id" "text[]" = |row| row.event.reference_id.as_deref();
            "command" "text[]" "n.command::json" = |row| &*row.text;
            "success" "n.error IS NULL";
            "error" "text[]" = |row| row.event.error.as_deref();
            "error_code" "text[]" = |row| row.event.error_code.as_deref();
            "from_state" "text[]" = |row| row.event.from_state.as_deref();
            "to_state" "text[]" = |row| row.event.to_state.as_deref();
            "disposition" "text[]" = |row| row.disposition.as_deref();
            "version" "bigint[]" = |row| row.event.version;
            "user_id" "text[]" = |row| row.event.user_id.as_deref();
            "api_key_id" "bytea[]" = |row| row.api_key_id.map(|id| *id.as_bytes());
            "warnings" "json[]"
                "CASE WHEN n.warnings IS NULL THEN '{}' ELSE ARRAY(SELECT json_array_elements_text(n.warnings)) END"
                = |row| (!row.event.warnings.is_empty()).then(|| serde_json::json!(row.event.warnings));
            "data" "text[]" "n.data::json" = |row| row.event.data.as_ref().map(|data| data.get());
            "traceparent" "text[]" = |row| row.traceparent.as_deref();
            "applied_at" "timestamptz[]" = |row| time(row.event.timestamp);
            "decided_epoch" "CASE WHEN n.decided_sequence IS NOT NULL THEN $10 END";
            "decided_sequence" "bigint[]" = |row| decided_later(row).map(|(_, sequence, _)| sequence);
            "decided_index" "int[]" = |row| decided_later(row).map(|(_, _, index)| index);
            "counted" "true";
            "call_facts" "smallint[]" = |row| call_facts(&row.event);
        }
        "    WHERE EXISTS (SELECT FROM moved)
         ), counted AS (
             INSERT INTO lead_state.update_counts AS c"
        insert($counts) {
            "project_id" "bytea[]" = |count| *count.key.project_id.as_bytes();
            "minute" "timestamptz[]" = |count| time(count.key.minute);
            "process_id" "bytea[]" = |count| count.key.process_id.as_ref().map_or(&[][..], |id| id.as_bytes());
            "kind" "text[]" = |count| count.key.kind;
            "code" "text[]" = |count| count.key.code;
            "id_month" "date[]" = |count| count.key.id_month;
            "updates" "bigint[]" = |count| count.updates;
        }
        "    WHERE EXISTS (SELECT FROM moved)
             ON CONFLICT (project_id, minute, process_id, kind, code, id_month)
                 DO UPDATE SET updates = c.updates + excluded.updates
         )
         SELECT CASE WHEN EXISTS (SELECT FROM moved) THEN
                     lead_state.require_changed_leads((SELECT count(*) FROM changed), $13)
                     ELSE false END AS \"is_current!\""
        )
    };
}

/// Moves the checkpoint by compare-and-set, and changes leads, the ledger and its counts only if that succeeded and no
/// process has changed since its rules were read. So a former leader, a second reader, and a decision by outdated rules
/// write nothing. One statement, because each costs a round trip and most batches are small.
async fn write_updates(connection: &mut Session, batch: &Batch<'_>, now: Timestamp) -> Result<(), StoreError> {
    let &Batch { from, last, logged_at, ends_message, revisions, announced, plan: Plan { leads, rows, .. } } = batch;
    let (epoch, applied_sequence, applied_index) = position_columns(from.applied);
    let (_, last_sequence, last_index) = position_columns(last);
    let (announced_epoch, announced_sequence, announced_index) = position_columns(announced);
    let counts = count_updates(rows);
    let is_current = batch_query!(
        [
            last_sequence,
            last_index,
            time(now),
            time(logged_at),
            announced_epoch,
            announced_sequence,
            announced_index,
            from.stream,
            from.generation,
            epoch,
            applied_sequence,
            applied_index,
            leads.len() as i64,
            ends_message,
        ],
        revisions,
        leads,
        rows,
        counts
    )
    .fetch_one(connection)
    .await?;
    if is_current { Ok(()) } else { Err(StoreError::Fenced) }
}

/// Where an update was decided, unless that is its own log entry. The epoch is always the current one.
fn decided_later(row: &LedgerRow) -> Option<(i32, i64, i32)> {
    (row.decided_at != row.position).then(|| position_columns(row.decided_at))
}

/// Replaces the calls of leads.
async fn write_calls(connection: &mut Session, calls: &[(ObjectId, Vec<Call>)]) -> Result<(), StoreError> {
    if calls.is_empty() {
        return Ok(());
    }
    let leads: Vec<_> = calls.iter().map(|(lead_id, _)| *lead_id.as_bytes()).collect();
    sqlx::query!("DELETE FROM lead_state.active_calls WHERE lead_id = ANY($1::bytea[])", &leads as _)
        .execute(&mut *connection)
        .await?;
    let calls: Vec<_> = calls.iter().flat_map(|(lead, calls)| calls.iter().map(move |call| (lead, call))).collect();
    query_columns!(query, [],
        "INSERT INTO lead_state.active_calls"
        insert(calls) {
            "lead_id" "bytea[]" = |(lead_id, _)| *lead_id.as_bytes();
            "project_id"
                "(SELECT l.project_id FROM lead_state.leads l WHERE l.lead_id = n.lead_id)";
            "call_id" "text[]" = |(_, call)| call.call_id.as_str();
            "started_at" "timestamptz[]" = |(_, call)| time(call.started_at);
            "expires_at" "timestamptz[]" = |(_, call)| time(call.expires_at);
        }
    )
    .execute(connection)
    .await?;
    Ok(())
}

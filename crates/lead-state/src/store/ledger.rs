//! 6 Announce: the ledger as outbox, and as the story of an update.

use contract::{
    ObjectId, Timestamp,
    event::CompletionEvent,
    position::LogPosition,
    rpc::{self, Activity, UpdateStatus},
};
use sqlx::PgPool;

use super::{StoreError, id, object, optional_id};
use crate::core::batch::LedgerRow;

const TABLE: &str = "lead_updates";

/// An event to announce.
#[derive(Debug, Clone)]
pub(crate) struct Announcement {
    /// The log entry at which it was decided.
    pub(crate) decided_at: LogPosition,
    pub(crate) traceparent: Option<String>,
    pub(crate) event: CompletionEvent,
}

impl From<LedgerRow> for Announcement {
    fn from(row: LedgerRow) -> Self {
        Self { decided_at: row.decided_at, traceparent: row.update.traceparent, event: row.event }
    }
}

/// The events of what was decided at the entries in `(after, up_to]` of one epoch, in this order: `limit`, and all that were decided
/// at the same entry as the last one.
pub(crate) async fn outbox(
    pool: &PgPool,
    after: LogPosition,
    up_to: LogPosition,
    limit: i64,
) -> Result<Vec<Announcement>, StoreError> {
    let rows = sqlx::query!(
        r#"WITH own AS (
               SELECT *, log_sequence AS seq FROM lead_state.lead_updates
               WHERE log_epoch = $1 AND log_sequence > $2 AND log_sequence <= $3 AND decided_sequence IS NULL
               ORDER BY log_sequence LIMIT $4
           ), later AS (
               SELECT *, decided_sequence AS seq FROM lead_state.lead_updates
               WHERE decided_epoch = $1 AND decided_sequence > $2 AND decided_sequence <= $3 AND decided_sequence IS NOT NULL
               ORDER BY decided_sequence FETCH FIRST ($4) ROWS WITH TIES
           ), first AS (
               SELECT * FROM (SELECT * FROM own UNION ALL SELECT * FROM later) AS all_of_them
               ORDER BY seq FETCH FIRST ($4) ROWS WITH TIES
           )
           SELECT project_id AS "project_id!", update_id AS "update_id!", seq AS "seq!", lead_id, process_id, reference_id,
                  success AS "success!", error, error_code, from_state, to_state, version, user_id,
                  warnings AS "warnings!", data::text AS data, traceparent, applied_at AS "applied_at!"
           FROM first ORDER BY seq, log_epoch, log_sequence"#,
        after.epoch,
        after.sequence as i64,
        up_to.sequence as i64,
        limit
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let update_id = id(TABLE, "update_id", &row.update_id)?;
            Ok(Announcement {
                decided_at: LogPosition::message(after.epoch, row.seq as u64),
                traceparent: row.traceparent,
                event: CompletionEvent {
                    update_id,
                    project_id: id(TABLE, "project_id", &row.project_id)?,
                    process_id: optional_id(TABLE, "process_id", row.process_id.as_deref())?,
                    lead_id: optional_id(TABLE, "lead_id", row.lead_id.as_deref())?,
                    reference_id: row.reference_id,
                    success: row.success,
                    error: row.error,
                    error_code: row.error_code,
                    from_state: row.from_state,
                    to_state: row.to_state,
                    version: row.version,
                    user_id: row.user_id,
                    warnings: row.warnings,
                    timestamp: row.applied_at.into(),
                    data: row.data.map(|text| object(TABLE, "data", update_id, text)).transpose()?,
                },
            })
        })
        .collect()
}

/// An update's story up to its outcome, if it has one.
pub(crate) async fn find(
    pool: &PgPool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Option<rpc::Update>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT log_sequence, logged_at, lead_id, process_id, reference_id, command::text AS "command!", success, error,
                  error_code, from_state, to_state, version, user_id, api_key_id, warnings, data::text AS data, applied_at
           FROM lead_state.lead_updates WHERE project_id = $1 AND update_id = $2"#,
        project_id.as_bytes(),
        update_id.as_bytes()
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        Ok(rpc::Update {
            update_id,
            status: if row.success { UpdateStatus::Succeeded } else { UpdateStatus::Failed },
            command: Some(object(TABLE, "command", update_id, row.command)?),
            log_sequence: Some(row.log_sequence as u64),
            logged_at: Some(row.logged_at.into()),
            lead_id: optional_id(TABLE, "lead_id", row.lead_id.as_deref())?,
            process_id: optional_id(TABLE, "process_id", row.process_id.as_deref())?,
            reference_id: row.reference_id,
            error: row.error,
            error_code: row.error_code,
            from_state: row.from_state,
            to_state: row.to_state,
            version: row.version,
            user_id: row.user_id,
            api_key_id: optional_id(TABLE, "api_key_id", row.api_key_id.as_deref())?,
            warnings: row.warnings,
            applied_at: Some(row.applied_at.into()),
            data: row.data.map(|text| object(TABLE, "data", update_id, text)).transpose()?,
            queued_until: None,
        })
    })
    .transpose()
}

/// A lead's last updates, newest first.
pub(crate) async fn activities(
    pool: &PgPool,
    project_id: ObjectId,
    lead_id: ObjectId,
) -> Result<Vec<Activity>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT update_id, success, error, from_state, to_state, disposition, user_id, applied_at
           FROM lead_state.lead_updates WHERE lead_id = $1 AND project_id = $2
           ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT $3"#,
        lead_id.as_bytes(),
        project_id.as_bytes(),
        rpc::LEAD_ACTIVITIES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Activity {
                update_id: id(TABLE, "update_id", &row.update_id)?,
                success: row.success,
                error: row.error,
                from_state: row.from_state,
                to_state: row.to_state,
                disposition: row.disposition,
                user_id: row.user_id,
                timestamp: row.applied_at.into(),
            })
        })
        .collect()
}

/// The place of the last decision up to this one that is in the ledger.
pub(crate) async fn last_up_to(pool: &PgPool, at: LogPosition) -> Result<Option<LogPosition>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT epoch AS "epoch!", seq AS "seq!" FROM (
               (SELECT log_epoch AS epoch, log_sequence AS seq FROM lead_state.lead_updates
                WHERE (log_epoch, log_sequence) <= ($1, $2) AND decided_sequence IS NULL
                ORDER BY log_epoch DESC, log_sequence DESC LIMIT 1)
               UNION ALL
               (SELECT decided_epoch, decided_sequence FROM lead_state.lead_updates
                WHERE (decided_epoch, decided_sequence) <= ($1, $2) AND decided_sequence IS NOT NULL
                ORDER BY decided_epoch DESC, decided_sequence DESC LIMIT 1)
           ) AS last ORDER BY epoch DESC, seq DESC LIMIT 1"#,
        at.epoch,
        at.sequence as i64
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| LogPosition::message(row.epoch, row.seq as u64)))
}

/// When the first row behind this place was applied.
pub(crate) async fn first_behind(pool: &PgPool, at: LogPosition) -> Result<Option<Timestamp>, StoreError> {
    let applied_at = sqlx::query_scalar!(
        r#"SELECT min(applied_at) FROM (
               (SELECT applied_at FROM lead_state.lead_updates
                WHERE (log_epoch, log_sequence) > ($1, $2) AND decided_sequence IS NULL
                ORDER BY log_epoch, log_sequence LIMIT 1)
               UNION ALL
               (SELECT applied_at FROM lead_state.lead_updates
                WHERE (decided_epoch, decided_sequence) > ($1, $2) AND decided_sequence IS NOT NULL
                ORDER BY decided_epoch, decided_sequence LIMIT 1)
           ) AS first"#,
        at.epoch,
        at.sequence as i64
    )
    .fetch_one(pool)
    .await?;
    Ok(applied_at.map(Into::into))
}

/// How many calls are in progress.
pub(crate) async fn active_calls(pool: &PgPool, now: Timestamp) -> Result<i64, StoreError> {
    let calls = sqlx::query_scalar!(
        r#"SELECT count(*) AS "calls!" FROM lead_state.active_calls WHERE expires_at > $1"#,
        super::time(now)
    )
    .fetch_one(pool)
    .await?;
    Ok(calls)
}

/// The place of the first decision at or after this time. Reads the whole ledger.
pub(crate) async fn first_since(pool: &PgPool, since: Timestamp) -> Result<Option<LogPosition>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT coalesce(decided_epoch, log_epoch) AS "epoch!", coalesce(decided_sequence, log_sequence) AS "seq!"
           FROM lead_state.lead_updates WHERE applied_at >= $1 ORDER BY 1, 2 LIMIT 1"#,
        super::time(since)
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| LogPosition::message(row.epoch, row.seq as u64)))
}

/// Makes the partitions of the ledger for the months from `first` to `last`.
pub(crate) async fn ensure_partitions(pool: &PgPool, first: Timestamp, last: Timestamp) -> Result<(), StoreError> {
    let day = |at: Timestamp| time::OffsetDateTime::from(at).date();
    sqlx::query!("SELECT lead_state.ensure_partitions($1, $2)", day(first), day(last)).execute(pool).await?;
    Ok(())
}

/// Drops the ledger's months that ended before this time and are not needed any more; their names. Waits a moment only for
/// whoever reads the ledger meanwhile: everything else would wait behind this.
pub(crate) async fn drop_partitions(pool: &PgPool, cutoff: Timestamp) -> Result<Vec<String>, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    let dropped = sqlx::query_scalar!(r#"SELECT lead_state.drop_partitions($1) AS "dropped!""#, super::time(cutoff))
        .fetch_one(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(dropped)
}

/// Forgets calls that expired before this time, but those that still hold something.
pub(crate) async fn sweep_calls(pool: &PgPool, before: Timestamp) -> Result<u64, StoreError> {
    let swept = sqlx::query!(
        "DELETE FROM lead_state.active_calls c WHERE c.expires_at < $1
             AND NOT EXISTS (SELECT FROM lead_state.queued_updates h WHERE h.lead_id = c.lead_id)",
        super::time(before)
    )
    .execute(pool)
    .await?;
    Ok(swept.rows_affected())
}

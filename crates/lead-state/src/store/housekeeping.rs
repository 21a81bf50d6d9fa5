//! Partitions of the ledger, counts, and calls.

use contract::Timestamp;
use service_kit::postgres::{Pool, Session};

use super::{StoreError, row::time};

/// Creates the ledger's partitions for the months from `first` to `last`. Waits at most a second for readers of the
/// ledger, because every other statement on the ledger waits behind this one.
pub(crate) async fn ensure_partitions(pool: &Pool, first: Timestamp, last: Timestamp) -> Result<(), StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    sqlx::query!("SELECT lead_state.ensure_partitions($1, $2)", time(first).date(), time(last).date())
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(())
}

/// Drops the ledger's months that ended before this time and are not needed any more. Returns the dropped partitions.
/// Waits at most a second for readers of the ledger, because every other statement on the ledger waits behind this one.
pub(crate) async fn drop_partitions(pool: &Pool, cutoff: Timestamp) -> Result<Vec<String>, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    let dropped = sqlx::query_scalar!(r#"SELECT lead_state.drop_partitions($1) AS "dropped!""#, time(cutoff))
        .fetch_one(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(dropped)
}

/// Deletes counts of minutes before this time whose month of the ledger was dropped.
pub(crate) async fn delete_counts(connection: &mut Session, cutoff: Timestamp) -> Result<i64, StoreError> {
    let deleted = sqlx::query_scalar!(r#"SELECT lead_state.delete_counts($1) AS "deleted!""#, time(cutoff))
        .fetch_one(connection)
        .await?;
    Ok(deleted)
}

/// Deletes calls that expired before this time, except those of leads with queued updates.
pub(crate) async fn delete_expired_calls(connection: &mut Session, before: Timestamp) -> Result<u64, StoreError> {
    let deleted = sqlx::query!(
        "DELETE FROM lead_state.active_calls c WHERE c.expires_at < $1
             AND NOT EXISTS (SELECT FROM lead_state.queued_updates q WHERE q.lead_id = c.lead_id)",
        time(before)
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected())
}

/// The number of calls in progress.
pub(crate) async fn count_active_calls(pool: &Pool, now: Timestamp) -> Result<i64, StoreError> {
    let calls = sqlx::query_scalar!(
        r#"SELECT count(*) AS "calls!" FROM lead_state.active_calls WHERE expires_at > $1"#,
        time(now)
    )
    .fetch_one(pool)
    .await?;
    Ok(calls)
}

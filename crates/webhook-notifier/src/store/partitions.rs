//! The monthly partitions of the delivery log, the end of held deliveries in old ones, and the retention of its counts.

use contract::{ObjectId, Timestamp};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::error::StoreError;

/// The error of held deliveries that were kept as long as the delivery log.
const EXPIRED: &str = "not sent: its callback could not be called before its month of the delivery log expired";

/// Drops the months that ended before this time and have no work left. Returns their names. Waits only a moment for
/// concurrent readers: all other statements wait behind this one.
pub(crate) async fn drop_old(pool: &Pool, cutoff: Timestamp) -> Result<Vec<String>, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    let dropped =
        sqlx::query_scalar!(r#"SELECT webhooks.drop_partitions($1) AS "dropped!""#, OffsetDateTime::from(cutoff))
            .fetch_one(&mut *transaction)
            .await?;
    transaction.commit().await?;
    Ok(dropped)
}

/// Exhausts pending deliveries of these callbacks in months that ended before this time, at most `limit`, and counts
/// them. Returns how many.
pub(crate) async fn expire_held(
    pool: &Pool,
    held: &[ObjectId],
    cutoff: Timestamp,
    now: Timestamp,
    limit: i64,
) -> Result<i64, StoreError> {
    let callback_ids = held.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let expired = sqlx::query_scalar!(
        r#"
        WITH held AS MATERIALIZED (
            SELECT update_id, callback_id, kind FROM webhooks.deliveries
            WHERE status = 'pending' AND callback_id = ANY($1)
                AND update_id < webhooks.id_prefix(date_trunc('month', $2::timestamptz, 'UTC'))
            LIMIT $5 FOR UPDATE SKIP LOCKED
        ), expired AS (
            UPDATE webhooks.deliveries AS d SET
                status = 'exhausted', next_attempt_at = NULL, last_error = $4, updated_at = $3,
                exhausted_at = d.exhausted_at || $3::timestamptz
            FROM held AS h
            WHERE d.update_id = h.update_id AND d.callback_id = h.callback_id AND d.kind = h.kind
            RETURNING d.project_id, d.callback_id, d.kind, d.process_id, webhooks.id_month(d.update_id) AS id_month
        ), counted AS (
            INSERT INTO webhooks.delivery_counts AS c
                (project_id, minute, callback_id, kind, id_month, writer, process_id,
                 delivered_100ms, delivered_1s, delivered_10s, delivered_longer, failed, exhausted)
            SELECT project_id, date_trunc('minute', $3::timestamptz), callback_id, kind, id_month, pg_backend_pid(),
                   coalesce(process_id, ''), 0, 0, 0, 0, 0, count(*)
            FROM expired
            GROUP BY 1, 2, 3, 4, 5, 6, 7
            ON CONFLICT (project_id, minute, callback_id, kind, id_month, writer) DO UPDATE SET
                exhausted = c.exhausted + excluded.exhausted
        )
        SELECT count(*) AS "count!" FROM expired
        "#,
        &callback_ids as &[[u8; 12]],
        OffsetDateTime::from(cutoff),
        OffsetDateTime::from(now),
        EXPIRED,
        limit,
    )
    .fetch_one(pool)
    .await?;
    Ok(expired)
}

/// Creates the missing partitions of all months of this span. Returns how many were created. Waits only a moment for
/// concurrent readers: all other statements wait behind this one.
pub(crate) async fn ensure(pool: &Pool, since: Timestamp, until: Timestamp) -> Result<i32, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    let created = sqlx::query_scalar!(
        r#"SELECT webhooks.ensure_partitions($1, $2) AS "created!""#,
        OffsetDateTime::from(since),
        OffsetDateTime::from(until),
    )
    .fetch_one(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(created)
}

/// Deletes counts of minutes before this time whose month of the delivery log was dropped. Returns how many.
pub(crate) async fn delete_counts(pool: &Pool, cutoff: Timestamp) -> Result<i64, StoreError> {
    let deleted =
        sqlx::query_scalar!(r#"SELECT webhooks.delete_counts($1) AS "deleted!""#, OffsetDateTime::from(cutoff))
            .fetch_one(pool)
            .await?;
    Ok(deleted)
}

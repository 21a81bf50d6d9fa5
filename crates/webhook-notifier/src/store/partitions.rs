//! The monthly partitions of the delivery log, and the retention of its counts.

use contract::Timestamp;
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::error::StoreError;

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

/// Creates the missing partitions of all months of this span. Returns how many were created.
pub(crate) async fn ensure(pool: &Pool, since: Timestamp, until: Timestamp) -> Result<i32, StoreError> {
    let created = sqlx::query_scalar!(
        r#"SELECT webhooks.ensure_partitions($1, $2) AS "created!""#,
        OffsetDateTime::from(since),
        OffsetDateTime::from(until),
    )
    .fetch_one(pool)
    .await?;
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

//! 7 Deliver, 8 Retry: the monthly partitions of the delivery log.

use contract::Timestamp;
use sqlx::PgPool;
use time::OffsetDateTime;

/// Drops the months that ended before this time and in which nothing is left to do; their names. Waits a moment only for
/// whoever reads them meanwhile: everything else would wait behind this.
pub(crate) async fn drop_old(pool: &PgPool, cutoff: Timestamp) -> sqlx::Result<Vec<String>> {
    let mut transaction = pool.begin().await?;
    sqlx::query!("SET LOCAL lock_timeout = '1s'").execute(&mut *transaction).await?;
    let dropped =
        sqlx::query_scalar!(r#"SELECT webhooks.drop_partitions($1) AS "dropped!""#, OffsetDateTime::from(cutoff))
            .fetch_one(&mut *transaction)
            .await?;
    transaction.commit().await?;
    Ok(dropped)
}

/// Makes the partitions of all months of this span that are not there yet. Returns how many were made.
pub(crate) async fn ensure(pool: &PgPool, since: Timestamp, until: Timestamp) -> sqlx::Result<i32> {
    sqlx::query_scalar!(
        r#"SELECT webhooks.ensure_partitions($1, $2) AS "made!""#,
        OffsetDateTime::from(since),
        OffsetDateTime::from(until),
    )
    .fetch_one(pool)
    .await
}

//! 7 Deliver, 8 Retry: the monthly partitions of the delivery log.

use contract::Timestamp;
use sqlx::PgPool;
use time::OffsetDateTime;

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

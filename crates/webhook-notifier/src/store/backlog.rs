//! What waits, for the metrics.

use contract::Timestamp;
use service_kit::postgres::Pool;

use super::error::StoreError;

/// Most deliveries that are counted. More costs Postgres more, every few seconds, while it is busy with a backlog.
const MAX_COUNTED: i64 = 100_000;

#[derive(Debug, Clone, Copy)]
pub(crate) struct PendingDeliveries {
    /// Up to [`MAX_COUNTED`].
    pub(crate) count: i64,
    /// When the oldest of them was recorded.
    pub(crate) oldest_at: Option<Timestamp>,
}

/// The pending deliveries of all callbacks. The oldest is found by the lowest id of each project, which is not exact
/// for ids that a producer made up.
pub(crate) async fn pending(pool: &Pool) -> Result<PendingDeliveries, StoreError> {
    let row = sqlx::query!(
        r#"
        WITH RECURSIVE waiting AS (
            (SELECT project_id FROM webhooks.deliveries
             WHERE status <> 'delivered' AND status = 'pending' ORDER BY project_id LIMIT 1)
            UNION ALL
            SELECT (SELECT d.project_id FROM webhooks.deliveries d
                    WHERE d.status <> 'delivered' AND d.status = 'pending' AND d.project_id > waiting.project_id
                    ORDER BY d.project_id LIMIT 1)
            FROM waiting
            WHERE waiting.project_id IS NOT NULL
        )
        SELECT (SELECT count(*) FROM (SELECT FROM webhooks.deliveries WHERE status = 'pending' LIMIT $1) AS counted)
                   AS "count!",
               (SELECT min(oldest.created_at) FROM waiting
                CROSS JOIN LATERAL (
                    SELECT d.created_at FROM webhooks.deliveries d
                    WHERE d.status <> 'delivered' AND d.status = 'pending' AND d.project_id = waiting.project_id
                    ORDER BY d.update_id
                    LIMIT 1
                ) AS oldest) AS oldest_at
        "#,
        MAX_COUNTED
    )
    .fetch_one(pool)
    .await?;
    Ok(PendingDeliveries { count: row.count, oldest_at: row.oldest_at.map(Into::into) })
}

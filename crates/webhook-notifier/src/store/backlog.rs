//! Counts waiting deliveries for the metrics.

use contract::{ObjectId, Timestamp};
use service_kit::postgres::Pool;

use super::error::StoreError;

/// Maximum number of deliveries that are counted. A higher maximum costs Postgres more, every few seconds, while it is
/// busy with a backlog.
const MAX_COUNTED: i64 = 100_000;

#[derive(Debug, Clone, Copy)]
pub(crate) struct PendingDeliveries {
    /// Those that wait for their next attempt, up to [`MAX_COUNTED`].
    pub(crate) count: i64,
    /// When the oldest of them was recorded.
    pub(crate) oldest_at: Option<Timestamp>,
    /// Those that wait until their callback may be called, up to [`MAX_COUNTED`].
    pub(crate) held: i64,
}

/// Counts the pending deliveries of all callbacks. `held` are the callbacks that may not be called.
pub(crate) async fn pending(pool: &Pool, held: &[ObjectId]) -> Result<PendingDeliveries, StoreError> {
    let held = held.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    // Skips from callback to callback through the index, and reads at most `MAX_COUNTED` deliveries of each.
    let row = sqlx::query!(
        r#"
        WITH RECURSIVE waiting AS (
            (SELECT callback_id FROM webhooks.deliveries WHERE status = 'pending' ORDER BY callback_id LIMIT 1)
            UNION ALL
            SELECT (SELECT d.callback_id FROM webhooks.deliveries d
                    WHERE d.status = 'pending' AND d.callback_id > waiting.callback_id
                    ORDER BY d.callback_id LIMIT 1)
            FROM waiting
            WHERE waiting.callback_id IS NOT NULL
        ), callbacks AS MATERIALIZED (
            SELECT callback_id, callback_id = ANY($2) AS is_held FROM waiting WHERE callback_id IS NOT NULL
        )
        SELECT (SELECT count(*) FROM (
                    SELECT FROM callbacks AS c
                    CROSS JOIN LATERAL (SELECT FROM webhooks.deliveries AS d
                                        WHERE d.status = 'pending' AND d.callback_id = c.callback_id LIMIT $1) AS pending
                    WHERE NOT c.is_held LIMIT $1) AS counted) AS "count!",
               (SELECT count(*) FROM (
                    SELECT FROM callbacks AS c
                    CROSS JOIN LATERAL (SELECT FROM webhooks.deliveries AS d
                                        WHERE d.status = 'pending' AND d.callback_id = c.callback_id LIMIT $1) AS pending
                    WHERE c.is_held LIMIT $1) AS counted) AS "held!",
               (SELECT min(oldest.created_at) FROM callbacks AS c
                CROSS JOIN LATERAL (SELECT d.created_at FROM webhooks.deliveries AS d
                                    WHERE d.status = 'pending' AND d.callback_id = c.callback_id
                                    ORDER BY d.created_at LIMIT 1) AS oldest
                WHERE NOT c.is_held) AS oldest_at
        "#,
        MAX_COUNTED,
        &held as &[[u8; 12]],
    )
    .fetch_one(pool)
    .await?;
    Ok(PendingDeliveries { count: row.count, oldest_at: row.oldest_at.map(Into::into), held: row.held })
}

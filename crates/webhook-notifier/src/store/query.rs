//! 7 Deliver, 8 Retry: reading the delivery log.

use std::collections::{BTreeMap, HashSet};

use contract::{
    ObjectId, Timestamp,
    rpc::{Attempt, Delivery, DeliveryStatus},
};
use sqlx::PgPool;

use super::id;

/// The callbacks for which a delivery of this update is recorded.
pub(crate) async fn recorded(pool: &PgPool, update_id: ObjectId) -> sqlx::Result<HashSet<ObjectId>> {
    let rows = sqlx::query_scalar!(
        r#"SELECT callback_id AS "callback_id: [u8; 12]" FROM webhooks.deliveries WHERE update_id = $1"#,
        update_id.as_bytes(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(id).collect())
}

/// The deliveries of a project's update with their attempts, in the order of the callbacks' making.
pub(crate) async fn of_update(pool: &PgPool, project_id: ObjectId, update_id: ObjectId) -> sqlx::Result<Vec<Delivery>> {
    // One statement, so that status and attempts are of one moment.
    let rows = sqlx::query!(
        r#"
        SELECT d.callback_id AS "callback_id: [u8; 12]", d.status, d.next_attempt_at,
               a.number AS "number?", a.started_at AS "started_at?", a.duration_ms AS "duration_ms?",
               a.status_code, a.error, a.response
        FROM webhooks.deliveries AS d
        LEFT JOIN webhooks.every_attempt AS a ON a.update_id = $2 AND a.callback_id = d.callback_id
        WHERE d.update_id = $2 AND d.project_id = $1
        ORDER BY d.callback_id, a.number
        "#,
        project_id.as_bytes(),
        update_id.as_bytes(),
    )
    .fetch_all(pool)
    .await?;
    let mut deliveries = BTreeMap::new();
    for row in rows {
        let callback_id = id(row.callback_id);
        let delivery = deliveries.entry(callback_id).or_insert_with(|| Delivery {
            update_id,
            callback_id,
            status: match row.status.as_str() {
                "delivered" => DeliveryStatus::Delivered,
                "exhausted" => DeliveryStatus::Exhausted,
                // A CHECK leaves no fourth.
                _ => DeliveryStatus::Pending,
            },
            next_attempt_at: row.next_attempt_at.map(Into::into),
            attempts: Vec::new(),
        });
        if let (Some(number), Some(started_at)) = (row.number, row.started_at) {
            delivery.attempts.push(Attempt {
                number: number.unsigned_abs(),
                started_at: started_at.into(),
                duration_ms: row.duration_ms.unwrap_or_default().unsigned_abs(),
                status_code: row.status_code.and_then(|code| u16::try_from(code).ok()),
                error: row.error,
                response: row.response,
            });
        }
    }
    Ok(deliveries.into_values().collect())
}

/// Most deliveries that are counted. More costs Postgres more, every few seconds, exactly when it has much to do.
const COUNTED: i64 = 100_000;

/// What waits to be tried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    /// How many deliveries, up to [`COUNTED`].
    pub(crate) deliveries: i64,
    /// When the oldest of them came.
    pub(crate) since: Option<Timestamp>,
}

/// What waits to be tried. The oldest is that of the lowest id of each project, where a producer made ids up not quite.
pub(crate) async fn pending(pool: &PgPool) -> sqlx::Result<Waiting> {
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
                   AS "deliveries!",
               (SELECT min(oldest.created_at) FROM waiting
                CROSS JOIN LATERAL (
                    SELECT d.created_at FROM webhooks.deliveries d
                    WHERE d.status <> 'delivered' AND d.status = 'pending' AND d.project_id = waiting.project_id
                    ORDER BY d.update_id
                    LIMIT 1
                ) AS oldest) AS since
        "#,
        COUNTED
    )
    .fetch_one(pool)
    .await?;
    Ok(Waiting { deliveries: row.deliveries, since: row.since.map(Into::into) })
}

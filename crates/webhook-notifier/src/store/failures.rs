//! Groups the failed deliveries of a callback.

use contract::{
    event::ERASED,
    rpc::{
        CallbackFailures, FailureGroup, GroupFailures, MAX_FAILURE_GROUPS, MAX_FAILURES_READ, MAX_FAILURES_SEARCHED,
    },
};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{deliveries::delivery_id, error::StoreError};

/// The failed deliveries of a callback by the status and error of their last attempt, the most frequent first.
///
/// Of the pending deliveries, those due last wait for a retry, and those due first wait for the callback. The failed
/// ones are among them, so both ends are read; deliveries in between were probably never attempted.
pub(crate) async fn group(pool: &Pool, query: &GroupFailures) -> Result<CallbackFailures, StoreError> {
    let rows = sqlx::query!(
        r#"
        WITH pending AS MATERIALIZED (
            (SELECT update_id, kind, project_id, status, attempts, last_error, updated_at
             FROM webhooks.deliveries
             WHERE callback_id = $2 AND status = 'pending' AND next_attempt_at IS NOT NULL
             ORDER BY next_attempt_at LIMIT $4::bigint / 2)
            UNION
            (SELECT update_id, kind, project_id, status, attempts, last_error, updated_at
             FROM webhooks.deliveries
             WHERE callback_id = $2 AND status = 'pending' AND next_attempt_at IS NOT NULL
             ORDER BY next_attempt_at DESC LIMIT $4::bigint / 2)
        ), searched AS MATERIALIZED (
            SELECT (SELECT update_id FROM webhooks.deliveries
                    WHERE project_id = $1 AND status = 'exhausted' AND status <> 'delivered'
                    ORDER BY update_id DESC OFFSET $6 LIMIT 1) AS from_id
        ), exhausted AS MATERIALIZED (
            SELECT update_id, kind, project_id, status, attempts, last_error, updated_at
            FROM webhooks.deliveries
            WHERE project_id = $1 AND status = 'exhausted' AND status <> 'delivered' AND callback_id = $2
                AND update_id >= coalesce((SELECT from_id FROM searched), '')
            ORDER BY update_id DESC LIMIT $4
        ), failed AS (
            SELECT d.update_id, d.kind, d.status, d.attempts, d.last_error, d.updated_at, a.status_code
            FROM (SELECT * FROM pending WHERE attempts > 0 AND last_error IS NOT NULL
                  UNION ALL SELECT * FROM exhausted WHERE last_error IS DISTINCT FROM $7) AS d
            LEFT JOIN LATERAL (SELECT a.status_code FROM webhooks.attempts AS a
                               WHERE a.update_id = d.update_id AND a.callback_id = $2 AND a.kind = d.kind
                                   AND a.number = d.attempts LIMIT 1) AS a ON true
            WHERE d.project_id = $1 AND d.updated_at >= $3
        ), grouped AS (
            SELECT status_code, last_error, count(*) FILTER (WHERE status = 'pending') AS pending,
                   count(*) FILTER (WHERE status = 'exhausted') AS exhausted, max(updated_at) AS last_at,
                   (array_agg(update_id ORDER BY updated_at DESC, update_id DESC, kind))[1] AS update_id,
                   (array_agg(kind ORDER BY updated_at DESC, update_id DESC, kind))[1] AS kind,
                   (array_agg(attempts ORDER BY updated_at DESC, update_id DESC, kind))[1] AS attempts
            FROM failed GROUP BY status_code, last_error
            ORDER BY count(*) DESC, max(updated_at) DESC LIMIT $5::bigint + 1
        )
        SELECT g.status_code AS "status_code?", g.last_error AS "last_error?", g.pending AS "pending?",
               g.exhausted AS "exhausted?", g.last_at AS "last_at?", g.update_id AS "update_id?: [u8; 12]", g.kind AS "kind?",
               (SELECT a.response FROM webhooks.attempts AS a
                WHERE a.update_id = g.update_id AND a.callback_id = $2 AND a.kind = g.kind AND a.number = g.attempts) AS response,
               (s.from_id IS NULL AND (SELECT count(*) FROM pending) < $4 AND (SELECT count(*) FROM exhausted) < $4)
                   AS "is_complete!"
        FROM searched AS s LEFT JOIN grouped AS g ON true
        ORDER BY g.pending + g.exhausted DESC, g.last_at DESC
        "#,
        query.project_id.as_bytes(),
        query.callback_id.as_bytes(),
        OffsetDateTime::from(query.since),
        MAX_FAILURES_READ,
        MAX_FAILURE_GROUPS,
        MAX_FAILURES_SEARCHED,
        ERASED,
    )
    .fetch_all(pool)
    .await?;
    let is_complete = rows.first().is_none_or(|row| row.is_complete) && rows.len() as i64 <= MAX_FAILURE_GROUPS;
    let mut groups = Vec::new();
    for row in rows.into_iter().take(MAX_FAILURE_GROUPS as usize) {
        // A row without a group only says whether the search is complete.
        let (Some(update_id), Some(kind), Some(last_at)) = (row.update_id, row.kind, row.last_at) else { continue };
        groups.push(FailureGroup {
            status_code: row.status_code.and_then(|code| u16::try_from(code).ok()),
            error: row.last_error,
            pending: row.pending.unwrap_or_default(),
            exhausted: row.exhausted.unwrap_or_default(),
            last_at: last_at.into(),
            sample: delivery_id(update_id, *query.callback_id.as_bytes(), &kind)?,
            response: row.response,
        });
    }
    Ok(CallbackFailures { groups, complete: is_complete })
}

//! Reads the counts of attempts and deliveries.

use contract::rpc::{CountDeliveries, DeliveryCounts, MAX_STATISTICS_ROWS, MAX_STATISTICS_STEPS, StatisticsGroup};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::error::StoreError;

/// The counts of a project's deliveries, in order of time. None if too much would be read or returned.
pub(crate) async fn count_deliveries(
    pool: &Pool,
    query: &CountDeliveries,
) -> Result<Option<Vec<DeliveryCounts>>, StoreError> {
    let CountDeliveries { project_id, range, by, callback_id } = query;
    let rows = sqlx::query!(
        r#"
        -- First the steps, then the groups: naming the group of each row takes longer than reading it.
        SELECT at AS "at!",
               CASE $5 WHEN 'process' THEN nullif(encode(process_id, 'hex'), '')
                       WHEN 'kind' THEN kind WHEN 'callback' THEN encode(callback_id, 'hex') END AS "group",
               sum(in_100ms + in_1s + in_10s + longer)::bigint AS "delivered!", sum(in_100ms)::bigint AS "within_100ms!",
               sum(in_100ms + in_1s)::bigint AS "within_1s!", sum(in_100ms + in_1s + in_10s)::bigint AS "within_10s!",
               sum(failed)::bigint AS "failed!", sum(exhausted)::bigint AS "exhausted!",
               (sum(sum(read)) OVER ())::bigint AS "read!"
        FROM (SELECT date_bin($4, minute, 'epoch') AS at, process_id, callback_id, kind, sum(delivered_100ms) AS in_100ms,
                     sum(delivered_1s) AS in_1s, sum(delivered_10s) AS in_10s, sum(delivered_longer) AS longer,
                     sum(failed) AS failed, sum(exhausted) AS exhausted, count(*) AS read
              FROM ((SELECT * FROM webhooks.delivery_counts
                     WHERE $8::bytea IS NULL AND project_id = $1 AND minute >= $2 AND minute < $3
                     LIMIT $6::bigint + 1)
                    UNION ALL
                    -- Of one callback minute by minute: the index has the minute first, and the rows of the other callbacks
                    -- would be read, too.
                    (SELECT c.* FROM generate_series($2, $3 - interval '1 minute', interval '1 minute') AS m (minute)
                     CROSS JOIN LATERAL (SELECT * FROM webhooks.delivery_counts AS d
                                         WHERE d.project_id = $1 AND d.minute = m.minute AND d.callback_id = $8) AS c
                     WHERE $8 IS NOT NULL
                     LIMIT $6::bigint + 1)) AS counted
              GROUP BY 1, 2, 3, 4) AS steps
        GROUP BY 1, 2 ORDER BY 1, 2 NULLS FIRST LIMIT $7::bigint + 1
        "#,
        project_id.as_bytes(),
        OffsetDateTime::from(range.from),
        OffsetDateTime::from(range.to),
        range.step.length() as _,
        by.map(StatisticsGroup::as_str),
        MAX_STATISTICS_ROWS,
        MAX_STATISTICS_STEPS,
        callback_id.as_ref().map(|id| &id.as_bytes()[..]),
    )
    .fetch_all(pool)
    .await?;
    if rows.len() as i64 > MAX_STATISTICS_STEPS || rows.first().is_some_and(|row| row.read > MAX_STATISTICS_ROWS) {
        return Ok(None);
    }
    let counts = rows.into_iter().map(|row| DeliveryCounts {
        at: row.at.into(),
        group: row.group,
        delivered: row.delivered,
        within_100ms: row.within_100ms,
        within_1s: row.within_1s,
        within_10s: row.within_10s,
        failed: row.failed,
        exhausted: row.exhausted,
    });
    Ok(Some(counts.collect()))
}

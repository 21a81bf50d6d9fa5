//! Reads the counts of updates.

use contract::{
    ObjectId,
    rpc::{MAX_STATISTICS_ROWS, MAX_STATISTICS_STEPS, StatisticsGroup, StatisticsRange, UpdateCounts},
};
use service_kit::postgres::Pool;

use super::{StoreError, row::time};

/// The counts of a project's updates, in order of time. None if too much would be read or returned.
pub(crate) async fn count_updates(
    pool: &Pool,
    project_id: ObjectId,
    range: StatisticsRange,
    by: Option<StatisticsGroup>,
) -> Result<Option<Vec<UpdateCounts>>, StoreError> {
    let rows = sqlx::query!(
        r#"
        WITH counted AS MATERIALIZED (
            SELECT minute, process_id, kind, code, updates FROM lead_state.update_counts
            WHERE project_id = $1 AND minute >= $2 AND minute < $3
            LIMIT $6::bigint + 1
        )
        SELECT date_trunc($4, minute, 'UTC') AS "at!",
               CASE $5 WHEN 'process' THEN nullif(encode(process_id, 'hex'), '')
                       WHEN 'kind' THEN kind WHEN 'code' THEN nullif(code, '') END AS "group",
               coalesce(sum(updates) FILTER (WHERE code = ''), 0)::bigint AS "succeeded!",
               coalesce(sum(updates) FILTER (WHERE code <> ''), 0)::bigint AS "failed!",
               (SELECT count(*) FROM counted) AS "read!"
        FROM counted GROUP BY 1, 2 ORDER BY 1, 2 NULLS FIRST LIMIT $7::bigint + 1
        "#,
        project_id.as_bytes(),
        time(range.from),
        time(range.to),
        range.step.as_str(),
        by.map(StatisticsGroup::as_str),
        MAX_STATISTICS_ROWS,
        MAX_STATISTICS_STEPS,
    )
    .fetch_all(pool)
    .await?;
    if rows.len() as i64 > MAX_STATISTICS_STEPS || rows.first().is_some_and(|row| row.read > MAX_STATISTICS_ROWS) {
        return Ok(None);
    }
    let counts = rows.into_iter().map(|row| UpdateCounts {
        at: row.at.into(),
        group: row.group,
        succeeded: row.succeeded,
        failed: row.failed,
    });
    Ok(Some(counts.collect()))
}

//! Reads the counts of updates, and counts activities.

use contract::{
    ObjectId,
    rpc::{
        ActivityCounts, CallCounts, CountActivities, DayCount, MAX_COUNTED_ACTIVITIES, MAX_STATISTICS_ROWS,
        MAX_STATISTICS_STEPS, StatisticsGroup, StatisticsRange, UpdateCounts,
    },
};
use service_kit::postgres::Pool;

use super::{StoreError, row::time, updates::IdRange};

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

/// The counts of a project's activities. None if there are too many.
pub(crate) async fn count_activities(
    pool: &Pool,
    query: &CountActivities,
) -> Result<Option<ActivityCounts>, StoreError> {
    let range = IdRange::new(Some(query.from), Some(query.to), None);
    let rows = sqlx::query!(
        r#"
        WITH searched AS MATERIALIZED (
            SELECT update_id, lead_id, call_facts FROM lead_state.lead_updates
            WHERE project_id = $1 AND update_id >= $2 AND update_id < $3 AND call_facts IS NOT NULL
              AND ($4::bytea IS NULL OR process_id = $4)
            LIMIT $8::bigint + 1
        ), calls AS MATERIALIZED (
            SELECT call_facts, lead_id,
                   -- The first four bytes of an id are its Unix second.
                   (('x' || encode(substr(update_id, 1, 4), 'hex'))::bit(32)::bigint + $6::int * 60) / 86400 AS day
            FROM searched c
            WHERE $5::text IS NULL
               OR EXISTS (SELECT FROM lead_state.leads l WHERE l.lead_id = c.lead_id AND l.group_id = $5)
        ), counted AS (
            SELECT false AS by_lead, day, call_facts FROM calls
            UNION ALL
            SELECT true, NULL, bit_or(call_facts) FROM calls WHERE $7 GROUP BY lead_id
        )
        SELECT by_lead AS "by_lead!", to_char(date '1970-01-01' + day::int, 'YYYY-MM-DD') AS day,
               count(*) FILTER (WHERE call_facts & 1 <> 0) AS "attempts!",
               count(*) FILTER (WHERE call_facts & 2 <> 0) AS "connected!",
               count(*) FILTER (WHERE call_facts & 4 <> 0) AS "incoming!",
               count(*) FILTER (WHERE call_facts & 8 <> 0) AS "meaningfully_handled!",
               count(*) FILTER (WHERE call_facts & 16 <> 0) AS "interested!",
               (SELECT count(*) FROM searched) AS "searched!"
        FROM counted GROUP BY by_lead, day ORDER BY by_lead, day
        "#,
        query.project_id.as_bytes(),
        range.from,
        range.before,
        query.process_id.as_ref().map(|id| &id.as_bytes()[..]),
        query.group_id,
        query.offset_minutes,
        query.include_leads,
        MAX_COUNTED_ACTIVITIES,
    )
    .fetch_all(pool)
    .await?;
    if rows.first().is_some_and(|row| row.searched > MAX_COUNTED_ACTIVITIES) {
        return Ok(None);
    }
    let (mut calls, mut leads, mut interested_by_day) = (CallCounts::default(), CallCounts::default(), Vec::new());
    for row in rows {
        let totals = if row.by_lead { &mut leads } else { &mut calls };
        totals.attempts += row.attempts;
        totals.connected += row.connected;
        totals.incoming += row.incoming;
        totals.meaningfully_handled += row.meaningfully_handled;
        totals.interested += row.interested;
        if let Some(date) = row.day.filter(|_| row.interested > 0) {
            interested_by_day.push(DayCount { date, count: row.interested });
        }
    }
    Ok(Some(ActivityCounts { calls, interested_by_day, leads: query.include_leads.then_some(leads) }))
}

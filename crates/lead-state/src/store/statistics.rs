//! Reads the counts of updates, and counts activities.

use std::collections::BTreeMap;

use contract::{
    ObjectId, Timestamp,
    rpc::{
        ActivityCounts, CallCounts, CountActivities, DayCount, MAX_COUNTED_ACTIVITIES, MAX_STATISTICS_ROWS,
        MAX_STATISTICS_STEPS, StatisticsGroup, StatisticsRange, UpdateCounts,
    },
};
use service_kit::postgres::Pool;

use super::{StoreError, row::time, updates::IdRange};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// The counts of a project's updates, in order of time. None if too much would be read or returned.
pub(crate) async fn count_updates(
    pool: &Pool,
    project_id: ObjectId,
    range: StatisticsRange,
    by: Option<StatisticsGroup>,
) -> Result<Option<Vec<UpdateCounts>>, StoreError> {
    let rows = sqlx::query!(
        r#"
        -- First the steps, then the groups: naming the group of each row takes longer than reading it.
        SELECT at AS "at!",
               CASE $5 WHEN 'process' THEN nullif(encode(process_id, 'hex'), '')
                       WHEN 'kind' THEN kind WHEN 'code' THEN nullif(code, '') END AS "group",
               coalesce(sum(updates) FILTER (WHERE code = ''), 0)::bigint AS "succeeded!",
               coalesce(sum(updates) FILTER (WHERE code <> ''), 0)::bigint AS "failed!",
               (sum(sum(read)) OVER ())::bigint AS "read!"
        FROM (SELECT date_bin($4, minute, 'epoch') AS at, process_id, kind, code, sum(updates) AS updates, count(*) AS read
              FROM (SELECT minute, process_id, kind, code, updates FROM lead_state.update_counts
                    WHERE project_id = $1 AND minute >= $2 AND minute < $3
                    LIMIT $6::bigint + 1) AS counted
              GROUP BY 1, 2, 3, 4) AS steps
        GROUP BY 1, 2 ORDER BY 1, 2 NULLS FIRST LIMIT $7::bigint + 1
        "#,
        project_id.as_bytes(),
        time(range.from),
        time(range.to),
        range.step.length() as _,
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
        -- Grouped by the sum of the facts, so that each row is looked at once. Read twice: it comes from an index alone.
        WITH searched AS NOT MATERIALIZED (
            SELECT lead_id, call_facts,
                   -- The first four bytes of an id are its Unix second.
                   ((get_byte(update_id, 0)::bigint << 24) + (get_byte(update_id, 1) << 16) + (get_byte(update_id, 2) << 8)
                    + get_byte(update_id, 3) + $6::int * 60) / 86400 AS day,
                   $5::text IS NULL
                       OR EXISTS (SELECT FROM lead_state.leads l WHERE l.lead_id = u.lead_id AND l.group_id = $5) AS in_group
            FROM lead_state.lead_updates u
            WHERE project_id = $1 AND update_id >= $2 AND update_id < $3 AND call_facts IS NOT NULL
              AND ($4::bytea IS NULL OR process_id = $4)
            LIMIT $8::bigint + 1
        )
        SELECT false AS "by_lead!", day, call_facts AS "call_facts!", in_group AS "in_group!", count(*) AS "count!"
        FROM searched GROUP BY day, call_facts, in_group
        UNION ALL
        SELECT true, NULL, call_facts, true, count(*)
        FROM (SELECT bit_or(call_facts) AS call_facts FROM searched WHERE in_group AND $7 GROUP BY lead_id) AS leads
        GROUP BY call_facts
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
    let (mut calls, mut leads, mut days, mut searched) =
        (CallCounts::default(), CallCounts::default(), BTreeMap::new(), 0);
    for row in rows {
        let has = |fact: i16| if row.call_facts & fact == 0 { 0 } else { row.count };
        searched += if row.by_lead { 0 } else { row.count };
        if !row.in_group {
            continue;
        }
        let totals = if row.by_lead { &mut leads } else { &mut calls };
        totals.attempts += has(1);
        totals.connected += has(2);
        totals.incoming += has(4);
        totals.meaningfully_handled += has(8);
        totals.interested += has(16);
        if let Some(day) = row.day {
            *days.entry(day).or_insert(0) += has(16);
        }
    }
    if searched > MAX_COUNTED_ACTIVITIES {
        return Ok(None);
    }
    let interested_by_day = days.into_iter().filter(|(_, count)| *count > 0).map(|(day, count)| {
        let date = Timestamp::from_millis(day * DAY_MS).to_iso().chars().take("2026-01-12".len()).collect();
        DayCount { date, count }
    });
    let interested_by_day = interested_by_day.collect();
    Ok(Some(ActivityCounts { calls, interested_by_day, leads: query.include_leads.then_some(leads) }))
}

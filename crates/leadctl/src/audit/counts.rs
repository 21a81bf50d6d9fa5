//! The invariants of the statistics: counts equal the rows that they count.
//!
//! Only whole minutes of the scope are compared, and only months that still have their partitions. Rows in the default
//! partitions are not compared, because their months may have been dropped before.

use super::invariants::Invariant;

/// Compares counts with rows: `$counted` and `$recorded` select the project, the second part of the id, the minute, the
/// name of the count, the month of the update ids, and the number; `$partition` is the prefix of the names of
/// partitions.
macro_rules! differences {
    ($counted:literal, $recorded:literal, $partition:literal) => {
        concat!(
            "
    SELECT encode(s.project_id, 'hex') || '/' || encode(s.part_id, 'hex'),
           format('%s %s: %s counted, %s recorded', to_char(s.minute AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI\"Z\"'),
                  s.what, s.counted, s.recorded),
           count(*) OVER ()
    FROM (SELECT project_id, part_id, minute, what, id_month, sum(counted) AS counted, sum(recorded) AS recorded
          FROM (",
            $counted,
            " UNION ALL ",
            $recorded,
            ") AS both_sides (project_id, part_id, minute, what, id_month, counted, recorded)
          GROUP BY 1, 2, 3, 4, 5) AS s, audit_facts f
    WHERE s.counted <> s.recorded
      AND (f.project_id IS NULL OR s.project_id = f.project_id)
      AND (f.from_time IS NULL OR s.minute >= f.from_time)
      AND (f.to_time IS NULL OR s.minute + interval '1 minute' <= f.to_time)
      AND to_regclass('",
            $partition,
            "' || to_char(s.id_month, 'YYYY_MM')) IS NOT NULL
    ORDER BY s.minute, 1, s.what LIMIT $1"
        )
    };
}

pub(super) const COUNTS: [&Invariant; 2] = [&UPDATES_MISCOUNTED, &DELIVERIES_MISCOUNTED];

const UPDATES_MISCOUNTED: Invariant = Invariant {
    name: "updates_miscounted",
    statement: "the statistics of updates equal the ledger, per minute, project, process, kind and code",
    sql: differences!(
        "
              SELECT c.project_id, c.process_id, c.minute, c.kind || ' ' || coalesce(nullif(c.code, ''), 'succeeded'),
                     c.id_month, c.updates, 0
              FROM lead_state.update_counts c",
        "
              SELECT u.project_id, coalesce(u.process_id, ''), date_trunc('minute', u.logged_at),
                     u.kind || ' ' || coalesce(u.error_code, 'succeeded'), pg_temp.id_month(u.update_id), 0, count(*)
              FROM lead_state.lead_updates u, audit_facts f
              WHERE u.counted AND (f.project_id IS NULL OR u.project_id = f.project_id)
                AND (f.from_time IS NULL OR u.logged_at >= f.from_time)
                AND (f.to_time IS NULL OR u.logged_at < f.to_time)
              GROUP BY 1, 2, 3, 4, 5",
        "lead_state.lead_updates_"
    ),
};

const DELIVERIES_MISCOUNTED: Invariant = Invariant {
    name: "deliveries_miscounted",
    statement: "the statistics of deliveries equal the attempts and exhausted deliveries, per minute, callback and kind",
    sql: differences!(
        "
              SELECT c.project_id, c.callback_id, c.minute, c.kind || ' ' || part.what, c.id_month, part.number, 0
              FROM webhooks.delivery_counts c CROSS JOIN LATERAL (VALUES
                  ('delivered in 100 ms', c.delivered_100ms), ('delivered in 1 s', c.delivered_1s),
                  ('delivered in 10 s', c.delivered_10s), ('delivered later', c.delivered_longer),
                  ('attempts failed', c.failed), ('exhausted', c.exhausted)) AS part (what, number)",
        "
              SELECT e.project_id, e.callback_id, date_trunc('minute', e.at),
                     e.kind || ' ' || CASE WHEN e.ms IS NULL THEN 'exhausted' WHEN NOT e.accepted THEN 'attempts failed'
                                           WHEN e.ms <= 100 THEN 'delivered in 100 ms' WHEN e.ms <= 1000 THEN 'delivered in 1 s'
                                           WHEN e.ms <= 10000 THEN 'delivered in 10 s' ELSE 'delivered later' END,
                     pg_temp.id_month(e.update_id), 0, count(*)
              FROM audit_facts f, (
                  SELECT d.project_id, d.callback_id, d.kind, d.update_id, d.first_started_at, d.first_duration_ms, true
                  FROM webhooks.deliveries d WHERE d.first_counted AND d.first_started_at IS NOT NULL
                  UNION ALL
                  SELECT d.project_id, d.callback_id, d.kind, d.update_id, a.started_at, a.duration_ms, a.error IS NULL
                  FROM webhooks.attempts a JOIN webhooks.deliveries d USING (update_id, callback_id, kind) WHERE a.counted
                  UNION ALL
                  SELECT d.project_id, d.callback_id, d.kind, d.update_id, unnest(d.exhausted_at), NULL, NULL
                  FROM webhooks.deliveries d WHERE d.exhausted_at IS NOT NULL
              ) AS e (project_id, callback_id, kind, update_id, at, ms, accepted)
              WHERE (f.project_id IS NULL OR e.project_id = f.project_id)
                AND (f.from_time IS NULL OR e.at >= f.from_time) AND (f.to_time IS NULL OR e.at < f.to_time)
              GROUP BY 1, 2, 3, 4, 5",
        "webhooks.deliveries_"
    ),
};

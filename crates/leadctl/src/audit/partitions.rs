//! From when on the monthly partitions contain all rows. Older rows may have been dropped.

use anyhow::Context;
use contract::{Timestamp, command::MAX_ID_AGE};
use service_kit::postgres::Session;
use time::OffsetDateTime;

/// Keeps partitions from being dropped until the transaction ends. The locks must be taken before the snapshot: a
/// partition that is dropped after it would be in the snapshot's catalog without its rows. Housekeeping waits at most a
/// second for these locks, and tries again later.
pub(super) const LOCK: &str =
    "LOCK TABLE lead_state.lead_updates, webhooks.deliveries, webhooks.attempts IN ACCESS SHARE MODE";

/// The first of the latest months of a table without a gap between them. A month that is still needed stays while later
/// ones are dropped.
const FIRST_MONTH: &str = r"
    SELECT coalesce(max(month) FILTER (WHERE previous IS DISTINCT FROM month - interval '1 month') AT TIME ZONE 'UTC',
                    to_timestamp(0))
    FROM (SELECT month, lag(month) OVER (ORDER BY month) AS previous
          FROM (SELECT to_date(substring(c.relname FROM '\d{4}_\d{2}$'), 'YYYY_MM')::timestamp AS month
                FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                WHERE i.inhparent = $1::regclass AND c.relname ~ '_\d{4}_\d{2}$') AS partitions) AS months";

/// The time from which on a table contains the rows of all ids.
pub(super) async fn ids_complete_since(session: &mut Session, table: &str) -> anyhow::Result<Timestamp> {
    let month: Result<OffsetDateTime, _> = sqlx::query_scalar(FIRST_MONTH).bind(table).fetch_one(session).await;
    month.map(Timestamp::from).with_context(|| format!("cannot read the partitions of {table}; does its schema exist?"))
}

/// The time from which on the ledger contains all rows that were logged. The id of an update, and with it the row's
/// month, may be [`MAX_ID_AGE`] older than its log entry. That is also the shortest retention: no row that was applied
/// within it is dropped.
pub(super) fn rows_complete_since(ids_complete_since: Timestamp, now: Timestamp) -> Timestamp {
    ids_complete_since.plus(MAX_ID_AGE).min(now.minus(MAX_ID_AGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_may_be_missing_whose_old_id_is_of_a_dropped_month() {
        let since = |ids: &str, now: &str| rows_complete_since(ids.parse().unwrap(), now.parse().unwrap()).to_iso();

        assert_eq!(since("2026-01-01T00:00:00Z", "2026-11-28T00:00:00Z"), "2026-03-04T00:00:00.000Z");
        // A new installation: nothing was dropped yet.
        assert_eq!(since("2026-10-01T00:00:00Z", "2026-11-28T00:00:00Z"), "2026-09-27T00:00:00.000Z");
    }
}

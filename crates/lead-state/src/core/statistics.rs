//! 5 Apply: counts of the ledger rows that a batch writes. Pure.

use std::collections::BTreeMap;

use contract::{ObjectId, Timestamp};

use super::batch::LedgerRow;

const MINUTE_MS: i64 = 60_000;

/// What is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CountKey<'a> {
    pub(crate) project_id: ObjectId,
    /// The minute in which the log stored the commands. The ledger keeps this time, so counts can be computed again from
    /// it; and a replay of the log counts in the same minute.
    pub(crate) minute: Timestamp,
    pub(crate) process_id: Option<ObjectId>,
    /// As `OutcomeKind` names it.
    pub(crate) kind: &'static str,
    /// The error code; empty for what succeeded.
    pub(crate) code: &'a str,
    /// The month of the update ids.
    pub(crate) id_month: time::Date,
}

/// How many ledger rows there are of a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UpdateCount<'a> {
    pub(crate) key: CountKey<'a>,
    pub(crate) updates: i64,
}

/// Counts the rows of a batch. A duplicate has no row, so nothing counts it.
pub(crate) fn count_updates(rows: &[LedgerRow]) -> Vec<UpdateCount<'_>> {
    let mut counts = BTreeMap::new();
    for row in rows {
        let event = &row.event;
        let key = CountKey {
            project_id: event.project_id,
            minute: Timestamp::from_millis(row.logged_at.millis().div_euclid(MINUTE_MS) * MINUTE_MS),
            process_id: event.process_id,
            kind: event.kind.as_str(),
            code: event.error_code.as_deref().unwrap_or_default(),
            id_month: event.update_id.month(),
        };
        *counts.entry(key).or_insert(0) += 1;
    }
    counts.into_iter().map(|(key, updates)| UpdateCount { key, updates }).collect()
}

//! 5 Apply: counts of the ledger rows that a batch writes. Pure.

use std::collections::BTreeMap;

use contract::{ObjectId, Timestamp, call_result::CallDirection, event::CompletionEvent};

use super::batch::LedgerRow;

const MINUTE_MS: i64 = 60_000;
/// The state of leads that are interested.
const INTERESTED: &str = "interested";

/// Ledger rows with the same key are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CountKey<'a> {
    pub(crate) project_id: ObjectId,
    /// The minute in which the log stored the commands. The ledger keeps this time, so counts can be computed again
    /// from it; and a replay of the log counts in the same minute.
    pub(crate) minute: Timestamp,
    pub(crate) process_id: Option<ObjectId>,
    /// The name of the row's `OutcomeKind`.
    pub(crate) kind: &'static str,
    /// The error code; empty for a success.
    pub(crate) code: &'a str,
    /// The month of the update ids.
    pub(crate) id_month: time::Date,
}

/// The number of ledger rows with a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UpdateCount<'a> {
    pub(crate) key: CountKey<'a>,
    pub(crate) updates: i64,
}

/// How a call with a result is counted: the bits of `lead_updates.call_facts`. None for other events.
pub(crate) fn call_facts(event: &CompletionEvent) -> Option<i16> {
    let result = event.activity.as_ref()?;
    let is_incoming = result.direction == Some(CallDirection::Incoming);
    let is_connected = result.connected == Some(true);
    let analyzed = || Some(result.analysis.as_ref()?.members().get("disposition")?.get() != "null");
    let has_disposition = result.disposition.is_some() || analyzed() == Some(true);
    let is_handled = is_connected && (has_disposition || event.from_state != event.to_state);
    // The event has a version if the state was decided.
    let is_interested = event.version.is_some() && event.to_state.as_deref() == Some(INTERESTED);
    let facts = [!is_incoming, is_connected, is_incoming, is_handled, is_interested];
    Some(facts.into_iter().rev().fold(0, |bits, is_so| bits << 1 | i16::from(is_so)))
}

/// Counts the rows of a batch. A duplicate has no row, so it is not counted.
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

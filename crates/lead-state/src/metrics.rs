//! 3–6: what is counted of the log.

use contract::subject::DeadLetterReason;
use service_kit::metrics::{Counter, Family, Label, Registry};

use crate::fold::LedgerRow;

/// The metrics of lead-state. Those of a standby stand still.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    updates: Family<Label, Counter>,
    dead_letters: Family<Label, Counter>,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self { updates: Family::default(), dead_letters: Family::default() };
        registry.register("updates", "Updates that this instance applied, by outcome", metrics.updates.clone());
        registry.register(
            "dead_letters",
            "Messages of the log that became dead letters, by reason",
            metrics.dead_letters.clone(),
        );
        metrics
    }

    /// Counts what a transaction wrote.
    pub(crate) fn applied(&self, rows: &[LedgerRow]) {
        let succeeded = rows.iter().filter(|row| row.event.success).count();
        for (outcome, count) in [("succeeded", succeeded), ("failed", rows.len() - succeeded)] {
            self.updates.get_or_create(&[("outcome", outcome)]).inc_by(count as u64);
        }
    }

    /// Counts a dead letter.
    pub(crate) fn dead_letter(&self, reason: DeadLetterReason) {
        self.dead_letters.get_or_create(&[("reason", reason.as_str())]).inc();
    }
}

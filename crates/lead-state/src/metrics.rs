//! 3–6: what is counted of the log.

use contract::subject::DeadLetterReason;
use service_kit::metrics::{Counter, Family, Gauge, Label, Registry};

use crate::{fold::LedgerRow, recovery::HALT_REASONS};

/// The metrics of lead-state. Those of a standby stand still.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    updates: Family<Label, Counter>,
    dead_letters: Family<Label, Counter>,
    halted: Family<Label, Gauge>,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self { updates: Family::default(), dead_letters: Family::default(), halted: Family::default() };
        registry.register("updates", "Updates that this instance applied, by outcome", metrics.updates.clone());
        registry.register(
            "dead_letters",
            "Messages of the log that became dead letters, by reason",
            metrics.dead_letters.clone(),
        );
        registry.register(
            "halted",
            "1 while the log is not applied, by reason: an operator must look",
            metrics.halted.clone(),
        );
        metrics.halted(None);
        metrics
    }

    /// Shows why this leader does not go on, or that it does.
    pub(crate) fn halted(&self, reason: Option<&str>) {
        for known in HALT_REASONS {
            self.halted.get_or_create(&[("reason", known)]).set((reason == Some(known)).into());
        }
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

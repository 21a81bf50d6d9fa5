//! 3–6: what is counted of the log.

use std::time::Duration;

use contract::subject::DeadLetterReason;
use service_kit::metrics::{
    Counter, Family, Gauge, Histogram, Label, Publishing, Registry, Seconds, Unit, durations, sizes,
};

use crate::{core::batch::LedgerRow, recovery::diagnose::HALT_REASONS};

/// The metrics of lead-state. What a leader counts stands still with a standby; how far behind the log is, every instance
/// sees for itself.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    updates: Family<Label, Counter>,
    dead_letters: Family<Label, Counter>,
    halted: Family<Label, Gauge>,
    leader: Gauge,
    batches: Histogram,
    apply: Histogram,
    pub(crate) publishing: Publishing,
    pub(crate) lag: Lag,
}

/// How far behind the log everything is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lag {
    pub(crate) log_messages: Gauge,
    pub(crate) log_seconds: Seconds,
    pub(crate) announce_messages: Gauge,
    pub(crate) announce_seconds: Seconds,
    pub(crate) active_calls: Gauge,
    pub(crate) held_updates: Gauge,
    pub(crate) stream_bytes: Family<Label, Gauge>,
    pub(crate) stream_max_bytes: Family<Label, Gauge>,
    /// When the above was last seen.
    pub(crate) seen: Seconds,
}

impl Lag {
    fn new(registry: &mut Registry) -> Self {
        let lag = Self::default();
        let messages = || Unit::Other("messages".into());
        registry.register_with_unit(
            "log_lag",
            "Entries of the log that are not applied",
            messages(),
            lag.log_messages.clone(),
        );
        registry.register_with_unit(
            "log_lag",
            "Since when the oldest entry of the log waits to be applied",
            Unit::Seconds,
            lag.log_seconds.clone(),
        );
        registry.register_with_unit(
            "announce_lag",
            "Entries of the log that are applied and whose events are not announced",
            messages(),
            lag.announce_messages.clone(),
        );
        registry.register_with_unit(
            "announce_lag",
            "Since when the oldest applied update waits to be announced",
            Unit::Seconds,
            lag.announce_seconds.clone(),
        );
        registry.register("active_calls", "Calls in progress", lag.active_calls.clone());
        registry.register("held_updates", "Updates that wait for the end of a call", lag.held_updates.clone());
        registry.register_with_unit("stream", "What a stream holds, by stream", Unit::Bytes, lag.stream_bytes.clone());
        registry.register_with_unit(
            "stream_max",
            "What a stream may hold; a full one refuses",
            Unit::Bytes,
            lag.stream_max_bytes.clone(),
        );
        registry.register_with_unit(
            "lag_seen_timestamp",
            "When how far behind the log everything is was last seen",
            Unit::Seconds,
            lag.seen.clone(),
        );
        lag
    }
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            updates: Family::default(),
            dead_letters: Family::default(),
            halted: Family::default(),
            leader: Gauge::default(),
            batches: sizes(),
            apply: durations(),
            publishing: Publishing::new(registry),
            lag: Lag::new(registry),
        };
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
        registry.register("leader", "1 while this instance leads, 0 while it stands by", metrics.leader.clone());
        registry.register_with_unit(
            "batch",
            "Entries of the log that were applied in one transaction",
            Unit::Other("messages".into()),
            metrics.batches.clone(),
        );
        registry.register_with_unit(
            "apply_duration",
            "How long applying a batch took, from the decisions to the commit, attempts that failed included",
            Unit::Seconds,
            metrics.apply.clone(),
        );
        // There from the start: what appears with its first event has no rate before it.
        for outcome in ["succeeded", "failed"] {
            drop(metrics.updates.get_or_create(&[("outcome", outcome)]));
        }
        for reason in DeadLetterReason::ALL {
            drop(metrics.dead_letters.get_or_create(&[("reason", reason.as_str())]));
        }
        metrics.halted(None);
        metrics
    }

    /// Shows whether this instance leads.
    pub(crate) fn leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// Notes an attempt at a batch.
    pub(crate) fn batch(&self, messages: usize, took: Duration) {
        self.batches.observe(messages as f64);
        self.apply.observe(took.as_secs_f64());
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

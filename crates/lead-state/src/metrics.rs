//! 3–6: the metrics of lead-state.

use std::time::Duration;

use contract::subject::DeadLetterReason;
use service_kit::metrics::{
    Counter, Family, Gauge, Histogram, Label, Publishing, Registry, Seconds, Unit, durations, sizes,
};

use crate::{core::batch::LedgerRow, recovery::diagnose::HALT_REASONS};

/// Only the leader counts; every instance measures the lag.
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

#[derive(Debug, Clone, Default)]
pub(crate) struct Lag {
    pub(crate) log_messages: Gauge,
    pub(crate) log_seconds: Seconds,
    pub(crate) announce_messages: Gauge,
    pub(crate) announce_seconds: Seconds,
    pub(crate) active_calls: Gauge,
    pub(crate) queued_updates: Gauge,
    pub(crate) stream_bytes: Family<Label, Gauge>,
    pub(crate) stream_max_bytes: Family<Label, Gauge>,
    pub(crate) measured_at: Seconds,
}

impl Lag {
    fn new(registry: &mut Registry) -> Self {
        let lag = Self::default();
        let messages = || Unit::Other("messages".into());
        registry.register_with_unit("log_lag", "Log entries not applied yet", messages(), lag.log_messages.clone());
        registry.register_with_unit(
            "log_lag",
            "Age of the oldest log entry not applied yet",
            Unit::Seconds,
            lag.log_seconds.clone(),
        );
        registry.register_with_unit(
            "announce_lag",
            "Applied log entries whose events are not announced yet",
            messages(),
            lag.announce_messages.clone(),
        );
        registry.register_with_unit(
            "announce_lag",
            "Time since the oldest unannounced update was applied",
            Unit::Seconds,
            lag.announce_seconds.clone(),
        );
        registry.register("active_calls", "Calls in progress", lag.active_calls.clone());
        registry.register("queued_updates", "Updates queued until a call ends", lag.queued_updates.clone());
        registry.register_with_unit("stream", "Size of a stream", Unit::Bytes, lag.stream_bytes.clone());
        registry.register_with_unit(
            "stream_max",
            "Size limit of a stream; a full stream refuses messages",
            Unit::Bytes,
            lag.stream_max_bytes.clone(),
        );
        registry.register_with_unit(
            "lag_seen_timestamp",
            "When the lag was last measured",
            Unit::Seconds,
            lag.measured_at.clone(),
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
        registry.register("updates", "Updates applied by this instance, by outcome", metrics.updates.clone());
        registry.register(
            "dead_letters",
            "Log messages that became dead letters, by reason",
            metrics.dead_letters.clone(),
        );
        registry.register(
            "halted",
            "1 while the leader is halted and an operator must recover, by reason",
            metrics.halted.clone(),
        );
        registry.register(
            "leader",
            "1 while this instance is the leader, 0 while it is a standby",
            metrics.leader.clone(),
        );
        registry.register_with_unit(
            "batch",
            "Log entries applied in one transaction",
            Unit::Other("messages".into()),
            metrics.batches.clone(),
        );
        registry.register_with_unit(
            "apply_duration",
            "Duration of applying a batch, from planning to commit, failed attempts included",
            Unit::Seconds,
            metrics.apply.clone(),
        );
        // A series that appears with its first event has no rate before it.
        for outcome in ["succeeded", "failed"] {
            drop(metrics.updates.get_or_create(&[("outcome", outcome)]));
        }
        for reason in DeadLetterReason::ALL {
            drop(metrics.dead_letters.get_or_create(&[("reason", reason.as_str())]));
        }
        metrics.set_halted(None);
        metrics
    }

    pub(crate) fn set_leader(&self, is_leader: bool) {
        self.leader.set(is_leader.into());
    }

    pub(crate) fn observe_batch(&self, messages: usize, took: Duration) {
        self.batches.observe(messages as f64);
        self.apply.observe(took.as_secs_f64());
    }

    pub(crate) fn set_halted(&self, reason: Option<&str>) {
        for known in HALT_REASONS {
            self.halted.get_or_create(&[("reason", known)]).set((reason == Some(known)).into());
        }
    }

    pub(crate) fn count_updates(&self, rows: &[LedgerRow]) {
        let succeeded = rows.iter().filter(|row| row.event.success).count();
        for (outcome, count) in [("succeeded", succeeded), ("failed", rows.len() - succeeded)] {
            self.updates.get_or_create(&[("outcome", outcome)]).inc_by(count as u64);
        }
    }

    pub(crate) fn count_dead_letter(&self, reason: DeadLetterReason) {
        self.dead_letters.get_or_create(&[("reason", reason.as_str())]).inc();
    }
}

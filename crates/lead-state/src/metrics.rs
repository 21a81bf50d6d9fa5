//! 3–6: the metrics of lead-state.

use std::time::Duration;

use contract::{rpc::Halted, streams::IDEMPOTENCY_AGE, subject::DeadLetterReason};
use service_kit::metrics::{
    Counter, Family, Gauge, Histogram, Label, Publishing, Register, Registry, Seconds, Unit, durations, messages, sizes,
};

use crate::core::batch::LedgerRow;

/// Only the leader counts updates and batches; every instance measures the lag.
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

#[derive(Debug, Clone)]
pub(crate) struct Lag {
    pub(crate) log_messages: Gauge,
    pub(crate) log_seconds: Seconds,
    pub(crate) announce_messages: Gauge,
    pub(crate) announce_seconds: Seconds,
    pub(crate) active_calls: Gauge,
    pub(crate) queued_updates: Gauge,
    pub(crate) stream_bytes: Family<Label, Gauge>,
    pub(crate) stream_max_bytes: Family<Label, Gauge>,
    pub(crate) idempotency_lasts: Seconds,
    pub(crate) measured_at: Seconds,
}

impl Lag {
    fn new(registry: &mut Registry) -> Self {
        let r = registry;
        let lasts = Seconds::default();
        lasts.set(IDEMPOTENCY_AGE.as_secs_f64());
        let announce_messages = "Applied log entries whose events are not announced yet";
        let announce_seconds = "Time since the oldest unannounced update was applied";
        let log_seconds = "Age of the oldest log entry not applied yet";
        let stream_max = "Size limit of a stream; a full one refuses messages";
        let idempotency_lasts =
            "Time until the bucket of idempotency keys is full at the present rate; 86400 if keys expire before that";
        let measured_at = "When the lag was last measured";
        Self {
            log_messages: r.add_unit("log_lag", messages(), "Log entries not applied yet", Gauge::default()),
            log_seconds: r.add_unit("log_lag", Unit::Seconds, log_seconds, Seconds::default()),
            announce_messages: r.add_unit("announce_lag", messages(), announce_messages, Gauge::default()),
            announce_seconds: r.add_unit("announce_lag", Unit::Seconds, announce_seconds, Seconds::default()),
            active_calls: r.add("active_calls", "Calls in progress", Gauge::default()),
            queued_updates: r.add("queued_updates", "Updates queued until a call ends", Gauge::default()),
            stream_bytes: r.add_unit("stream", Unit::Bytes, "Size of a stream", Family::default()),
            stream_max_bytes: r.add_unit("stream_max", Unit::Bytes, stream_max, Family::default()),
            idempotency_lasts: r.add_unit("idempotency_lasts", Unit::Seconds, idempotency_lasts, lasts),
            measured_at: r.add_unit("lag_seen_timestamp", Unit::Seconds, measured_at, Seconds::default()),
        }
    }
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let r = registry;
        let halted = "1 while the leader is halted and an operator must recover, by reason";
        let apply = "Duration of applying a batch, from planning to commit, failed attempts included";
        let metrics = Self {
            updates: r.add("updates", "Updates applied by this instance, by outcome", Family::default()),
            dead_letters: r.add("dead_letters", "Log messages that became dead letters, by reason", Family::default()),
            halted: r.add("halted", halted, Family::default()),
            leader: r.add("leader", "1 while this instance is the leader, 0 while it is a standby", Gauge::default()),
            batches: r.add_unit("batch", messages(), "Log entries applied in one transaction", sizes()),
            apply: r.add_unit("apply_duration", Unit::Seconds, apply, durations()),
            publishing: Publishing::new(r),
            lag: Lag::new(r),
        };
        // Prometheus computes no rate before the first sample of a series, so all series exist from the start.
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
        for known in Halted::REASONS {
            self.halted.get_or_create(&[("reason", known)]).set((reason == Some(known)).into());
        }
    }

    pub(crate) fn count_updates(&self, rows: &[LedgerRow]) {
        let updates = || rows.iter().filter(|row| row.event.kind.is_update());
        let succeeded = updates().filter(|row| row.event.success).count();
        for (outcome, count) in [("succeeded", succeeded), ("failed", updates().count() - succeeded)] {
            self.updates.get_or_create(&[("outcome", outcome)]).inc_by(count as u64);
        }
    }

    pub(crate) fn count_dead_letter(&self, reason: DeadLetterReason) {
        self.dead_letters.get_or_create(&[("reason", reason.as_str())]).inc();
    }
}

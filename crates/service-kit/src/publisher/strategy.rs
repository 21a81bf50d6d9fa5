//! Chooses between batches and single messages by measuring both.
//!
//! Whether a batch is faster depends on whether the server syncs before it acknowledges, on its disk, and on replicas;
//! a client cannot see any of it. So the mode that is not in use is tried for a few messages, at growing intervals
//! while it is slower, and adopted when it is clearly faster.

use std::time::{Duration, Instant};

/// Messages per measurement. More messages make it more reliable; fewer are delayed when the mode on trial is slow.
const TRIAL: u32 = 128;
/// How many times as fast the other mode must be: less is noise. If the server syncs, batches are many times as fast.
const MIN_SPEEDUP: f64 = 1.2;
/// The first interval between trials; it doubles with each.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// The longest interval between trials: a server's settings change when it is restarted.
const MAX_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// How messages that are published together reach the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PublishMode {
    /// As one atomic batch.
    Batch,
    /// Each by itself, without waiting between them.
    Single,
}

impl PublishMode {
    fn other(self) -> Self {
        match self {
            Self::Batch => Self::Single,
            Self::Single => Self::Batch,
        }
    }
}

/// The mode in use, and the measurements.
#[derive(Debug)]
pub(crate) struct PublishStrategy {
    mode: PublishMode,
    /// Mean seconds per message in this mode, measured before the trial.
    baseline: Option<f64>,
    trial: bool,
    next_trial: Option<Instant>,
    interval: Duration,
    sum: f64,
    count: u32,
}

impl PublishStrategy {
    pub(crate) fn new(mode: PublishMode) -> Self {
        Self { mode, baseline: None, trial: false, next_trial: None, interval: MIN_INTERVAL, sum: 0.0, count: 0 }
    }

    fn mode(&self) -> PublishMode {
        if self.trial { self.mode.other() } else { self.mode }
    }

    /// The mode for the next messages, and how many may use it before the next call.
    pub(crate) fn next(&self) -> (PublishMode, usize) {
        let limit = if self.trial || self.baseline.is_none() { TRIAL as usize } else { usize::MAX };
        (self.mode(), limit)
    }

    /// Records the time per message in a mode; true if the mode changes.
    pub(crate) fn observe(&mut self, mode: PublishMode, each: Duration, messages: usize, now: Instant) -> bool {
        // These messages were in flight when the mode changed.
        if mode != self.mode() {
            return false;
        }
        let messages = u32::try_from(messages).unwrap_or(u32::MAX);
        self.sum += each.as_secs_f64() * f64::from(messages);
        self.count = self.count.saturating_add(messages);
        if self.count < TRIAL {
            return false;
        }
        let mean = self.sum / f64::from(self.count);
        (self.sum, self.count) = (0.0, 0);
        if !self.trial {
            self.baseline = Some(mean);
            self.trial = self.next_trial.is_none_or(|at| at <= now);
            return false;
        }
        self.trial = false;
        let faster = self.baseline.is_some_and(|baseline| mean * MIN_SPEEDUP < baseline);
        if faster {
            self.mode = self.mode.other();
            self.interval = MIN_INTERVAL;
        }
        self.next_trial = Some(now + self.interval);
        self.interval = MAX_INTERVAL.min(2 * self.interval);
        faster
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Simulates publishing with these times per message; returns how long each mode was used.
    fn run(strategy: &mut PublishStrategy, batch: Duration, single: Duration, lasts: Duration) -> (Duration, Duration) {
        let begin = Instant::now();
        let (mut in_batches, mut singly) = (Duration::ZERO, Duration::ZERO);
        while in_batches + singly < lasts {
            let (mode, now) = (strategy.mode(), begin + in_batches + singly);
            let (each, used) =
                if mode == PublishMode::Batch { (batch, &mut in_batches) } else { (single, &mut singly) };
            *used += each * 16;
            strategy.observe(mode, each, 16, now);
        }
        (in_batches, singly)
    }

    #[test]
    fn the_faster_mode_is_adopted_and_trials_are_bounded() {
        let (slow, fast) = (Duration::from_micros(300), Duration::from_micros(100));
        let minute = Duration::from_secs(60);
        let mut strategy = PublishStrategy::new(PublishMode::Batch);
        let (in_batches, _) = run(&mut strategy, slow, fast, minute);
        assert_eq!(strategy.mode, PublishMode::Single);
        assert!(in_batches < minute / 100, "{in_batches:?} of a minute in the slow mode");
        // The server was restarted with other settings.
        let (_, singly) = run(&mut strategy, fast, slow, 2 * MAX_INTERVAL);
        assert_eq!(strategy.mode, PublishMode::Batch);
        assert!(singly < MAX_INTERVAL + minute, "{singly:?} until it was noticed");
    }

    #[test]
    fn an_equal_mode_is_not_adopted() {
        let mut strategy = PublishStrategy::new(PublishMode::Batch);
        let same = Duration::from_micros(100);
        run(&mut strategy, same, same, Duration::from_secs(60));
        assert_eq!(strategy.mode, PublishMode::Batch);
    }

    proptest! {
        #[test]
        fn messages_of_the_other_mode_do_not_count(messages in 1..1000_usize, micros in 1..1000_u64) {
            let mut strategy = PublishStrategy::new(PublishMode::Batch);
            for _ in 0..10 {
                strategy.observe(PublishMode::Single, Duration::from_micros(micros), messages, Instant::now());
            }
            prop_assert_eq!(strategy.count, 0);
            prop_assert_eq!(strategy.mode(), PublishMode::Batch);
        }
    }
}

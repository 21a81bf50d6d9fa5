//! 1 Accept, 6 Announce: which of two ways of publishing is the quicker one, found out by trying.
//!
//! Whether a batch gains anything depends on whether the server syncs before it acks, on how long its disk takes for that,
//! and on replicas; a client is told none of it. So the way that is not in use is tried now and then for a few messages,
//! ever more seldom while it loses, and taken when it is clearly quicker.

use std::time::{Duration, Instant};

/// How many messages tell how quick a way is. More are surer, fewer suffer when the other way is slow.
const TRIAL: u32 = 128;
/// How much quicker the other way must be: less than that is noise. Where the server syncs, a batch is many times as quick.
const CLEARLY: f64 = 1.2;
/// When the other way is tried again after it lost once.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest time between trials: a server's settings change when it is restarted.
const SELDOM: Duration = Duration::from_secs(10 * 60);

/// A way of publishing messages that come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// In one atomic batch.
    Batch,
    /// Each by itself, without waiting between them.
    Apart,
}

impl Way {
    fn other(self) -> Self {
        match self {
            Self::Batch => Self::Apart,
            Self::Apart => Self::Batch,
        }
    }
}

/// Which way to go.
#[derive(Debug)]
pub(crate) struct Choice {
    way: Way,
    /// The mean of what messages took on this way, in seconds, as far as they were counted before the trial.
    known: Option<f64>,
    trial: bool,
    /// The next trial, and what was waited for it.
    next: Option<Instant>,
    pause: Duration,
    sum: f64,
    count: u32,
}

impl Choice {
    pub(crate) fn new(way: Way) -> Self {
        Self { way, known: None, trial: false, next: None, pause: AGAIN, sum: 0.0, count: 0 }
    }

    /// The way for the next message.
    fn way(&self) -> Way {
        if self.trial { self.way.other() } else { self.way }
    }

    /// The way for the next messages, and how many may go it together before it is asked again.
    pub(crate) fn next(&self) -> (Way, usize) {
        let most = if self.trial || self.known.is_none() { TRIAL as usize } else { usize::MAX };
        (self.way(), most)
    }

    /// Counts what messages took, each, on a way; true when the choice changed by that.
    pub(crate) fn took(&mut self, way: Way, each: Duration, messages: usize, now: Instant) -> bool {
        // Those that were still under way when the way changed.
        if way != self.way() {
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
            self.known = Some(mean);
            self.trial = self.next.is_none_or(|next| next <= now);
            return false;
        }
        self.trial = false;
        let better = self.known.is_some_and(|known| mean * CLEARLY < known);
        if better {
            self.way = self.way.other();
            self.pause = AGAIN;
        }
        self.next = Some(now + self.pause);
        self.pause = SELDOM.min(2 * self.pause);
        better
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Publishes for this long where each way takes so much; how long each way was used, and the way at the end.
    fn run(choice: &mut Choice, batch: Duration, apart: Duration, lasts: Duration) -> (Duration, Duration) {
        let begin = Instant::now();
        let (mut in_batches, mut by_itself) = (Duration::ZERO, Duration::ZERO);
        while in_batches + by_itself < lasts {
            let (way, now) = (choice.way(), begin + in_batches + by_itself);
            let (each, used) = if way == Way::Batch { (batch, &mut in_batches) } else { (apart, &mut by_itself) };
            *used += each * 16;
            choice.took(way, each, 16, now);
        }
        (in_batches, by_itself)
    }

    #[test]
    fn the_quicker_way_is_found_and_what_it_costs_is_bounded() {
        let (slow, quick) = (Duration::from_micros(300), Duration::from_micros(100));
        let minute = Duration::from_secs(60);
        let mut choice = Choice::new(Way::Batch);
        let (in_batches, _) = run(&mut choice, slow, quick, minute);
        assert_eq!(choice.way, Way::Apart);
        assert!(in_batches < minute / 100, "{in_batches:?} of a minute went the slow way");
        // The server was restarted with other settings.
        let (_, by_itself) = run(&mut choice, quick, slow, 2 * SELDOM);
        assert_eq!(choice.way, Way::Batch);
        assert!(by_itself < SELDOM + minute, "{by_itself:?} until it was noticed");
    }

    #[test]
    fn as_quick_is_no_reason_to_change() {
        let mut choice = Choice::new(Way::Batch);
        let same = Duration::from_micros(100);
        run(&mut choice, same, same, Duration::from_secs(60));
        assert_eq!(choice.way, Way::Batch);
    }

    proptest! {
        #[test]
        fn what_belongs_to_the_other_way_does_not_count(messages in 1..1000_usize, micros in 1..1000_u64) {
            let mut choice = Choice::new(Way::Batch);
            for _ in 0..10 {
                choice.took(Way::Apart, Duration::from_micros(micros), messages, Instant::now());
            }
            prop_assert_eq!(choice.count, 0);
            prop_assert_eq!(choice.way(), Way::Batch);
        }
    }
}

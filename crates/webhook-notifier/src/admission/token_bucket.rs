//! 7 Deliver, 8 Retry: a callback's rate limit, `maxPerSecond`: a token bucket; time is an argument.
//!
//! Permits are looked at before a claim and given back when the claim found less, and the rate may change with any
//! configuration: that is why this is no limiter off the shelf, which knows neither.

use std::time::Duration;

use tokio::time::Instant;

/// How many permits a rate saves up: a tenth of a second's, at least one. In any span, no more attempts begin than the
/// rate allows in it, and this many. More rides out pauses of the claims, fewer keeps closer to the rate.
fn burst(rate: u32) -> f64 {
    (f64::from(rate) / 10.0).max(1.0)
}

/// The permits of a callback.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    permits: f64,
    at: Instant,
}

impl Pace {
    /// With all that a rate saves up.
    pub(crate) fn new(rate: u32, now: Instant) -> Self {
        Self { permits: burst(rate), at: now }
    }

    /// How many attempts may begin now.
    pub(crate) fn available(&mut self, rate: u32, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.permits = (self.permits + elapsed * f64::from(rate)).min(burst(rate));
        self.at = self.at.max(now);
        // The sum of many small steps may be a hair below the whole.
        (self.permits + 1e-6).max(0.0) as u32
    }

    /// Uses permits up.
    pub(crate) fn take(&mut self, count: u32) {
        self.permits -= f64::from(count);
    }

    /// Brings permits back that were not used after all.
    pub(crate) fn give_back(&mut self, count: u32, rate: u32) {
        self.permits = (self.permits + f64::from(count)).min(burst(rate));
    }

    /// Whether as much is saved up as can be, whatever the rate.
    pub(crate) fn is_full(&self, now: Instant) -> bool {
        // What a rate saves up comes together within a second.
        now.saturating_duration_since(self.at) > Duration::from_secs(1)
    }

    /// When as much is saved up as can be: a claim is worth its while then.
    pub(crate) fn full_at(&self, rate: u32) -> Instant {
        self.at + Duration::from_secs_f64((burst(rate) - self.permits).max(0.0) / f64::from(rate.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_a_second_is_one_a_second() {
        let begin = Instant::now();
        let mut pace = Pace::new(1, begin);
        assert_eq!(pace.available(1, begin), 1);
        pace.take(1);
        assert_eq!(pace.available(1, begin + Duration::from_millis(999)), 0);
        assert_eq!(pace.full_at(1), begin + Duration::from_secs(1));
        assert_eq!(pace.available(1, begin + Duration::from_secs(1)), 1);
        assert_eq!(pace.available(1, begin + Duration::from_secs(60)), 1, "idle time saves nothing up");
    }

    #[test]
    fn what_was_not_used_comes_back() {
        let now = Instant::now();
        let mut pace = Pace::new(100, now);
        assert_eq!(pace.available(100, now), 10);
        pace.take(10);
        pace.give_back(4, 100);
        assert_eq!(pace.available(100, now), 4);
        pace.give_back(100, 100);
        assert_eq!(pace.available(100, now), 10);
    }

    proptest! {
        /// However greedy: in every span no more than the rate allows in it and the burst, and when asked often, as much
        /// as the rate allows.
        #[test]
        fn the_rate_holds_in_every_span(
            rate in 1_u32..=10_000,
            pauses in prop::collection::vec(0_u64..300, 1..200),
        ) {
            let begin = Instant::now();
            let mut pace = Pace::new(rate, begin);
            let mut now = begin;
            let mut taken = Vec::new();
            for pause in pauses {
                now += Duration::from_millis(pause);
                let count = pace.available(rate, now);
                pace.take(count);
                taken.push((now, count));
            }
            for from in 0..taken.len() {
                let mut sum = 0.0;
                for (at, count) in &taken[from..] {
                    sum += f64::from(*count);
                    let span = at.duration_since(taken[from].0).as_secs_f64();
                    prop_assert!(sum <= f64::from(rate) * span + burst(rate) + 1e-3);
                }
            }
        }

        #[test]
        fn whoever_comes_when_it_is_full_gets_the_whole_rate(rate in 1_u32..=10_000) {
            let begin = Instant::now();
            let mut pace = Pace::new(rate, begin);
            let (mut now, mut sum) = (begin, 0);
            while now < begin + Duration::from_secs(20) {
                let count = pace.available(rate, now);
                pace.take(count);
                sum += count;
                now = pace.full_at(rate).max(now + Duration::from_millis(1));
            }
            prop_assert!(f64::from(sum) >= f64::from(rate) * 20.0 * 0.98 - 1.0, "{sum}");
        }
    }
}

//! A callback's rate limit, `maxPerSecond`: a token bucket. Time is an argument.
//!
//! The retries consume tokens before a claim and return those that the claim did not use, and the rate changes with the
//! configuration. No published rate limiter supports both.

use std::time::Duration;

use tokio::time::Instant;

/// The size of the bucket: a tenth of a second's tokens, at least one. In any time span, at most the rate times the
/// span, plus this many, attempts start. A larger bucket bridges longer pauses between claims; a smaller one keeps
/// closer to the rate.
fn burst(rate: u32) -> f64 {
    (f64::from(rate) / 10.0).max(1.0)
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBucket {
    tokens: f64,
    updated_at: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub(crate) fn new(rate: u32, now: Instant) -> Self {
        Self { tokens: burst(rate), updated_at: now }
    }

    /// How many attempts may start now.
    pub(crate) fn available(&mut self, rate: u32, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.updated_at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * f64::from(rate)).min(burst(rate));
        self.updated_at = self.updated_at.max(now);
        // The sum of many small steps may be slightly below the whole number.
        (self.tokens + 1e-6).max(0.0) as u32
    }

    pub(crate) fn consume(&mut self, count: u32) {
        self.tokens -= f64::from(count);
    }

    /// Returns tokens that were not used.
    pub(crate) fn refund(&mut self, count: u32, rate: u32) {
        self.tokens = (self.tokens + f64::from(count)).min(burst(rate));
    }

    /// Whether the bucket is full, whatever the rate: every rate refills its burst within a second.
    pub(crate) fn is_full(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.updated_at) > Duration::from_secs(1)
    }

    /// When the bucket is full: an earlier claim would get fewer tokens.
    pub(crate) fn full_at(&self, rate: u32) -> Instant {
        self.updated_at + Duration::from_secs_f64((burst(rate) - self.tokens).max(0.0) / f64::from(rate.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_of_one_allows_one_attempt_per_second() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(1, start);
        assert_eq!(bucket.available(1, start), 1);
        bucket.consume(1);
        assert_eq!(bucket.available(1, start + Duration::from_millis(999)), 0);
        assert_eq!(bucket.full_at(1), start + Duration::from_secs(1));
        assert_eq!(bucket.available(1, start + Duration::from_secs(1)), 1);
        assert_eq!(bucket.available(1, start + Duration::from_secs(60)), 1, "idle time saves nothing up");
    }

    #[test]
    fn refunded_tokens_can_be_used_again() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(100, now);
        assert_eq!(bucket.available(100, now), 10);
        bucket.consume(10);
        bucket.refund(4, 100);
        assert_eq!(bucket.available(100, now), 4);
        bucket.refund(100, 100);
        assert_eq!(bucket.available(100, now), 10);
    }

    proptest! {
        #[test]
        fn every_span_stays_within_the_rate_and_the_burst(
            rate in 1_u32..=10_000,
            pauses in prop::collection::vec(0_u64..300, 1..200),
        ) {
            let mut now = Instant::now();
            let mut bucket = TokenBucket::new(rate, now);
            let mut taken = Vec::new();
            for pause in pauses {
                now += Duration::from_millis(pause);
                let count = bucket.available(rate, now);
                bucket.consume(count);
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
        fn taking_a_full_bucket_each_time_uses_the_whole_rate(rate in 1_u32..=10_000) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(rate, start);
            let (mut now, mut sum) = (start, 0);
            while now < start + Duration::from_secs(20) {
                let count = bucket.available(rate, now);
                bucket.consume(count);
                sum += count;
                now = bucket.full_at(rate).max(now + Duration::from_millis(1));
            }
            prop_assert!(f64::from(sum) >= f64::from(rate) * 20.0 * 0.98 - 1.0, "{sum}");
        }
    }
}

//! 1 Accept: rate limits: each API key has a token bucket for updates and one for all other requests, reported in
//! headers (draft-ietf-httpapi-ratelimit-headers-10). The producers of a project share a bucket for updates, and each
//! source of call reports has one.
//!
//! Each gateway counts separately. Only valid keys and known sources have buckets, so that other requests cannot use up
//! memory.

use std::{num::NonZeroU32, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use contract::ObjectId;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::StateInformationMiddleware,
    state::keyed::HashMapStateStore,
};

/// How long an empty bucket takes to fill. Longer allows larger bursts; shorter lets clients wait less once it is
/// empty.
const WINDOW: Duration = Duration::from_secs(5);
/// How often full buckets are removed.
pub(crate) const EVICTION_INTERVAL: Duration = Duration::from_secs(60);

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The bucket that a request takes a token from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RateClass {
    Updates,
    Other,
}

#[derive(Debug)]
pub(crate) struct RateLimits {
    updates: Option<RateLimit>,
    other: Option<RateLimit>,
}

impl RateLimits {
    /// At most this many requests per key in [`WINDOW`]; 0 is no limit.
    pub(crate) fn new(updates: u32, other: u32) -> Self {
        let limit = |name, requests| Some(RateLimit::new(name, NonZeroU32::new(requests)?, MonotonicClock));
        Self { updates: limit("updates", updates), other: limit("other", other) }
    }

    /// Takes a token from a key's bucket. None if there is no limit.
    pub(crate) fn take(&self, rate: RateClass, key_id: ObjectId) -> Option<RateLimitStatus> {
        self.limit(rate).map(|limit| limit.take(key_id))
    }

    /// Takes tokens for many updates of a key, or of a project's producers; or returns how long to wait. A bucket never
    /// has more than [`max_updates`](Self::max_updates).
    pub(crate) fn take_updates(&self, key_or_project_id: ObjectId, count: NonZeroU32) -> Option<Duration> {
        self.updates.as_ref()?.take_many(key_or_project_id, count)
    }

    /// The size of a key's bucket for updates. None if there is no limit.
    pub(crate) fn max_updates(&self) -> Option<NonZeroU32> {
        self.updates.as_ref().map(|limit| limit.requests)
    }

    /// Removes full buckets.
    pub(crate) fn evict_idle(&self) {
        for limit in [&self.updates, &self.other].into_iter().flatten() {
            limit.buckets.retain_recent();
            limit.buckets.shrink_to_fit();
        }
    }

    fn limit(&self, rate: RateClass) -> Option<&RateLimit> {
        match rate {
            RateClass::Updates => self.updates.as_ref(),
            RateClass::Other => self.other.as_ref(),
        }
    }
}

/// A bucket per key, per source, and per project for its producers.
#[derive(Debug)]
struct RateLimit<C: Clock = MonotonicClock> {
    name: &'static str,
    /// The header `RateLimit-Policy`.
    policy: HeaderValue,
    requests: NonZeroU32,
    buckets: RateLimiter<ObjectId, HashMapStateStore<ObjectId>, C, StateInformationMiddleware>,
}

impl<C: Clock> RateLimit<C> {
    fn new(name: &'static str, requests: NonZeroU32, clock: C) -> Self {
        // At 2^32 requests in 5 s the period is still more than a nanosecond.
        let period = WINDOW / requests.get();
        let quota = Quota::with_period(period).unwrap_or(Quota::per_second(requests)).allow_burst(requests);
        let policy = format!("\"{name}\";q={requests};w={}", WINDOW.as_secs());
        let policy = HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("\"requests\""));
        let buckets = RateLimiter::new(quota, HashMapStateStore::default(), clock);
        Self { name, policy, requests, buckets }
    }

    fn take_many(&self, key_id: ObjectId, count: NonZeroU32) -> Option<Duration> {
        match self.buckets.check_key_n(&key_id, count) {
            Ok(Ok(_)) => None,
            Ok(Err(not_until)) => Some(not_until.wait_time_from(self.buckets.clock().now())),
            Err(_) => Some(WINDOW),
        }
    }

    fn take(&self, key_id: ObjectId) -> RateLimitStatus {
        let remaining = match self.buckets.check_key(&key_id) {
            Ok(state) => Ok(state.remaining_burst_capacity()),
            Err(not_until) => {
                let wait = not_until.wait_time_from(self.buckets.clock().now());
                // Rounded up: a retry that is too early is refused again.
                Err((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1))
            }
        };
        RateLimitStatus { name: self.name, policy: self.policy.clone(), remaining }
    }
}

/// A key's bucket after a request.
#[derive(Debug)]
pub(crate) struct RateLimitStatus {
    name: &'static str,
    policy: HeaderValue,
    /// The remaining requests; or, if there was none, the seconds until the next one.
    remaining: Result<u32, u64>,
}

impl RateLimitStatus {
    /// The seconds to wait, for a request beyond the limit.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        self.remaining.err()
    }

    pub(crate) fn write_headers(self, headers: &mut HeaderMap) {
        let text = match self.remaining {
            Ok(remaining) => format!("\"{}\";r={remaining}", self.name),
            Err(wait) => format!("\"{}\";r=0;t={wait}", self.name),
        };
        headers.insert(RATE_LIMIT_POLICY, self.policy);
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(RATE_LIMIT, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    const CRM: ObjectId = ObjectId::from_bytes([1; 12]);
    const IMPORT: ObjectId = ObjectId::from_bytes([2; 12]);

    #[test]
    fn each_key_has_its_own_burst_and_rate() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("updates", NonZeroU32::new(10).unwrap(), clock.clone());
        let take = |key_id| limit.take(key_id).remaining;
        assert_eq!((0..10).map(|_| take(CRM)).collect::<Vec<_>>(), (0..10).rev().map(Ok).collect::<Vec<_>>());
        assert_eq!(take(CRM), Err(1));
        assert_eq!(take(IMPORT), Ok(9));
        clock.advance(Duration::from_millis(499));
        assert_eq!(take(CRM), Err(1));
        clock.advance(Duration::from_millis(1));
        assert_eq!((take(CRM), take(CRM)), (Ok(0), Err(1)));
        clock.advance(WINDOW);
        assert_eq!(take(CRM), Ok(9));
    }

    #[test]
    fn many_updates_take_as_many_tokens_or_wait() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("updates", NonZeroU32::new(10).unwrap(), clock.clone());
        let many = |count| limit.take_many(CRM, NonZeroU32::new(count).unwrap());
        assert_eq!(many(8), None);
        assert_eq!(many(4), Some(Duration::from_secs(1)));
        assert_eq!(limit.take(CRM).remaining, Ok(1));
        clock.advance(Duration::from_millis(1500));
        assert_eq!((many(4), limit.take(CRM).remaining), (None, Err(1)));
    }

    #[test]
    fn full_buckets_are_removed() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("other", NonZeroU32::new(1).unwrap(), clock.clone());
        assert_eq!((limit.take(CRM).remaining, limit.take(IMPORT).remaining), (Ok(0), Ok(0)));
        limit.buckets.retain_recent();
        assert_eq!(limit.buckets.len(), 2);
        assert_eq!(limit.take(CRM).remaining, Err(5));
        clock.advance(WINDOW * 2);
        limit.buckets.retain_recent();
        assert_eq!(limit.buckets.len(), 0);
    }

    #[test]
    fn headers_report_the_remaining_requests() {
        let limits = RateLimits::new(2, 0);
        let headers = |rate| {
            let mut headers = HeaderMap::new();
            limits.take(rate, CRM).unwrap().write_headers(&mut headers);
            format!("{:?} {:?}", headers[RATE_LIMIT_POLICY], headers[RATE_LIMIT])
        };
        let values = [RateClass::Updates; 3].map(headers).join("\n");
        insta::assert_snapshot!(values, @r#"
        "\"updates\";q=2;w=5" "\"updates\";r=1"
        "\"updates\";q=2;w=5" "\"updates\";r=0"
        "\"updates\";q=2;w=5" "\"updates\";r=0;t=3"
        "#);
        assert!(limits.take(RateClass::Other, CRM).is_none());
        limits.evict_idle();
    }

    #[test]
    fn every_limit_admits_one_burst() {
        for requests in [1, 3, 100, u32::MAX] {
            let limit = RateLimit::new("updates", NonZeroU32::new(requests).unwrap(), FakeRelativeClock::default());
            assert_eq!(limit.take(CRM).remaining, Ok(requests - 1));
        }
    }
}

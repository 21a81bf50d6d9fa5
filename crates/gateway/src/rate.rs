//! 1 Accept: how many requests a key may make: a bucket of tokens each for updates and for everything else, and the
//! headers that tell of it (draft-ietf-httpapi-ratelimit-headers-10).
//!
//! Every gateway counts for itself. Only known keys are counted, so strangers cannot make it hold more.

use std::{num::NonZeroU32, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use contract::ObjectId;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::StateInformationMiddleware,
    state::keyed::HashMapStateStore,
};

/// In what time a bucket fills. Longer lets clients send more at once, shorter has them wait less once it is empty.
const WINDOW: Duration = Duration::from_secs(5);
/// How often keys whose buckets are full again are forgotten.
pub(crate) const FORGET_INTERVAL: Duration = Duration::from_secs(60);

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Which bucket a request takes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rate {
    Updates,
    Other,
}

/// The buckets of all keys.
#[derive(Debug)]
pub(crate) struct RateLimits {
    updates: Option<RateLimit>,
    other: Option<RateLimit>,
}

impl RateLimits {
    /// At most this many requests in [`WINDOW`] under a key; 0 is no limit.
    pub(crate) fn new(updates: u32, other: u32) -> Self {
        let limit = |name, requests| Some(RateLimit::new(name, NonZeroU32::new(requests)?, MonotonicClock));
        Self { updates: limit("updates", updates), other: limit("other", other) }
    }

    /// Takes a token out of a key's bucket. Nothing where there is no limit.
    pub(crate) fn take(&self, rate: Rate, key_id: ObjectId) -> Option<Standing> {
        self.of(rate).map(|limit| limit.take(key_id))
    }

    /// Takes tokens for many updates at once, or says how long to wait before trying again. More than
    /// [`most_updates`](Self::most_updates) are never there.
    pub(crate) fn take_updates(&self, key_id: ObjectId, count: NonZeroU32) -> Option<Duration> {
        self.updates.as_ref()?.take_many(key_id, count)
    }

    /// How many updates a key may make at once; nothing where there is no limit.
    pub(crate) fn most_updates(&self) -> Option<NonZeroU32> {
        self.updates.as_ref().map(|limit| limit.requests)
    }

    /// Forgets the keys that have made no requests of late.
    pub(crate) fn forget_idle(&self) {
        for limit in [Rate::Updates, Rate::Other].into_iter().filter_map(|rate| self.of(rate)) {
            limit.buckets.retain_recent();
            limit.buckets.shrink_to_fit();
        }
    }

    fn of(&self, rate: Rate) -> Option<&RateLimit> {
        match rate {
            Rate::Updates => self.updates.as_ref(),
            Rate::Other => self.other.as_ref(),
        }
    }
}

/// One bucket a key.
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
        // At 2^32 requests in 5 s a token still takes more than a nanosecond.
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

    fn take(&self, key_id: ObjectId) -> Standing {
        let left = match self.buckets.check_key(&key_id) {
            Ok(state) => Ok(state.remaining_burst_capacity()),
            Err(not_until) => {
                let wait = not_until.wait_time_from(self.buckets.clock().now());
                // Rounded up, for a client that comes too early comes in vain.
                Err((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1))
            }
        };
        Standing { name: self.name, policy: self.policy.clone(), left }
    }
}

/// Where a key stands after a request.
#[derive(Debug)]
pub(crate) struct Standing {
    name: &'static str,
    policy: HeaderValue,
    /// How many requests it has left; or that it had none, and in how many seconds the next one is.
    left: Result<u32, u64>,
}

impl Standing {
    /// In how many seconds to come again, for a request that is one too many.
    pub(crate) fn refused_for(&self) -> Option<u64> {
        self.left.err()
    }

    /// Puts the headers on an answer.
    pub(crate) fn tell(self, headers: &mut HeaderMap) {
        let text = match self.left {
            Ok(left) => format!("\"{}\";r={left}", self.name),
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
    fn a_key_has_its_burst_then_its_rate_and_no_other_key_pays() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("updates", NonZeroU32::new(10).unwrap(), clock.clone());
        let take = |key_id| limit.take(key_id).left;
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
    fn many_at_once_take_as_many_tokens_and_wait_for_no_more() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("updates", NonZeroU32::new(10).unwrap(), clock.clone());
        let many = |count| limit.take_many(CRM, NonZeroU32::new(count).unwrap());
        assert_eq!(many(8), None);
        assert_eq!(many(4), Some(Duration::from_secs(1)));
        assert_eq!(limit.take(CRM).left, Ok(1));
        clock.advance(Duration::from_millis(1500));
        assert_eq!((many(4), limit.take(CRM).left), (None, Err(1)));
    }

    #[test]
    fn idle_keys_are_forgotten() {
        let clock = FakeRelativeClock::default();
        let limit = RateLimit::new("other", NonZeroU32::new(1).unwrap(), clock.clone());
        assert_eq!((limit.take(CRM).left, limit.take(IMPORT).left), (Ok(0), Ok(0)));
        limit.buckets.retain_recent();
        assert_eq!(limit.buckets.len(), 2);
        assert_eq!(limit.take(CRM).left, Err(5));
        clock.advance(WINDOW * 2);
        limit.buckets.retain_recent();
        assert_eq!(limit.buckets.len(), 0);
    }

    #[test]
    fn what_the_headers_say() {
        let limits = RateLimits::new(2, 0);
        let headers = |rate| {
            let mut headers = HeaderMap::new();
            limits.take(rate, CRM).unwrap().tell(&mut headers);
            format!("{:?} {:?}", headers[RATE_LIMIT_POLICY], headers[RATE_LIMIT])
        };
        let told = [Rate::Updates; 3].map(headers).join("\n");
        insta::assert_snapshot!(told, @r#"
        "\"updates\";q=2;w=5" "\"updates\";r=1"
        "\"updates\";q=2;w=5" "\"updates\";r=0"
        "\"updates\";q=2;w=5" "\"updates\";r=0;t=3"
        "#);
        assert!(limits.take(Rate::Other, CRM).is_none());
        limits.forget_idle();
    }

    #[test]
    fn any_limit_is_a_limit() {
        for requests in [1, 3, 100, u32::MAX] {
            let limit = RateLimit::new("updates", NonZeroU32::new(requests).unwrap(), FakeRelativeClock::default());
            assert_eq!(limit.take(CRM).left, Ok(requests - 1));
        }
    }
}

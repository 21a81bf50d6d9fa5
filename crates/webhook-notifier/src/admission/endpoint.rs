//! The state of one endpoint: its attempts in flight, its recent answers, its breaker and its rate limit.

use std::{sync::Arc, time::Duration};

use contract::ObjectId;
use tokio::{sync::Notify, time::Instant};

use super::{
    breaker::{Admission, Breaker},
    share::window,
    token_bucket::TokenBucket,
};

/// How long the breaker of an idle endpoint is kept after its opening ended: the callback may have been removed.
const BREAKER_RETENTION: Duration = Duration::from_secs(60 * 60);
/// We expect an endpoint to finish as many attempts in the next such span as in the last one, so its queue may be as
/// long.
const THROUGHPUT_SPAN: Duration = Duration::from_millis(100);
/// How long an answer keeps the window open. A longer span suits endpoints that take seconds; a shorter one detects
/// sooner that an endpoint hangs.
const ANSWER_SPAN: Duration = Duration::from_secs(1);

/// A callback and its configured limits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Endpoint {
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) max_in_flight: u32,
    pub(crate) max_per_second: Option<u32>,
}

/// Counts events per span: the current span and the one before.
#[derive(Debug, Default)]
struct RecentCount {
    since: Option<Instant>,
    current: usize,
    previous: usize,
}

impl RecentCount {
    fn advance(&mut self, span: Duration, now: Instant) {
        let age = self.since.map(|since| now.duration_since(since));
        if age.is_none_or(|age| age >= span) {
            self.previous = if age.is_some_and(|age| age < 2 * span) { self.current } else { 0 };
            self.current = 0;
            self.since = Some(now);
        }
    }

    fn add(&mut self, span: Duration, now: Instant) {
        self.advance(span, now);
        self.current += 1;
    }

    fn recent(&mut self, span: Duration, now: Instant) -> usize {
        self.advance(span, now);
        self.previous.max(self.current)
    }
}

#[derive(Debug, Default)]
pub(crate) struct EndpointState {
    pub(crate) in_flight: u32,
    pub(crate) units: i64,
    pub(crate) breaker: Breaker,
    /// None without a rate limit.
    pub(crate) bucket: Option<TokenBucket>,
    /// Whether more of its deliveries are due in Postgres than could start.
    pub(crate) has_due_retries: bool,
    /// When the rate limit allows more due retries to start, if it holds any up.
    pub(crate) rate_limited_until: Option<Instant>,
    /// First attempts that wait for a permit.
    pub(crate) waiting: usize,
    pub(crate) permit_freed: Arc<Notify>,
    finished: RecentCount,
    answered: RecentCount,
}

impl EndpointState {
    /// How many attempts the rate limit allows now.
    pub(crate) fn allowed_by_rate(&mut self, endpoint: &Endpoint, now: Instant) -> u32 {
        match endpoint.max_per_second {
            Some(rate) => self.bucket.get_or_insert_with(|| TokenBucket::new(rate, now)).available(rate, now),
            None => {
                self.bucket = None;
                u32::MAX
            }
        }
    }

    /// How many attempts breaker and rate limit allow now, and whether the next one is the breaker's probe.
    pub(crate) fn admitted(&mut self, endpoint: &Endpoint, now: Instant) -> (u32, bool) {
        match self.breaker.admission(now) {
            Admission::None => (0, false),
            Admission::Probe => (self.allowed_by_rate(endpoint, now).min(1), true),
            Admission::All => (self.allowed_by_rate(endpoint, now), false),
        }
    }

    pub(crate) fn window(&mut self, endpoint: &Endpoint, now: Instant) -> u32 {
        window(endpoint.max_in_flight, self.answered.recent(ANSWER_SPAN, now))
    }

    pub(crate) fn start(&mut self, count: u32, units: i64, is_probe: bool) {
        self.in_flight += count;
        self.units += units;
        if let Some(bucket) = &mut self.bucket {
            bucket.consume(count);
        }
        if is_probe {
            self.breaker = self.breaker.probing();
        }
    }

    pub(crate) fn finish(&mut self, units: i64, now: Instant) {
        self.in_flight -= 1;
        self.units -= units;
        self.finished.add(THROUGHPUT_SPAN, now);
    }

    pub(crate) fn note_answer(&mut self, now: Instant) {
        self.answered.add(ANSWER_SPAN, now);
    }

    /// Without due retries, the rate limit holds none up.
    pub(crate) fn set_due_retries(&mut self, has_due_retries: bool) {
        self.has_due_retries = has_due_retries;
        if !has_due_retries {
            self.rate_limited_until = None;
        }
    }

    /// How many attempts finished lately.
    pub(crate) fn throughput(&mut self, now: Instant) -> usize {
        self.finished.recent(THROUGHPUT_SPAN, now)
    }

    /// Whether the state equals that of an endpoint without any attempts.
    pub(crate) fn is_idle(&self, now: Instant) -> bool {
        let breaker_expired = match self.breaker {
            Breaker::Open { until, .. } => until + BREAKER_RETENTION < now,
            breaker => breaker == Breaker::default(),
        };
        self.in_flight == 0
            && self.waiting == 0
            && !self.has_due_retries
            && breaker_expired
            && self.bucket.is_none_or(|bucket| bucket.is_full(now))
    }
}

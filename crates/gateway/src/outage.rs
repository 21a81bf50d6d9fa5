//! 1 Accept: decides how long requests wait for a stream without a leader. Logs one line when the stream stops
//! accepting, and one when it accepts again.
//!
//! The servers of a replicated stream elect another leader within seconds. A request that arrives meanwhile waits for
//! the new leader. When the stream has accepted nothing for [`LEADER_PATIENCE`], it counts as down, and requests fail
//! after one attempt.

use std::{
    fmt::Display,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a request waits for a leader. Longer than an election, which takes 4 to 9 s, and than most elections that
/// are repeated after a split vote; shorter than the timeouts of most clients and proxies.
pub(crate) const LEADER_PATIENCE: Duration = Duration::from_secs(15);

/// A request that may wait for a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PendingRequest {
    pub(crate) began: Instant,
    /// The bytes that the request holds while it waits.
    pub(crate) bytes: usize,
}

/// Whether a stream accepts what is sent to it.
#[derive(Debug)]
pub(crate) struct Outage {
    /// The names of the stream and of what it accepts, for log lines.
    stream: &'static str,
    accepts: &'static str,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the first request that failed in this outage began to wait.
    since: Option<Instant>,
    /// Whether the gateway stops: requests in progress must end.
    is_closed: bool,
}

impl Outage {
    pub(crate) fn new(stream: &'static str, accepts: &'static str) -> Self {
        Self { stream, accepts, state: Mutex::default() }
    }

    /// The time until which a request that began at `began` waits.
    pub(crate) fn deadline(&self, began: Instant) -> Instant {
        let state = self.lock();
        match state.since {
            _ if state.is_closed => began,
            Some(since) => began.max(since + LEADER_PATIENCE),
            None => began + LEADER_PATIENCE,
        }
    }

    /// Records that a request that began at `began` gave up.
    pub(crate) fn failed(&self, began: Instant, error: &dyn Display) {
        let mut state = self.lock();
        if state.since.is_none() {
            state.since = Some(began);
            tracing::warn!("{} does not accept {}: {error}", self.stream, self.accepts);
        }
    }

    /// Records that a request succeeded.
    pub(crate) fn succeeded(&self) {
        if self.lock().since.take().is_some() {
            tracing::info!("{} accepts {} again", self.stream, self.accepts);
        }
    }

    /// From now on, no request begins to wait.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_wait_for_an_election_and_not_for_an_outage() {
        let outage = Outage::new("the log", "updates");
        let began = Instant::now();
        assert_eq!(outage.deadline(began), began + LEADER_PATIENCE);

        outage.failed(began, &"no leader");
        let soon = began + Duration::from_secs(4);
        assert_eq!(outage.deadline(soon), began + LEADER_PATIENCE, "as long as those before it");
        let later = began + 2 * LEADER_PATIENCE;
        assert_eq!(outage.deadline(later), later);

        outage.failed(later, &"no leader");
        assert_eq!(outage.deadline(later), later, "the outage began earlier");

        outage.succeeded();
        assert_eq!(outage.deadline(later), later + LEADER_PATIENCE);
    }

    #[test]
    fn a_gateway_that_stops_does_not_wait() {
        let outage = Outage::new("the log", "updates");
        outage.close();

        let now = Instant::now();
        assert_eq!(outage.deadline(now), now);
    }
}

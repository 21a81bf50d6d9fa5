//! The pool of attempts in flight, shared by first attempts and retries.
//!
//! No attempt waits for the slow endpoint of another: deliveries that an endpoint cannot start now are deferred to
//! Postgres, where the retries find them.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use contract::ObjectId;
use tokio::{sync::Notify, time::Instant};

use super::{
    breaker::Admission,
    endpoint::{Endpoint, EndpointState},
    share::{Share, Usage, first_attempt_window, project_shares},
};
use crate::core::outcome::EndpointHealth;

/// An attempt counts as one unit per started block of this many bytes of its body, so that the pool bounds memory too.
/// A larger unit lets large bodies take more memory, a smaller one makes them wait longer.
const BYTES_PER_UNIT: usize = 64 * 1024;
/// Maximum number of first attempts that wait for a permit, of all endpoints together. One endpoint may have as many
/// waiting as places are left for the others, or as many as it finished lately. A longer queue bridges bursts without a
/// detour through Postgres; a shorter one leaves more room for the events of other endpoints.
const MAX_WAITING: usize = 1024;

/// How many units of the pool an attempt with a body of this length takes.
fn units(bytes: usize) -> i64 {
    1 + (bytes / BYTES_PER_UNIT) as i64
}

#[derive(Debug)]
pub(crate) struct ConcurrencyLimiter {
    state: Mutex<State>,
    /// Notified when an endpoint may have a retry to start.
    retry_work: Notify,
}

#[derive(Debug)]
struct State {
    free_units: i64,
    projects: HashMap<ObjectId, i64>,
    endpoints: HashMap<ObjectId, EndpointState>,
    /// First attempts that wait for a permit.
    waiting: usize,
    /// Projects with retries that got no permit in this round because the project's share is in use.
    short_projects: HashSet<ObjectId>,
}

impl State {
    /// The state of an endpoint, and what the pool and its project have in use.
    fn endpoint(&mut self, endpoint: &Endpoint) -> (&mut EndpointState, PoolUsage) {
        let project_units = self.projects.get(&endpoint.project_id).copied().unwrap_or_default();
        let usage = PoolUsage { free_units: self.free_units, project_units };
        (self.endpoints.entry(endpoint.callback_id).or_default(), usage)
    }

    /// Counts units against the pool and the project; those of the endpoint are in its [`EndpointState`].
    fn hold(&mut self, project_id: ObjectId, units: i64) {
        self.free_units -= units;
        let project = self.projects.entry(project_id).or_default();
        *project += units;
        if *project == 0 {
            self.projects.remove(&project_id);
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct PoolUsage {
    free_units: i64,
    project_units: i64,
}

impl PoolUsage {
    fn share(self, endpoint: &EndpointState, window: u32) -> Share {
        let Self { free_units, project_units } = self;
        let (endpoint_units, in_flight) = (endpoint.units, endpoint.in_flight);
        Share::of(&Usage { free_units, project_units, endpoint_units, window, in_flight })
    }
}

enum AcquireResult {
    Acquired(AttemptPermit),
    /// Breaker, rate limit or share allow no attempt now.
    Denied,
    /// One of the endpoint's own attempts has to finish first.
    Wait,
}

/// A first attempt that waits for a permit.
struct WaitingAttempt {
    limiter: Arc<ConcurrencyLimiter>,
    callback_id: ObjectId,
    permit_freed: Arc<Notify>,
}

impl Drop for WaitingAttempt {
    fn drop(&mut self) {
        let mut state = self.limiter.lock();
        state.waiting -= 1;
        if let Some(endpoint) = state.endpoints.get_mut(&self.callback_id) {
            endpoint.waiting -= 1;
        }
    }
}

/// The limit that a callback has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReachedLimit {
    #[error("maxPerSecond of the callback, {0}, is reached: try again in a second")]
    Rate(u32),
    #[error("maxInFlight of the callback, {0}, is reached: try again when an attempt has ended")]
    InFlight(u32),
    #[error("the attempts of the project use up its share of webhook-notifier: try again when some have ended")]
    Share,
}

/// The permits and bytes that an endpoint's retries may use.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// One per delivery.
    pub(crate) permits: Vec<AttemptPermit>,
    /// Maximum size of all bodies together: the endpoint's share, which includes the units of the permits.
    pub(crate) max_bytes: usize,
}

impl ConcurrencyLimiter {
    pub(crate) fn new(pool_size: u32) -> Arc<Self> {
        let state = State {
            free_units: pool_size.into(),
            projects: HashMap::new(),
            endpoints: HashMap::new(),
            waiting: 0,
            short_projects: HashSet::new(),
        };
        Arc::new(Self { state: Mutex::new(state), retry_work: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits up to `max_wait` for a permit for a first attempt. Returns `None` if the endpoint's window or share stays
    /// used up that long, and at once if its breaker is open, its rate limit reached or its queue full. The delivery is
    /// then deferred to the retries.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        bytes: usize,
        max_wait: Duration,
    ) -> Option<AttemptPermit> {
        let units = units(bytes);
        let waiting = {
            let mut state = self.lock();
            match self.try_acquire(&mut state, endpoint, units) {
                AcquireResult::Acquired(permit) => return Some(permit),
                AcquireResult::Denied => return None,
                AcquireResult::Wait => {}
            }
            let left = MAX_WAITING.saturating_sub(state.waiting);
            let (endpoint_state, _) = state.endpoint(endpoint);
            if endpoint_state.waiting >= left.max(endpoint_state.throughput(Instant::now())) {
                return None;
            }
            endpoint_state.waiting += 1;
            let permit_freed = endpoint_state.permit_freed.clone();
            state.waiting += 1;
            WaitingAttempt { limiter: self.clone(), callback_id: endpoint.callback_id, permit_freed }
        };
        let wait = async {
            loop {
                waiting.permit_freed.notified().await;
                match self.try_acquire(&mut self.lock(), endpoint, units) {
                    AcquireResult::Acquired(permit) => return Some(permit),
                    AcquireResult::Denied => return None,
                    AcquireResult::Wait => {}
                }
            }
        };
        tokio::time::timeout(max_wait, wait).await.ok().flatten()
    }

    fn try_acquire(self: &Arc<Self>, state: &mut State, endpoint: &Endpoint, units: i64) -> AcquireResult {
        let now = Instant::now();
        let (endpoint_state, pool) = state.endpoint(endpoint);
        let (admitted, is_probe) = endpoint_state.admitted(endpoint, now);
        if admitted == 0 {
            return AcquireResult::Denied;
        }
        let window = first_attempt_window(endpoint_state.window(endpoint, now), endpoint_state.has_due_retries);
        if !pool.share(endpoint_state, window).fits(units) {
            // Only the endpoint's own attempts wake its waiting attempts.
            return if endpoint_state.in_flight > 0 { AcquireResult::Wait } else { AcquireResult::Denied };
        }
        endpoint_state.start(1, units, is_probe);
        // Answers open the window, so one finished attempt may make room for more than the attempt that it wakes.
        if endpoint_state.waiting > 0 && endpoint_state.in_flight < window {
            endpoint_state.permit_freed.notify_one();
        }
        state.hold(endpoint.project_id, units);
        AcquireResult::Acquired(self.permit(endpoint, units, is_probe))
    }

    /// Acquires a permit for a test request, without waiting. Limits and share apply. The breaker does not, because the
    /// test may check whether the endpoint is back; and the result does not change the breaker.
    pub(crate) fn acquire_for_test(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        bytes: usize,
    ) -> Result<AttemptPermit, ReachedLimit> {
        let units = units(bytes);
        let mut state = self.lock();
        let (endpoint_state, pool) = state.endpoint(endpoint);
        if endpoint_state.allowed_by_rate(endpoint, Instant::now()) == 0 {
            return Err(ReachedLimit::Rate(endpoint.max_per_second.unwrap_or_default()));
        }
        if endpoint_state.in_flight >= endpoint.max_in_flight {
            return Err(ReachedLimit::InFlight(endpoint.max_in_flight));
        }
        if !pool.share(endpoint_state, endpoint.max_in_flight).fits(units) {
            return Err(ReachedLimit::Share);
        }
        endpoint_state.start(1, units, false);
        state.hold(endpoint.project_id, units);
        Ok(self.permit(endpoint, units, false))
    }

    /// Permits for retries, at most `max_permits`. See [`Self::project_bytes`] for their bodies.
    pub(crate) fn reserve(self: &Arc<Self>, endpoint: &Endpoint, max_permits: u32) -> Reservation {
        self.reserve_within(endpoint, max_permits, |state, now| state.window(endpoint, now))
    }

    /// Permits for deliveries that are only recorded. No request is sent, so no answers open the window.
    pub(crate) fn reserve_for_records(self: &Arc<Self>, endpoint: &Endpoint, max_permits: u32) -> Reservation {
        self.reserve_within(endpoint, max_permits, |_, _| endpoint.max_in_flight)
    }

    fn reserve_within(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        max_permits: u32,
        window: impl FnOnce(&mut EndpointState, Instant) -> u32,
    ) -> Reservation {
        let now = Instant::now();
        let mut state = self.lock();
        let (endpoint_state, pool) = state.endpoint(endpoint);
        let (admitted, is_probe) = endpoint_state.admitted(endpoint, now);
        let window = window(endpoint_state, now);
        let share = pool.share(endpoint_state, window);
        let fitting = share.attempts.min(u32::try_from(share.units).unwrap_or(u32::MAX)).min(max_permits);
        let count = admitted.min(fitting);
        let units = i64::from(count);
        endpoint_state.start(count, units, is_probe && count > 0);
        // If the rate limit holds retries up, the next round is worthwhile once its bucket is full. Open breakers are
        // left to the poll.
        let rate_limited = admitted < fitting && endpoint_state.breaker.admission(now) != Admission::None;
        let bucket = endpoint_state.bucket.filter(|_| rate_limited);
        endpoint_state.rate_limited_until =
            bucket.zip(endpoint.max_per_second).map(|(bucket, rate)| bucket.full_at(rate));
        state.hold(endpoint.project_id, units);
        if count == 0 && admitted > 0 && share.attempts > 0 {
            state.short_projects.insert(endpoint.project_id);
        }
        Reservation {
            permits: (0..count).map(|_| self.permit(endpoint, 1, is_probe)).collect(),
            max_bytes: usize::try_from(share.units).unwrap_or_default() * BYTES_PER_UNIT,
        }
    }

    /// Maximum size of the bodies of each project's retries, given the permits reserved for it: the units of these
    /// permits, and a share of the free units. The bytes of all projects together fit into the pool.
    pub(crate) fn project_bytes(&self, projects: &[(ObjectId, usize)]) -> Vec<usize> {
        let state = self.lock();
        let in_use = projects.iter().map(|(project_id, _)| state.projects.get(project_id).copied().unwrap_or_default());
        let shares = project_shares(state.free_units, in_use);
        let units = |(_, permits): &(ObjectId, usize), share: i64| permits + usize::try_from(share).unwrap_or_default();
        projects.iter().zip(shares).map(|(project, share)| units(project, share) * BYTES_PER_UNIT).collect()
    }

    fn permit(self: &Arc<Self>, endpoint: &Endpoint, units: i64, is_probe: bool) -> AttemptPermit {
        AttemptPermit { limiter: self.clone(), endpoint: *endpoint, units, is_probe, started: false }
    }

    /// Sets whether more of the endpoint's deliveries are due in Postgres than could start.
    pub(crate) fn set_due_retries(&self, callback_id: ObjectId, has_due_retries: bool) {
        self.lock().endpoints.entry(callback_id).or_default().set_due_retries(has_due_retries);
    }

    /// Begins a round: resets [`Self::set_due_retries`] for all callbacks without due deliveries. Nothing else resets
    /// it once the last delivery of a callback is claimed.
    ///
    /// A delivery that was deferred while `due` was read may be missing there: the next poll finds it.
    pub(crate) fn begin_round(&self, due: &HashSet<ObjectId>) {
        let mut state = self.lock();
        state.short_projects.clear();
        for (callback_id, endpoint) in &mut state.endpoints {
            if !due.contains(callback_id) {
                endpoint.set_due_retries(false);
            }
        }
    }

    /// Notes that a delivery was deferred to Postgres, due now.
    pub(crate) fn note_deferred(&self, endpoint: &Endpoint) {
        let now = Instant::now();
        let mut state = self.lock();
        let (endpoint_state, pool) = state.endpoint(endpoint);
        let (admitted, _) = endpoint_state.admitted(endpoint, now);
        let window = endpoint_state.window(endpoint, now);
        if admitted > 0 && pool.share(endpoint_state, window).fits(1) {
            self.retry_work.notify_one();
        } else {
            endpoint_state.has_due_retries = true;
        }
    }

    /// Wakes the retries: a delivery that may start has become due.
    pub(crate) fn wake_retries(&self) {
        self.retry_work.notify_one();
    }

    pub(crate) fn reset_breaker(&self, callback_id: ObjectId) {
        if let Some(endpoint) = self.lock().endpoints.get_mut(&callback_id)
            && std::mem::take(&mut endpoint.breaker).is_open()
        {
            self.retry_work.notify_one();
        }
    }

    /// Waits until an endpoint may have a retry to start.
    pub(crate) async fn retry_work(&self) {
        let rate_limited_until =
            self.lock().endpoints.values().filter_map(|endpoint| endpoint.rate_limited_until).min();
        let rate_allows = async {
            match rate_limited_until {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.retry_work.notified() => {}
            () = rate_allows => {}
        }
    }

    /// Removes the state of idle endpoints.
    pub(crate) fn evict_idle(&self) {
        let now = Instant::now();
        self.lock().endpoints.retain(|_, endpoint| !endpoint.is_idle(now));
    }

    pub(crate) fn open_breakers(&self) -> usize {
        self.lock().endpoints.values().filter(|endpoint| endpoint.breaker.is_open()).count()
    }

    fn release(&self, permit: &AttemptPermit) {
        let now = Instant::now();
        let mut state = self.lock();
        state.hold(permit.endpoint.project_id, -permit.units);
        // An unused permit frees nothing that the next round would not find anyway.
        if permit.started && state.short_projects.remove(&permit.endpoint.project_id) {
            self.retry_work.notify_one();
        }
        let Some(endpoint) = state.endpoints.get_mut(&permit.endpoint.callback_id) else { return };
        endpoint.finish(permit.units, now);
        if permit.is_probe {
            endpoint.breaker = endpoint.breaker.probe_abandoned(now);
        }
        if let (false, Some(bucket), Some(rate)) =
            (permit.started, &mut endpoint.bucket, permit.endpoint.max_per_second)
        {
            bucket.refund(1, rate);
        }
        endpoint.permit_freed.notify_one();
        // A rate limit wakes the retries at its own time.
        if endpoint.has_due_retries && !endpoint.breaker.is_open() && endpoint.rate_limited_until.is_none() {
            self.retry_work.notify_one();
        }
    }
}

/// The right to make one attempt; returned to the pool when dropped.
#[derive(Debug)]
pub(crate) struct AttemptPermit {
    limiter: Arc<ConcurrencyLimiter>,
    endpoint: Endpoint,
    units: i64,
    /// This attempt is the probe of a half-open breaker, and its result is not known yet.
    is_probe: bool,
    /// A request was sent.
    started: bool,
}

impl AttemptPermit {
    /// Corrects the size of the body: a reservation counts one unit per delivery before the bodies are read.
    pub(crate) fn set_body_size(&mut self, bytes: usize) {
        let more = units(bytes) - self.units;
        self.units += more;
        let mut state = self.limiter.lock();
        state.hold(self.endpoint.project_id, more);
        if let Some(endpoint) = state.endpoints.get_mut(&self.endpoint.callback_id) {
            endpoint.units += more;
        }
    }

    /// Notes that the request is sent now.
    pub(crate) fn start(&mut self) {
        self.started = true;
    }

    /// Notes what the attempt says about the endpoint; `random` is from 0 to 1.
    pub(crate) fn finish(&mut self, health: EndpointHealth, random: f64) {
        let now = Instant::now();
        let callback_id = self.endpoint.callback_id;
        let mut state = self.limiter.lock();
        let endpoint = state.endpoints.entry(callback_id).or_default();
        let before = endpoint.breaker;
        endpoint.breaker = before.after(health, std::mem::take(&mut self.is_probe), now, random);
        if health == EndpointHealth::Responding {
            endpoint.note_answer(now);
        }
        match (before.is_open(), endpoint.breaker.is_open()) {
            (false, true) => tracing::info!(%callback_id, "circuit breaker opened: the endpoint fails"),
            (true, false) => {
                tracing::info!(%callback_id, "circuit breaker closed: the endpoint responds");
                self.limiter.retry_work.notify_one();
            }
            _ => {}
        }
    }
}

impl Drop for AttemptPermit {
    fn drop(&mut self) {
        self.limiter.release(self);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::admission::breaker::THRESHOLD;

    const SHORT: Duration = Duration::from_millis(20);

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_bytes([byte; 12])
    }

    /// Callback `callback` of project 1.
    fn endpoint(callback: u8, max_in_flight: u32) -> Endpoint {
        Endpoint { callback_id: id(callback), project_id: id(1), max_in_flight, max_per_second: None }
    }

    fn of_project(project: u8, endpoint: Endpoint) -> Endpoint {
        Endpoint { project_id: id(project), ..endpoint }
    }

    async fn acquire(limiter: &Arc<ConcurrencyLimiter>, endpoint: Endpoint) -> Option<AttemptPermit> {
        limiter.acquire(&endpoint, 300, Duration::ZERO).await
    }

    async fn acquire_all(limiter: &Arc<ConcurrencyLimiter>, endpoint: Endpoint) -> Vec<AttemptPermit> {
        let mut held = Vec::new();
        while let Some(permit) = acquire(limiter, endpoint).await {
            held.push(permit);
        }
        held
    }

    /// Completes enough attempts for the window to reach its maximum.
    async fn open_window(limiter: &Arc<ConcurrencyLimiter>, endpoint: Endpoint) {
        for _ in 0..endpoint.max_in_flight {
            acquire(limiter, endpoint).await.unwrap().finish(EndpointHealth::Responding, 0.0);
        }
    }

    async fn fail(limiter: &Arc<ConcurrencyLimiter>, callback: u8, times: u32) {
        for _ in 0..times {
            acquire(limiter, endpoint(callback, 64)).await.unwrap().finish(EndpointHealth::Failing, 0.0);
        }
    }

    #[tokio::test]
    async fn a_callback_stays_within_max_in_flight() {
        let limiter = ConcurrencyLimiter::new(100);
        let first = acquire(&limiter, endpoint(1, 2)).await.unwrap();
        let _second = acquire(&limiter, endpoint(1, 2)).await.unwrap();
        assert!(acquire(&limiter, endpoint(1, 2)).await.is_none());
        assert!(acquire(&limiter, endpoint(2, 2)).await.is_some());
        drop(first);
        assert!(acquire(&limiter, endpoint(1, 2)).await.is_some());
    }

    #[tokio::test]
    async fn a_waiting_attempt_gets_the_next_free_permit() {
        let limiter = ConcurrencyLimiter::new(100);
        let one = endpoint(1, 1);
        let held = acquire(&limiter, one).await.unwrap();
        let (taken, ()) = tokio::join!(limiter.acquire(&one, 0, Duration::from_secs(5)), async {
            tokio::time::sleep(SHORT).await;
            drop(held);
        });
        assert!(taken.is_some());
        assert!(limiter.acquire(&one, 0, SHORT).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_callback_has_a_short_queue_and_a_fast_one_a_long_one() {
        let limiter = ConcurrencyLimiter::new(100);
        let one = endpoint(1, 1);
        let held = acquire(&limiter, one).await.unwrap();
        let wait = || {
            let limiter = limiter.clone();
            tokio::spawn(async move { limiter.acquire(&one, 0, Duration::from_secs(5)).await.is_some() })
        };
        // A queue of half the places, all of which finish at once.
        let mut waiters = (0..MAX_WAITING).map(|_| wait()).collect::<Vec<_>>();
        tokio::time::sleep(SHORT).await;
        assert_eq!(limiter.lock().waiting, MAX_WAITING / 2, "half is left for others");
        assert!(limiter.acquire(&endpoint(2, 1), 0, SHORT).await.is_some());
        drop(held);
        let mut taken = 0;
        for waiter in waiters.drain(..) {
            taken += usize::from(waiter.await.unwrap());
        }
        assert_eq!((taken, limiter.lock().waiting), (MAX_WAITING / 2, 0));

        // So many attempts finished lately that as many may wait, although no place is left.
        let held = acquire(&limiter, one).await.unwrap();
        limiter.lock().waiting = MAX_WAITING;
        let waiters = (0..MAX_WAITING).map(|_| wait()).collect::<Vec<_>>();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(
            (MAX_WAITING / 2..MAX_WAITING).contains(&(limiter.lock().waiting - MAX_WAITING)),
            "{}",
            limiter.lock().waiting
        );
        drop(held);
        for waiter in waiters {
            waiter.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_grows_with_answers_and_shrinks_without() {
        let limiter = ConcurrencyLimiter::new(512);
        let one = endpoint(1, 64);
        let mut held = acquire_all(&limiter, one).await;
        assert_eq!(held.len(), 4);
        // One answer makes room for more attempts than the one that finished.
        let wait = || {
            let limiter = limiter.clone();
            tokio::spawn(async move { limiter.acquire(&one, 0, Duration::from_secs(5)).await })
        };
        let waiters: Vec<_> = (0..3).map(|_| wait()).collect();
        tokio::time::sleep(SHORT).await;
        held.pop().unwrap().finish(EndpointHealth::Responding, 0.0);
        for waiter in waiters {
            held.push(waiter.await.unwrap().expect("a permit"));
        }
        assert_eq!((held.len(), acquire(&limiter, one).await.is_none()), (6, true));
        drop(held);
        open_window(&limiter, one).await;
        assert_eq!(acquire_all(&limiter, one).await.len(), 64);
        tokio::time::sleep(2 * Duration::from_secs(1)).await;
        assert_eq!(limiter.reserve(&one, 64).permits.len(), 4);
    }

    #[tokio::test]
    async fn endpoints_that_never_answer_take_little_of_their_projects_share() {
        let limiter = ConcurrencyLimiter::new(512);
        let mut held = Vec::new();
        for callback in 1..=50 {
            held.extend(acquire_all(&limiter, endpoint(callback, 1000)).await);
        }
        assert_eq!(held.len(), 200);
        assert_eq!(acquire_all(&limiter, endpoint(51, 1000)).await.len(), 4);
    }

    #[tokio::test]
    async fn endpoints_that_hang_leave_room_for_others() {
        let limiter = ConcurrencyLimiter::new(512);
        open_window(&limiter, endpoint(1, 1000)).await;
        let one = acquire_all(&limiter, endpoint(1, 1000)).await;
        assert_eq!(one.len(), 128, "a callback gets half of its project's share");
        let mut project = one;
        for callback in 2..=100 {
            project.extend(acquire_all(&limiter, endpoint(callback, 1000)).await);
        }
        assert_eq!(project.len(), 256, "a project gets half of the pool");
        let mut others = Vec::new();
        for number in 2..=6 {
            others.extend(acquire_all(&limiter, of_project(number, endpoint(number + 100, 1000))).await);
        }
        assert!(acquire(&limiter, of_project(100, endpoint(200, 1000))).await.is_some());
        assert!(!limiter.reserve(&of_project(101, endpoint(201, 64)), 64).permits.is_empty());
    }

    #[tokio::test]
    async fn deliveries_that_are_only_recorded_need_no_window() {
        let limiter = ConcurrencyLimiter::new(1000);
        let one = endpoint(1, 100);

        let recorded = limiter.reserve_for_records(&one, 100);

        assert_eq!(recorded.permits.len(), 100);
        assert_eq!(limiter.reserve(&endpoint(2, 100), 100).permits.len(), 4);
    }

    #[tokio::test]
    async fn large_bodies_take_more_units_and_all_are_returned() {
        let limiter = ConcurrencyLimiter::new(100);
        let large = limiter.acquire(&endpoint(1, 64), 20 * BYTES_PER_UNIT, Duration::ZERO).await.unwrap();
        assert_eq!(limiter.lock().free_units, 79);
        assert!(limiter.acquire(&endpoint(1, 64), 20 * BYTES_PER_UNIT, Duration::ZERO).await.is_none());
        open_window(&limiter, endpoint(2, 64)).await;
        let mut reserved = limiter.reserve(&endpoint(2, 64), 10);
        assert_eq!((reserved.permits.len(), reserved.max_bytes), (10, 15 * BYTES_PER_UNIT));
        reserved.permits[0].set_body_size(3 * BYTES_PER_UNIT);
        assert_eq!(limiter.lock().free_units, 66);
        drop((large, reserved));
        assert_eq!(limiter.lock().free_units, 100);
        limiter.evict_idle();
        assert!(limiter.lock().endpoints.is_empty() && limiter.lock().projects.is_empty());
    }

    #[tokio::test]
    async fn bodies_of_one_round_fit_into_the_pool_however_many_callbacks_have_retries() {
        let limiter = ConcurrencyLimiter::new(512);
        let reserve = |project: u8| {
            let all =
                (0..100).map(|callback| limiter.reserve(&of_project(project, endpoint(callback + project, 64)), 100));
            all.flat_map(|reservation| reservation.permits).collect::<Vec<_>>()
        };
        let one = reserve(1);
        assert_eq!(one.len(), 256, "a permit each for more small bodies than the project may have large ones");
        assert_eq!(limiter.project_bytes(&[(id(1), one.len())]), [256 * BYTES_PER_UNIT], "its half of the pool");

        let other = reserve(101);
        let both = limiter.project_bytes(&[(id(101), other.len()), (id(1), one.len())]);
        assert!(
            both[0] >= other.len() * BYTES_PER_UNIT && both[1] == 256 * BYTES_PER_UNIT,
            "every permit has room for a body"
        );
        assert!(both.iter().sum::<usize>() <= 512 * BYTES_PER_UNIT);
        drop((one, other));
        let few = limiter.reserve(&endpoint(1, 64), 100);
        assert_eq!(limiter.project_bytes(&[(id(1), few.permits.len())]), [256 * BYTES_PER_UNIT]);
    }

    #[tokio::test]
    async fn the_end_of_an_attempt_wakes_retries_that_the_projects_share_held_up() {
        let limiter = ConcurrencyLimiter::new(4);
        let mut held = limiter.reserve(&endpoint(1, 64), 100).permits;
        held[0].set_body_size(4 * BYTES_PER_UNIT);
        assert!(limiter.reserve(&endpoint(2, 64), 100).permits.is_empty());
        assert!(limiter.retry_work().now_or_never().is_none());

        held[0].start();
        drop(held);

        assert!(limiter.retry_work().now_or_never().is_some());
        assert!(!limiter.reserve(&endpoint(2, 64), 100).permits.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_breaker_denies_attempts_until_one_probe() {
        let limiter = ConcurrencyLimiter::new(100);
        fail(&limiter, 1, THRESHOLD - 1).await;
        let one = endpoint(1, 64);
        assert!(acquire(&limiter, one).await.is_some(), "not failing yet");
        fail(&limiter, 1, 1).await;
        assert!(acquire(&limiter, one).await.is_none());
        assert!(limiter.reserve(&one, 64).permits.is_empty());
        limiter.note_deferred(&one);
        assert!(limiter.retry_work().now_or_never().is_none(), "an open breaker has no retries to start");
        assert!(acquire(&limiter, endpoint(2, 64)).await.is_some(), "the breaker of another callback is closed");
        assert_eq!(limiter.open_breakers(), 1);

        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut probe = limiter.reserve(&one, 64).permits;
        assert_eq!(probe.len(), 1);
        assert!(acquire(&limiter, one).await.is_none(), "one probe");
        drop(probe.pop());
        let mut probe = acquire(&limiter, one).await.expect("another probe: the first sent no request");
        probe.finish(EndpointHealth::Failing, 0.0);
        drop(probe);
        tokio::time::sleep(Duration::from_millis(1999)).await;
        assert!(acquire(&limiter, one).await.is_none(), "the second opening lasts longer");
        tokio::time::sleep(Duration::from_millis(1)).await;
        acquire(&limiter, one).await.unwrap().finish(EndpointHealth::Responding, 0.0);
        assert!(limiter.retry_work().now_or_never().is_some(), "retries start at once");
        assert_eq!(limiter.reserve(&one, 64).permits.len(), 6, "the window is small after one answer");
    }

    #[tokio::test(start_paused = true)]
    async fn refused_test_requests_name_the_limit_and_ignore_the_breaker() {
        let limiter = ConcurrencyLimiter::new(100);
        let test = |endpoint| limiter.acquire_for_test(&endpoint, 300);
        let held = test(endpoint(1, 1)).unwrap();
        assert_eq!(test(endpoint(1, 1)).unwrap_err(), ReachedLimit::InFlight(1));
        drop(held);
        assert!(test(endpoint(1, 1)).is_ok());
        let rate_limited = Endpoint { max_per_second: Some(1), ..endpoint(2, 64) };
        test(rate_limited).unwrap().start();
        assert_eq!(test(rate_limited).unwrap_err(), ReachedLimit::Rate(1));
        let large = limiter.acquire_for_test(&endpoint(4, 64), 100 * BYTES_PER_UNIT);
        assert_eq!(large.unwrap_err(), ReachedLimit::Share);
        fail(&limiter, 3, THRESHOLD).await;
        assert!(test(endpoint(3, 64)).is_ok());
        assert!(acquire(&limiter, endpoint(3, 64)).await.is_none(), "the test does not close the breaker");
    }

    #[tokio::test]
    async fn rejected_payloads_do_not_open_the_breaker() {
        let limiter = ConcurrencyLimiter::new(100);
        for _ in 0..100 {
            acquire(&limiter, endpoint(1, 64))
                .await
                .unwrap()
                .finish(crate::core::outcome::tests::outcome(400).endpoint_health(), 0.0);
        }
        assert!(acquire(&limiter, endpoint(1, 64)).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_limit_holds_and_wakes_retries_in_time() {
        let limiter = ConcurrencyLimiter::new(100);
        let one = Endpoint { max_per_second: Some(2), ..endpoint(1, 64) };
        acquire(&limiter, one).await.unwrap().start();
        assert!(acquire(&limiter, one).await.is_none(), "the rate is reached");
        limiter.note_deferred(&one);
        assert!(acquire(&limiter, endpoint(2, 64)).await.is_some(), "the rate of another callback is not");
        assert!(limiter.reserve(&one, 64).permits.is_empty());
        let started = Instant::now();
        limiter.retry_work().await;
        assert_eq!(started.elapsed(), Duration::from_millis(500));
        let mut reserved = limiter.reserve(&one, 64).permits;
        assert_eq!(reserved.len(), 1);
        drop(reserved.pop());
        assert_eq!(limiter.reserve(&one, 64).permits.len(), 1, "an unused token is refunded");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_limit_wakes_no_retries_once_none_are_due() {
        let limiter = ConcurrencyLimiter::new(100);
        let one = Endpoint { max_per_second: Some(10), ..endpoint(1, 64) };
        let mut reserved = limiter.reserve(&one, 64).permits;
        assert_eq!(reserved.len(), 1);
        // The claim filled the reservation, so more may be due.
        limiter.set_due_retries(id(1), true);
        reserved.pop().unwrap().start();
        limiter.retry_work().await;

        limiter.begin_round(&HashSet::from([id(2)]));

        assert!(limiter.retry_work().now_or_never().is_none());
        limiter.set_due_retries(id(1), true);
        limiter.reserve(&one, 64);
        limiter.begin_round(&HashSet::from([id(1)]));
        assert!(tokio::time::timeout(Duration::from_secs(1), limiter.retry_work()).await.is_ok(), "some are due");
    }

    #[tokio::test(start_paused = true)]
    async fn first_attempts_get_the_whole_window_once_no_retries_are_due() {
        let limiter = ConcurrencyLimiter::new(100);
        let reserved = limiter.reserve(&endpoint(1, 1), 64);
        assert_eq!(reserved.permits.len(), 1);
        limiter.set_due_retries(id(1), true);
        drop(reserved);
        assert!(acquire(&limiter, endpoint(1, 1)).await.is_none(), "the window is left to the retries");
        limiter.retry_work().await;

        limiter.begin_round(&HashSet::new());

        assert!(acquire(&limiter, endpoint(1, 1)).await.is_some());
        assert!(limiter.retry_work().now_or_never().is_none(), "a freed permit starts no round");
        tokio::time::sleep(Duration::from_secs(2)).await;
        limiter.evict_idle();
        assert!(limiter.lock().endpoints.is_empty());
    }

    #[tokio::test]
    async fn due_retries_reserve_a_quarter_of_the_window() {
        let limiter = ConcurrencyLimiter::new(1000);
        open_window(&limiter, endpoint(1, 8)).await;
        limiter.set_due_retries(id(1), true);
        let mut held = acquire_all(&limiter, endpoint(1, 8)).await;
        assert_eq!(held.len(), 6);
        assert_eq!(limiter.reserve(&endpoint(1, 8), 64).permits.len(), 2);
        held.pop();
        assert!(limiter.retry_work().now_or_never().is_some());
    }
}

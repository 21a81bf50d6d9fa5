//! 7 Deliver, 8 Retry: which attempts may begin: how many at once, of one callback, one project and all; how many a second;
//! and none while the callback's circuit breaker is open.
//!
//! Straight attempts and retries share the slots. Nobody queues behind a slow endpoint: a project may hold no more of the
//! pool than is still free, and a callback no more than its project could still take, so however many endpoints hang, some
//! is left for the next one (the dynamic threshold of switch buffers, twice). And a callback may have few attempts at once
//! until it answers, so that endpoints that hang take little of what their project's other callbacks need.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use contract::ObjectId;
use tokio::{sync::Notify, time::Instant};

use crate::{
    admission::breaker::{Admission, Breaker, Sign},
    admission::token_bucket::Pace,
};

/// An attempt counts once per this many bytes of its body begun, so that the pool bounds memory too. Larger lets large
/// bodies take more memory, smaller makes them wait longer for room.
const BYTES_PER_UNIT: usize = 64 * 1024;
/// How long an open breaker that nobody asks about is remembered beyond its time: the callback may be gone.
const FORGET_AFTER: Duration = Duration::from_secs(60 * 60);

/// How many first attempts may wait for slots of their callbacks, unless they will not wait for long: of one callback as
/// many as are left for others, or as many as ended [`LATELY`]. More rides out bursts without a detour through Postgres,
/// fewer leave more room for other callbacks' events.
const WAITING: usize = 1024;
/// What a callback got through in this time it will get through in this time again: its queue may be as long.
const LATELY: Duration = Duration::from_millis(100);
/// How many attempts at once a callback may have that answered nothing lately. More wait for endpoints that hang, fewer
/// make a callback slower to begin with.
const UNPROVEN: u32 = 4;
/// How many more it may have for each attempt that was answered in the last [`PROVEN_FOR`]: so many that the number grows,
/// whatever else ends meanwhile.
const PER_ANSWER: u32 = 2;
/// How long an answer speaks for a callback. Longer suits endpoints that take seconds, shorter notices sooner that one hangs.
const PROVEN_FOR: Duration = Duration::from_secs(1);

/// How much of the pool an attempt with a body of this length takes.
fn units(bytes: usize) -> i64 {
    1 + (bytes / BYTES_PER_UNIT) as i64
}

/// How many more units a callback could take that holds `callback`, in a project that holds `project`, with `free` left.
/// After taking them the project holds no more than is free, and the callback no more than the project could still take.
fn room(free: i64, project: i64, callback: i64) -> i64 {
    // Rounded up, so that the last ones are for somebody.
    let half = |units: i64| (units.max(0) + 1) / 2;
    half(half(free - project) - callback).min(free.max(0))
}

/// A callback, and what it may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Endpoint {
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    /// Most attempts at once.
    pub(crate) max_in_flight: u32,
    /// Most attempts that begin in a second.
    pub(crate) max_per_second: Option<u32>,
}

/// The attempts under way in this process.
#[derive(Debug)]
pub(crate) struct Slots {
    state: Mutex<State>,
    /// Told when a callback may have something to retry at once.
    work: Notify,
}

#[derive(Debug)]
struct State {
    /// What is left of the pool. Below zero while retries turned out larger than expected.
    free: i64,
    /// What each project holds of it.
    projects: HashMap<ObjectId, i64>,
    callbacks: HashMap<ObjectId, Use>,
    /// First attempts that wait for a slot of their callbacks.
    waiting: usize,
}

/// How often something happened lately, in periods that are always of the same length.
#[derive(Debug, Default)]
struct Count {
    since: Option<Instant>,
    now: usize,
    before: usize,
}

impl Count {
    fn turn(&mut self, period: Duration, now: Instant) {
        let age = self.since.map(|since| now.duration_since(since));
        if age.is_none_or(|age| age >= period) {
            // Before the last period nothing counts.
            self.before = if age.is_some_and(|age| age < 2 * period) { self.now } else { 0 };
            self.now = 0;
            self.since = Some(now);
        }
    }

    fn add(&mut self, period: Duration, now: Instant) {
        self.turn(period, now);
        self.now += 1;
    }

    /// How often it happened in a period, the present or the last one.
    fn lately(&mut self, period: Duration, now: Instant) -> usize {
        self.turn(period, now);
        self.before.max(self.now)
    }
}

/// What a callback takes, and how it fares.
#[derive(Debug, Default)]
struct Use {
    attempts: u32,
    units: i64,
    breaker: Breaker,
    /// Of a callback with a rate limit.
    pace: Option<Pace>,
    /// More of its deliveries are due in Postgres than could begin.
    behind: bool,
    /// When more of them can begin, if it is the rate that holds them up.
    paced_until: Option<Instant>,
    /// First attempts that wait for a slot.
    waiting: usize,
    /// Attempts that ended.
    ended: Count,
    /// Attempts that were answered.
    answered: Count,
    freed: Arc<Notify>,
}

impl Use {
    /// How many attempts may begin now as far as the rate is concerned.
    fn permits(&mut self, endpoint: &Endpoint, now: Instant) -> u32 {
        match endpoint.max_per_second {
            Some(rate) => self.pace.get_or_insert_with(|| Pace::new(rate, now)).available(rate, now),
            None => {
                self.pace = None;
                u32::MAX
            }
        }
    }

    /// How many attempts may begin now, and whether it would be the probe.
    fn admitted(&mut self, endpoint: &Endpoint, now: Instant) -> (u32, bool) {
        match self.breaker.admission(now) {
            Admission::None => (0, false),
            Admission::Probe => (self.permits(endpoint, now).min(1), true),
            Admission::All => (self.permits(endpoint, now), false),
        }
    }

    /// How many attempts at once it may have, by its settings and by what it answers.
    fn limit(&mut self, endpoint: &Endpoint, now: Instant) -> u32 {
        let answered = u32::try_from(self.answered.lately(PROVEN_FOR, now)).unwrap_or(u32::MAX);
        endpoint.max_in_flight.min(UNPROVEN.saturating_add(answered.saturating_mul(PER_ANSWER)))
    }

    /// Counts attempts that begin.
    fn begin(&mut self, count: u32, units: i64, probe: bool) {
        self.attempts += count;
        self.units += units;
        if let Some(pace) = &mut self.pace {
            pace.take(count);
        }
        if probe {
            self.breaker = self.breaker.probing();
        }
    }
}

impl State {
    fn room(&self, endpoint: &Endpoint) -> i64 {
        let project = self.projects.get(&endpoint.project_id).copied().unwrap_or_default();
        let callback = self.callbacks.get(&endpoint.callback_id).map_or(0, |usage| usage.units);
        room(self.free, project, callback)
    }

    /// Counts what a callback takes of the pool beside what its [`Use`] says.
    fn hold(&mut self, project_id: ObjectId, units: i64) {
        self.free -= units;
        let project = self.projects.entry(project_id).or_default();
        *project += units;
        if *project == 0 {
            self.projects.remove(&project_id);
        }
    }
}

/// What became of asking for a slot.
enum Taken {
    Slot(Slot),
    /// Nothing may be asked of the callback now.
    Refused,
    /// When one of the callback's attempts has ended.
    Later,
}

/// A first attempt that waits for a slot of its callback.
struct Waiting {
    slots: Arc<Slots>,
    callback_id: ObjectId,
    freed: Arc<Notify>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.waiting -= 1;
        if let Some(usage) = state.callbacks.get_mut(&self.callback_id) {
            usage.waiting -= 1;
        }
    }
}

/// What a callback was given for retries.
#[derive(Debug)]
pub(crate) struct Reserved {
    /// One each.
    pub(crate) slots: Vec<Slot>,
    /// How many bytes of bodies they may have in all.
    pub(crate) bytes: usize,
}

impl Slots {
    /// A pool of this many slots.
    pub(crate) fn new(size: u32) -> Arc<Self> {
        let state = State { free: size.into(), projects: HashMap::new(), callbacks: HashMap::new(), waiting: 0 };
        Arc::new(Self { state: Mutex::new(state), work: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a first attempt, within this time. None when the callback's limit or share of the pool is used up; at
    /// once when its breaker is open or its rate reached, or when too many wait for it already: it is left to the retries
    /// then.
    pub(crate) async fn take(self: &Arc<Self>, endpoint: &Endpoint, bytes: usize, patience: Duration) -> Option<Slot> {
        let units = units(bytes);
        let waiting = {
            let mut state = self.lock();
            match self.try_take(&mut state, endpoint, units) {
                Taken::Slot(slot) => return Some(slot),
                Taken::Refused => return None,
                Taken::Later => {}
            }
            let left = WAITING.saturating_sub(state.waiting);
            let usage = state.callbacks.entry(endpoint.callback_id).or_default();
            if usage.waiting >= left.max(usage.ended.lately(LATELY, Instant::now())) {
                return None;
            }
            usage.waiting += 1;
            let freed = usage.freed.clone();
            state.waiting += 1;
            Waiting { slots: self.clone(), callback_id: endpoint.callback_id, freed }
        };
        let wait = async {
            loop {
                waiting.freed.notified().await;
                match self.try_take(&mut self.lock(), endpoint, units) {
                    Taken::Slot(slot) => return Some(slot),
                    Taken::Refused => return None,
                    Taken::Later => {}
                }
            }
        };
        tokio::time::timeout(patience, wait).await.ok().flatten()
    }

    fn try_take(self: &Arc<Self>, state: &mut State, endpoint: &Endpoint, units: i64) -> Taken {
        let room = state.room(endpoint);
        let usage = state.callbacks.entry(endpoint.callback_id).or_default();
        let now = Instant::now();
        let (permits, probe) = usage.admitted(endpoint, now);
        if permits == 0 {
            return Taken::Refused;
        }
        // Whoever is behind keeps a quarter for what waits in Postgres, else it would wait for ever.
        let limit = usage.limit(endpoint, now);
        let limit = if usage.behind { limit - limit.div_ceil(4) } else { limit };
        if usage.attempts >= limit || units > room {
            // Only its own attempts wake whoever waits.
            return if usage.attempts > 0 { Taken::Later } else { Taken::Refused };
        }
        usage.begin(1, units, probe);
        // The limit grows with what is answered, so an attempt that ends may make room for more than the one it wakes.
        if usage.waiting > 0 && usage.attempts < limit {
            usage.freed.notify_one();
        }
        state.hold(endpoint.project_id, units);
        Taken::Slot(self.slot(endpoint, units, probe))
    }

    /// A slot for a ping, now or not at all. The callback's limit, its rate and its share of the pool hold; its breaker
    /// holds nothing up, for a ping may be to see whether the endpoint is back, and hears nothing of it.
    pub(crate) fn take_for_ping(self: &Arc<Self>, endpoint: &Endpoint, bytes: usize) -> Option<Slot> {
        let units = units(bytes);
        let mut state = self.lock();
        let room = state.room(endpoint);
        let usage = state.callbacks.entry(endpoint.callback_id).or_default();
        let permits = usage.permits(endpoint, Instant::now());
        if permits == 0 || usage.attempts >= endpoint.max_in_flight || units > room {
            return None;
        }
        usage.begin(1, units, false);
        state.hold(endpoint.project_id, units);
        Some(self.slot(endpoint, units, false))
    }

    /// Slots for retries, at most `at_most`.
    pub(crate) fn reserve(self: &Arc<Self>, endpoint: &Endpoint, at_most: u32) -> Reserved {
        let mut state = self.lock();
        let room = state.room(endpoint);
        let now = Instant::now();
        let usage = state.callbacks.entry(endpoint.callback_id).or_default();
        let (permits, probe) = usage.admitted(endpoint, now);
        let fitting =
            usage.limit(endpoint, now).saturating_sub(usage.attempts).min(u32::try_from(room).unwrap_or(u32::MAX));
        let count = permits.min(at_most).min(fitting);
        let units = i64::from(count);
        usage.begin(count, units, probe && count > 0);
        // When it is worth coming again; of an open breaker the poll asks.
        let held_up = permits < fitting.min(at_most) && usage.breaker.admission(now) != Admission::None;
        let paced = usage.pace.filter(|_| held_up);
        usage.paced_until = paced.zip(endpoint.max_per_second).map(|(pace, rate)| pace.full_at(rate));
        state.hold(endpoint.project_id, units);
        let bytes = usize::try_from(room).unwrap_or_default() * BYTES_PER_UNIT;
        Reserved { slots: (0..count).map(|_| self.slot(endpoint, 1, probe)).collect(), bytes }
    }

    fn slot(self: &Arc<Self>, endpoint: &Endpoint, units: i64, probe: bool) -> Slot {
        Slot { slots: self.clone(), endpoint: *endpoint, units, probe, begun: false }
    }

    /// Says whether more of the callback's deliveries are due than could begin.
    pub(crate) fn note_behind(&self, callback_id: ObjectId, behind: bool) {
        let mut state = self.lock();
        let usage = state.callbacks.entry(callback_id).or_default();
        usage.behind = behind;
        if !behind {
            usage.paced_until = None;
        }
    }

    /// Says that a delivery of this callback was spilled to Postgres, due now.
    pub(crate) fn note_spilled(&self, endpoint: &Endpoint) {
        let mut state = self.lock();
        let room = state.room(endpoint);
        let usage = state.callbacks.entry(endpoint.callback_id).or_default();
        let now = Instant::now();
        let (permits, _) = usage.admitted(endpoint, now);
        if permits > 0 && usage.attempts < usage.limit(endpoint, now) && room > 0 {
            self.work.notify_one();
        } else {
            usage.behind = true;
        }
    }

    /// Says that something became due that may begin.
    pub(crate) fn wake(&self) {
        self.work.notify_one();
    }

    /// Forgets how a callback's attempts went.
    pub(crate) fn forgive(&self, callback_id: ObjectId) {
        if let Some(usage) = self.lock().callbacks.get_mut(&callback_id)
            && std::mem::take(&mut usage.breaker).is_open()
        {
            self.work.notify_one();
        }
    }

    /// Waits until a callback may have something to retry at once.
    pub(crate) async fn work(&self) {
        let paced = self.lock().callbacks.values().filter_map(|usage| usage.paced_until).min();
        let paced = async {
            match paced {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.work.notified() => {}
            () = paced => {}
        }
    }

    /// Forgets callbacks that there is nothing to remember of. Returns how many breakers are open.
    pub(crate) fn tidy(&self) -> usize {
        let now = Instant::now();
        let mut state = self.lock();
        state.callbacks.retain(|_, usage| {
            let forgotten = match usage.breaker {
                Breaker::Open { until, .. } => until + FORGET_AFTER < now,
                breaker => breaker == Breaker::default(),
            };
            let idle = usage.attempts == 0 && usage.waiting == 0 && !usage.behind;
            !(idle && forgotten && usage.pace.is_none_or(|pace| pace.is_full(now)))
        });
        state.callbacks.values().filter(|usage| usage.breaker.is_open()).count()
    }

    fn release(&self, slot: &Slot) {
        let mut state = self.lock();
        state.hold(slot.endpoint.project_id, -slot.units);
        let Some(usage) = state.callbacks.get_mut(&slot.endpoint.callback_id) else { return };
        usage.attempts -= 1;
        usage.units -= slot.units;
        usage.ended.add(LATELY, Instant::now());
        if slot.probe {
            usage.breaker = usage.breaker.probe_abandoned(Instant::now());
        }
        if let (false, Some(pace), Some(rate)) = (slot.begun, &mut usage.pace, slot.endpoint.max_per_second) {
            pace.give_back(1, rate);
        }
        usage.freed.notify_one();
        // One that is held up by its rate has its own time.
        if usage.behind && !usage.breaker.is_open() && usage.paced_until.is_none() {
            self.work.notify_one();
        }
    }
}

/// The right to run one attempt; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    endpoint: Endpoint,
    units: i64,
    /// It is the probe of a half-open breaker, whose outcome is not known yet.
    probe: bool,
    /// Something was asked of the endpoint.
    begun: bool,
}

impl Slot {
    /// Says how large the body is after all.
    pub(crate) fn weigh(&mut self, bytes: usize) {
        let more = units(bytes) - self.units;
        self.units += more;
        let mut state = self.slots.lock();
        state.hold(self.endpoint.project_id, more);
        if let Some(usage) = state.callbacks.get_mut(&self.endpoint.callback_id) {
            usage.units += more;
        }
    }

    /// Says that the endpoint is asked now.
    pub(crate) fn begin(&mut self) {
        self.begun = true;
    }

    /// Says how the attempt went; `random` is from 0 to 1.
    pub(crate) fn end(&mut self, sign: Sign, random: f64) {
        let mut state = self.slots.lock();
        let usage = state.callbacks.entry(self.endpoint.callback_id).or_default();
        let (before, now) = (usage.breaker, Instant::now());
        usage.breaker = before.after(sign, std::mem::take(&mut self.probe), now, random);
        if sign == Sign::Alive {
            usage.answered.add(PROVEN_FOR, now);
        }
        let callback_id = self.endpoint.callback_id;
        match (before.is_open(), usage.breaker.is_open()) {
            (false, true) => tracing::info!(%callback_id, "the endpoint fails: only probes go there for now"),
            (true, false) => {
                tracing::info!(%callback_id, "the endpoint answers again");
                self.slots.work.notify_one();
            }
            _ => {}
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.release(self);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;

    use super::*;
    use crate::admission::breaker::THRESHOLD;

    const SOON: Duration = Duration::from_millis(20);

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

    async fn take(slots: &Arc<Slots>, endpoint: Endpoint) -> Option<Slot> {
        slots.take(&endpoint, 300, Duration::ZERO).await
    }

    async fn take_all(slots: &Arc<Slots>, endpoint: Endpoint) -> Vec<Slot> {
        let mut held = Vec::new();
        while let Some(slot) = take(slots, endpoint).await {
            held.push(slot);
        }
        held
    }

    /// Has attempts of a callback answered, enough for any limit.
    async fn prove(slots: &Arc<Slots>, endpoint: Endpoint) {
        for _ in 0..endpoint.max_in_flight {
            take(slots, endpoint).await.unwrap().end(Sign::Alive, 0.0);
        }
    }

    /// Has so many attempts of a callback fail.
    async fn fail(slots: &Arc<Slots>, callback: u8, times: u32) {
        for _ in 0..times {
            take(slots, endpoint(callback, 64)).await.unwrap().end(Sign::Failing, 0.0);
        }
    }

    #[tokio::test]
    async fn a_callback_gets_no_more_than_its_limit() {
        let slots = Slots::new(100);
        let first = take(&slots, endpoint(1, 2)).await.unwrap();
        let _second = take(&slots, endpoint(1, 2)).await.unwrap();
        assert!(take(&slots, endpoint(1, 2)).await.is_none());
        assert!(take(&slots, endpoint(2, 2)).await.is_some());
        drop(first);
        assert!(take(&slots, endpoint(1, 2)).await.is_some());
    }

    #[tokio::test]
    async fn who_waits_gets_the_slot_that_comes_free() {
        let slots = Slots::new(100);
        let one = endpoint(1, 1);
        let held = take(&slots, one).await.unwrap();
        let (taken, ()) = tokio::join!(slots.take(&one, 0, Duration::from_secs(5)), async {
            tokio::time::sleep(SOON).await;
            drop(held);
        });
        assert!(taken.is_some());
        assert!(slots.take(&one, 0, SOON).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_callback_has_a_short_queue_and_a_fast_one_a_long_one() {
        let slots = Slots::new(100);
        let one = endpoint(1, 1);
        let held = take(&slots, one).await.unwrap();
        let wait = || {
            let slots = slots.clone();
            tokio::spawn(async move { slots.take(&one, 0, Duration::from_secs(5)).await.is_some() })
        };
        // Each goes at once, and is counted as an attempt that ended.
        let mut waiters = (0..WAITING).map(|_| wait()).collect::<Vec<_>>();
        tokio::time::sleep(SOON).await;
        assert_eq!(slots.lock().waiting, WAITING / 2, "half is left for others");
        assert!(slots.take(&endpoint(2, 1), 0, SOON).await.is_some());
        drop(held);
        let mut taken = 0;
        for waiter in waiters.drain(..) {
            taken += usize::from(waiter.await.unwrap());
        }
        assert_eq!((taken, slots.lock().waiting), (WAITING / 2, 0));

        // It got through so many in no time, so as many may wait, whatever is left.
        let held = take(&slots, one).await.unwrap();
        slots.lock().waiting = WAITING;
        let waiters = (0..WAITING).map(|_| wait()).collect::<Vec<_>>();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!((WAITING / 2..WAITING).contains(&(slots.lock().waiting - WAITING)), "{}", slots.lock().waiting);
        drop(held);
        for waiter in waiters {
            waiter.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_callback_may_have_more_at_once_when_it_answers_and_fewer_when_it_does_so_no_more() {
        let slots = Slots::new(512);
        let one = endpoint(1, 64);
        let mut held = take_all(&slots, one).await;
        assert_eq!(held.len(), 4);
        // What waits goes as soon as there is room, though only one attempt ended.
        let wait = || {
            let slots = slots.clone();
            tokio::spawn(async move { slots.take(&one, 0, Duration::from_secs(5)).await })
        };
        let waiters: Vec<_> = (0..3).map(|_| wait()).collect();
        tokio::time::sleep(SOON).await;
        held.pop().unwrap().end(Sign::Alive, 0.0);
        for waiter in waiters {
            held.push(waiter.await.unwrap().expect("a slot"));
        }
        assert_eq!((held.len(), take(&slots, one).await.is_none()), (6, true));
        drop(held);
        prove(&slots, one).await;
        assert_eq!(take_all(&slots, one).await.len(), 64);
        tokio::time::sleep(2 * PROVEN_FOR).await;
        assert_eq!(slots.reserve(&one, 64).slots.len(), 4);
    }

    #[tokio::test]
    async fn endpoints_that_answer_nothing_take_little_of_what_their_project_may_have() {
        let slots = Slots::new(512);
        let mut held = Vec::new();
        for callback in 1..=50 {
            held.extend(take_all(&slots, endpoint(callback, 1000)).await);
        }
        assert_eq!(held.len(), 200);
        assert_eq!(take_all(&slots, endpoint(51, 1000)).await.len(), 4);
    }

    #[tokio::test]
    async fn endpoints_that_hang_always_leave_room_for_another() {
        let slots = Slots::new(512);
        prove(&slots, endpoint(1, 1000)).await;
        let one = take_all(&slots, endpoint(1, 1000)).await;
        assert_eq!(one.len(), 128, "a callback has half of what its project may have");
        let mut project = one;
        for callback in 2..=100 {
            project.extend(take_all(&slots, endpoint(callback, 1000)).await);
        }
        assert_eq!(project.len(), 256, "a project has half of what there is");
        let mut others = Vec::new();
        for number in 2..=6 {
            others.extend(take_all(&slots, of_project(number, endpoint(number + 100, 1000))).await);
        }
        assert!(take(&slots, of_project(100, endpoint(200, 1000))).await.is_some());
        assert!(!slots.reserve(&of_project(101, endpoint(201, 64)), 64).slots.is_empty());
    }

    #[tokio::test]
    async fn large_bodies_count_more_and_everything_is_given_back() {
        let slots = Slots::new(100);
        let large = slots.take(&endpoint(1, 64), 20 * BYTES_PER_UNIT, Duration::ZERO).await.unwrap();
        assert_eq!(slots.lock().free, 79);
        assert!(slots.take(&endpoint(1, 64), 20 * BYTES_PER_UNIT, Duration::ZERO).await.is_none());
        prove(&slots, endpoint(2, 64)).await;
        let mut reserved = slots.reserve(&endpoint(2, 64), 10);
        assert_eq!((reserved.slots.len(), reserved.bytes), (10, 15 * BYTES_PER_UNIT));
        reserved.slots[0].weigh(3 * BYTES_PER_UNIT);
        assert_eq!(slots.lock().free, 66);
        drop((large, reserved));
        assert_eq!(slots.lock().free, 100);
        assert_eq!(slots.tidy(), 0);
        assert!(slots.lock().callbacks.is_empty() && slots.lock().projects.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_breaker_is_open_nothing_begins_and_then_one_probe() {
        let slots = Slots::new(100);
        fail(&slots, 1, THRESHOLD - 1).await;
        let one = endpoint(1, 64);
        assert!(take(&slots, one).await.is_some(), "not failing yet");
        fail(&slots, 1, 1).await;
        assert!(take(&slots, one).await.is_none());
        assert!(slots.reserve(&one, 64).slots.is_empty());
        slots.note_spilled(&one);
        assert!(slots.work().now_or_never().is_none(), "what waits for an open breaker is no work");
        assert!(take(&slots, endpoint(2, 64)).await.is_some(), "another's is closed");
        assert_eq!(slots.tidy(), 1);

        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut probe = slots.reserve(&one, 64).slots;
        assert_eq!(probe.len(), 1);
        assert!(take(&slots, one).await.is_none(), "one probe");
        drop(probe.pop());
        let mut probe = take(&slots, one).await.expect("another probe: the first asked nothing");
        probe.end(Sign::Failing, 0.0);
        drop(probe);
        tokio::time::sleep(Duration::from_millis(1999)).await;
        assert!(take(&slots, one).await.is_none(), "it is open for longer");
        tokio::time::sleep(Duration::from_millis(1)).await;
        take(&slots, one).await.unwrap().end(Sign::Alive, 0.0);
        assert!(slots.work().now_or_never().is_some(), "what waited goes out at once");
        assert_eq!(slots.reserve(&one, 64).slots.len(), 6, "few until it has answered more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_goes_by_the_limits_and_past_the_breaker() {
        let slots = Slots::new(100);
        let ping = |endpoint| slots.take_for_ping(&endpoint, 300);
        let held = ping(endpoint(1, 1)).unwrap();
        assert!(ping(endpoint(1, 1)).is_none(), "one at once");
        drop(held);
        assert!(ping(endpoint(1, 1)).is_some());
        let paced = Endpoint { max_per_second: Some(1), ..endpoint(2, 64) };
        ping(paced).unwrap().begin();
        assert!(ping(paced).is_none(), "one a second");
        fail(&slots, 3, THRESHOLD).await;
        assert!(ping(endpoint(3, 64)).is_some());
        assert!(take(&slots, endpoint(3, 64)).await.is_none(), "the breaker hears nothing of it");
    }

    #[tokio::test]
    async fn a_payload_that_is_refused_is_no_reason_to_stop() {
        let slots = Slots::new(100);
        for _ in 0..100 {
            take(&slots, endpoint(1, 64)).await.unwrap().end(Sign::of(Some(400)), 0.0);
        }
        assert!(take(&slots, endpoint(1, 64)).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_what_it_holds_up_goes_out_in_time() {
        let slots = Slots::new(100);
        let one = Endpoint { max_per_second: Some(2), ..endpoint(1, 64) };
        take(&slots, one).await.unwrap().begin();
        assert!(take(&slots, one).await.is_none(), "the rate is reached");
        slots.note_spilled(&one);
        assert!(take(&slots, endpoint(2, 64)).await.is_some(), "another's is not");
        assert!(slots.reserve(&one, 64).slots.is_empty());
        let begun = Instant::now();
        slots.work().await;
        assert_eq!(begun.elapsed(), Duration::from_millis(500));
        let mut reserved = slots.reserve(&one, 64).slots;
        assert_eq!(reserved.len(), 1);
        drop(reserved.pop());
        assert_eq!(slots.reserve(&one, 64).slots.len(), 1, "a permit that was not used comes back");
    }

    #[tokio::test]
    async fn who_is_behind_keeps_a_quarter_for_what_waits() {
        let slots = Slots::new(1000);
        prove(&slots, endpoint(1, 8)).await;
        slots.note_behind(id(1), true);
        let mut held = take_all(&slots, endpoint(1, 8)).await;
        assert_eq!(held.len(), 6);
        assert_eq!(slots.reserve(&endpoint(1, 8), 64).slots.len(), 2);
        held.pop();
        assert!(slots.work().now_or_never().is_some());
    }

    proptest! {
        #[test]
        fn nobody_takes_more_than_is_left(free in 0_i64..2000, project in 0_i64..2000, share in 0.0..=1.0_f64) {
            let callback = (project as f64 * share) as i64;
            let room = room(free, project, callback);
            prop_assert!(room >= 0 && room <= free);
            if room > 0 {
                // One unit of rounding.
                prop_assert!(project + room <= free - room + 2);
            }
            if project == 0 && free > 0 {
                prop_assert!(room > 0, "who holds nothing gets something");
            }
        }
    }
}

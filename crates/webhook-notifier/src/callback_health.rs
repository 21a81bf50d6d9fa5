//! 7 Deliver, 8 Retry: the paused and disabled callbacks, and the start of each callback's streak of failures.
//!
//! Postgres stores them for all replicas and across restarts. Each replica synchronizes its memory with Postgres every
//! second, so an attempt makes no query for them.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    str::FromStr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use contract::{ObjectId, Timestamp, process::Callback};
use service_kit::{health::Readiness, nats::error_chain, postgres::Pool};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::ConcurrencyLimiter,
    metrics::Metrics,
    store::{self, error::StoreError},
};

/// How often memory is synchronized with Postgres. A longer interval sends more attempts to an endpoint that another
/// replica disabled; a shorter one costs Postgres more queries.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// How long a callback may fail without a success before it is disabled; or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisableAfter(Option<Duration>);

/// Five days: longer than the default retry schedule, so that a delivery fails for its whole schedule before that.
impl Default for DisableAfter {
    fn default() -> Self {
        Self(Some(Duration::from_secs(5 * 24 * 60 * 60)))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a duration such as 5days nor off")]
pub struct InvalidDisableAfter(String);

impl FromStr for DisableAfter {
    type Err = InvalidDisableAfter;

    fn from_str(text: &str) -> Result<Self, InvalidDisableAfter> {
        match text.trim() {
            "off" => Ok(Self(None)),
            other => match humantime::parse_duration(other) {
                Ok(after) if !after.is_zero() => Ok(Self(Some(after))),
                _ => Err(InvalidDisableAfter(text.into())),
            },
        }
    }
}

impl fmt::Display for DisableAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(after) => humantime::format_duration(after).fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl DisableAfter {
    /// Whether a callback that has failed since `failing_since` must be disabled at a failure `now`.
    fn is_over(self, failing_since: Timestamp, now: Timestamp) -> bool {
        self.0.is_some_and(|after| failing_since.plus(after) <= now)
    }
}

/// Why the deliveries of a callback are recorded but not attempted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Hold {
    /// Switched off in the configuration of its process.
    #[error("the callback is switched off")]
    Off,
    #[error("the callback is paused")]
    Paused,
    /// The text is the reason.
    #[error("the callback is disabled: {0}")]
    Disabled(Arc<str>),
}

/// When each callback's streak of failures started: the rows of Postgres, and the changes that are not written yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FailureStreaks {
    stored: HashMap<ObjectId, Timestamp>,
    started: HashMap<ObjectId, Timestamp>,
    ended: HashMap<ObjectId, Timestamp>,
}

impl FailureStreaks {
    fn since(&self, callback_id: ObjectId) -> Option<Timestamp> {
        self.stored.get(&callback_id).or(self.started.get(&callback_id)).copied()
    }

    /// Notes a failure. Returns when the callback's streak of failures started.
    fn note_failure(&mut self, callback_id: ObjectId, at: Timestamp) -> Timestamp {
        match self.since(callback_id) {
            Some(since) => since,
            None => *self.started.entry(callback_id).or_insert(at),
        }
    }

    fn note_success(&mut self, callback_id: ObjectId, at: Timestamp) {
        if self.stored.remove(&callback_id).is_some() | self.started.remove(&callback_id).is_some() {
            self.ended.insert(callback_id, at);
        }
    }

    /// Replaces the rows with `stored`, which was read after `written` had been written. Keeps changes that were noted
    /// meanwhile.
    fn merge_rows(&mut self, written: &Self, stored: HashMap<ObjectId, Timestamp>) {
        self.started.retain(|id, since| written.started.get(id) != Some(since));
        self.ended.retain(|id, at| written.ended.get(id) != Some(at));
        self.stored = stored;
        self.stored.retain(|id, since| self.ended.get(id).is_none_or(|ended| ended < since));
    }
}

#[derive(Debug, Default)]
struct State {
    paused: HashSet<ObjectId>,
    disabled: HashMap<ObjectId, Arc<str>>,
    /// The callbacks that are disabled by records that are not written yet: one entry per record.
    disabling: Vec<ObjectId>,
    streaks: FailureStreaks,
}

impl State {
    /// The disabled callbacks whose records are written. Another replica may have enabled them since.
    fn recorded_disabled(&self) -> HashMap<ObjectId, Arc<str>> {
        let recorded = self.disabled.iter().filter(|(callback_id, _)| !self.disabling.contains(callback_id));
        recorded.map(|(callback_id, reason)| (*callback_id, reason.clone())).collect()
    }
}

/// Replaces the disabled callbacks in `before` with the rows read from Postgres. `before` are those that were recorded
/// when the read started; the others stay disabled, because their rows may have been written after the read. Returns
/// the re-enabled callbacks.
fn merge_disabled(
    disabled: &mut HashMap<ObjectId, Arc<str>>,
    before: &HashMap<ObjectId, Arc<str>>,
    stored: HashMap<ObjectId, Arc<str>>,
) -> Vec<ObjectId> {
    disabled.retain(|callback_id, _| !before.contains_key(callback_id));
    disabled.extend(stored);
    before.keys().filter(|callback_id| !disabled.contains_key(callback_id)).copied().collect()
}

#[derive(Debug)]
pub(crate) struct CallbackHealth {
    state: RwLock<State>,
    disable_after: DisableAfter,
}

impl CallbackHealth {
    pub(crate) fn new(disable_after: DisableAfter) -> Self {
        Self { state: RwLock::default(), disable_after }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the deliveries of the callback wait, if they do.
    pub(crate) fn hold(&self, callback: &Callback) -> Option<Hold> {
        if !callback.enabled {
            return Some(Hold::Off);
        }
        let state = self.read();
        if state.paused.contains(&callback.callback_id) {
            return Some(Hold::Paused);
        }
        state.disabled.get(&callback.callback_id).map(|reason| Hold::Disabled(reason.clone()))
    }

    /// When the callback's streak of failures started, if it has one.
    pub(crate) fn failing_since(&self, callback_id: ObjectId) -> Option<Timestamp> {
        self.read().streaks.since(callback_id)
    }

    /// Disables a callback in this replica; the others read its row from Postgres. Keep the returned guard until the
    /// record is written.
    pub(crate) fn disable(&self, callback_id: ObjectId, reason: &str) -> Disabling<'_> {
        let mut state = self.write();
        state.disabled.insert(callback_id, reason.into());
        state.disabling.push(callback_id);
        Disabling { health: self, callback_id }
    }

    pub(crate) fn note_success(&self, callback_id: ObjectId, now: Timestamp) {
        // Nearly always there is no streak, and a read lock suffices.
        if self.read().streaks.since(callback_id).is_some() {
            self.write().streaks.note_success(callback_id, now);
        }
    }

    /// Ends the streak of a callback that was removed.
    pub(crate) fn note_removal(&self, callback_id: ObjectId, now: Timestamp) {
        self.note_success(callback_id, now);
    }

    /// Notes a failure. Returns the reason to disable the callback, if it has failed for too long.
    pub(crate) fn note_failure(&self, callback_id: ObjectId, now: Timestamp, error: &str) -> Option<String> {
        let since = self.read().streaks.since(callback_id);
        let since = since.unwrap_or_else(|| self.write().streaks.note_failure(callback_id, now));
        let over = self.disable_after.is_over(since, now);
        over.then(|| format!("nothing but failures since {}; the last: {error}", since.to_iso()))
    }

    /// Synchronizes memory with Postgres. Returns the re-enabled callbacks.
    pub(crate) async fn sync(&self, pool: &Pool) -> Result<Vec<ObjectId>, StoreError> {
        let (written, before) = {
            let state = self.read();
            (state.streaks.clone(), state.recorded_disabled())
        };
        store::health::write_streaks(pool, &written.ended, &written.started).await?;
        let disabled = store::health::disabled_callbacks(pool).await?;
        let paused = store::health::paused_callbacks(pool).await?;
        // Read last: otherwise a callback that is enabled or resumed in between would be called with its old streak.
        let failing = store::health::failing_callbacks(pool).await?;
        let mut state = self.write();
        state.paused = paused;
        state.streaks.merge_rows(&written, failing);
        Ok(merge_disabled(&mut state.disabled, &before, disabled))
    }

    /// Synchronizes until shutdown.
    pub(crate) async fn run(
        &self,
        pool: &Pool,
        limiter: &ConcurrencyLimiter,
        metrics: &Metrics,
        readiness: &Readiness,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let sync = async {
            loop {
                match self.sync(pool).await {
                    Ok(enabled) => {
                        readiness.ready("callbacks");
                        // A re-enabled callback starts with a closed breaker.
                        enabled.into_iter().for_each(|callback_id| limiter.reset_breaker(callback_id));
                    }
                    Err(e) => {
                        tracing::warn!("cannot synchronize the state of callbacks, trying again: {}", error_chain(&e));
                        readiness.not_ready("callbacks", error_chain(&e));
                    }
                }
                limiter.evict_idle();
                {
                    let state = self.read();
                    metrics.callbacks(limiter.open_breakers(), state.disabled.len(), state.paused.len());
                }
                tokio::time::sleep(SYNC_INTERVAL).await;
            }
        };
        tokio::select! {
            () = sync => {}
            () = shutdown.cancelled() => {}
        }
        Ok(())
    }
}

/// A callback that is disabled by a record that is not written yet. Until it is dropped, a synchronization does not
/// enable the callback.
#[derive(Debug)]
#[must_use]
pub(crate) struct Disabling<'a> {
    health: &'a CallbackHealth,
    callback_id: ObjectId,
}

impl Drop for Disabling<'_> {
    fn drop(&mut self) {
        let mut state = self.health.write();
        if let Some(index) = state.disabling.iter().position(|callback_id| *callback_id == self.callback_id) {
            state.disabling.swap_remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: ObjectId = ObjectId::from_bytes([1; 12]);

    const fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(1_768_193_759_000 + seconds * 1000)
    }

    #[test]
    fn off_and_durations_are_parsed_and_printed() {
        assert_eq!(DisableAfter::default().to_string().parse(), Ok(DisableAfter::default()));
        assert_eq!(DisableAfter::default().to_string(), "5days");
        assert_eq!("off".parse(), Ok(DisableAfter(None)));
        for nonsense in ["", "0s", "never", "-1s"] {
            assert!(nonsense.parse::<DisableAfter>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_callback_is_disabled_after_a_long_enough_streak_of_failures() {
        let health = CallbackHealth::new("1h".parse().unwrap());
        assert_eq!(health.note_failure(ID, at(0), "no"), None);
        assert_eq!(health.note_failure(ID, at(3599), "no"), None);
        let reason = health.note_failure(ID, at(3600), "no answer").unwrap();
        assert_eq!(reason, "nothing but failures since 2026-01-12T04:55:59.000Z; the last: no answer");
        health.note_success(ID, at(3601));
        assert_eq!(health.note_failure(ID, at(3602), "no"), None, "a success ends the streak");
        assert_eq!(health.note_failure(ID, at(7201), "no"), None);
        assert!(health.note_failure(ID, at(7202), "no").is_some());
        let never = CallbackHealth::new(DisableAfter(None));
        assert_eq!(never.note_failure(ID, at(0), "no"), None);
        assert_eq!(never.note_failure(ID, at(1_000_000_000), "no"), None);
    }

    #[test]
    fn changes_during_a_synchronization_are_kept() {
        let mut streaks = FailureStreaks::default();
        streaks.note_failure(ID, at(1));
        let written = streaks.clone();
        streaks.note_success(ID, at(2));
        streaks.merge_rows(&written, HashMap::from([(ID, at(1))]));
        assert_eq!(streaks.since(ID), None, "the success came later");
        assert_eq!(streaks.ended, HashMap::from([(ID, at(2))]), "the next synchronization writes it");
        let written = streaks.clone();
        streaks.merge_rows(&written, HashMap::new());
        assert_eq!(streaks, FailureStreaks::default());
        // A row that another replica removed ends the streak.
        streaks.merge_rows(&written, HashMap::from([(ID, at(3))]));
        assert_eq!(streaks.note_failure(ID, at(9)), at(3));
        streaks.merge_rows(&FailureStreaks::default(), HashMap::new());
        assert_eq!(streaks.note_failure(ID, at(9)), at(9));
    }

    #[test]
    fn callbacks_disabled_during_a_synchronization_stay_disabled() {
        let [first, second, third] = [1, 2, 3].map(|n| ObjectId::from_bytes([n; 12]));
        let some = |ids: &[ObjectId]| ids.iter().map(|id| (*id, Arc::<str>::from("gone"))).collect::<HashMap<_, _>>();
        let mut disabled = some(&[first, second, third]);
        // The first was enabled by another replica, the third was disabled here during the read.
        assert_eq!(merge_disabled(&mut disabled, &some(&[first, second]), some(&[second])), [first]);
        assert_eq!(disabled, some(&[second, third]));
        // The third was enabled again before its row was read.
        assert_eq!(merge_disabled(&mut disabled, &some(&[second, third]), some(&[second])), [third]);
        assert_eq!(disabled, some(&[second]));
    }

    #[test]
    fn a_callback_stays_disabled_while_its_disabling_is_recorded() {
        let health = CallbackHealth::new(DisableAfter::default());
        let read_nothing =
            |before: &HashMap<_, _>| merge_disabled(&mut health.write().disabled, before, HashMap::new());
        let first = health.disable(ID, "gone");
        let second = health.disable(ID, "gone");
        drop(first);

        let before = health.read().recorded_disabled();
        drop(second);

        assert_eq!(read_nothing(&before), [], "the record was written after the read");
        assert!(health.read().disabled.contains_key(&ID));
        let before = health.read().recorded_disabled();
        assert_eq!(read_nothing(&before), [ID], "another replica enabled it");
    }

    proptest! {
        /// Against a model of one replica and Postgres.
        #[test]
        fn memory_and_postgres_agree_after_synchronizing(steps in prop::collection::vec(0_u8..4, 0..100)) {
            let mut streaks = FailureStreaks::default();
            let mut postgres = HashMap::<ObjectId, Timestamp>::new();
            let mut since = None;
            for (second, step) in (0..).zip(steps) {
                let now = at(second);
                match step {
                    0 | 1 => {
                        since = since.or(Some(now));
                        prop_assert_eq!(Some(streaks.note_failure(ID, now)), since);
                    }
                    2 => {
                        since = None;
                        streaks.note_success(ID, now);
                    }
                    _ => {
                        let written = streaks.clone();
                        postgres.retain(|id, since| written.ended.get(id).is_none_or(|ended| ended < since));
                        for (id, since) in &written.started {
                            postgres.entry(*id).or_insert(*since);
                        }
                        streaks.merge_rows(&written, postgres.clone());
                        prop_assert_eq!(postgres.get(&ID).copied(), since);
                    }
                }
                prop_assert_eq!(streaks.since(ID), since);
            }
        }
    }
}

//! 7 Deliver, 8 Retry: how callbacks fare over time: who is disabled, and since when who has had nothing but failures.
//!
//! Both stand in Postgres, where all replicas see them and a restart finds them. They are kept in memory and brought
//! together with Postgres every second, set-based: an attempt costs a look at memory, and writes nothing.

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use contract::{ObjectId, Timestamp};
use service_kit::{health::Readiness, nats::error_chain};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{admission::limiter::Slots, metrics::Metrics, store};

/// How often memory and Postgres are brought together. Longer lets more attempts go out to an endpoint that is gone,
/// shorter costs Postgres more of small queries.
const INTERVAL: Duration = Duration::from_secs(1);

/// After how long of nothing but failures a callback is disabled; or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisableAfter(Option<Duration>);

/// Five days: longer than the default retry schedule, so that a delivery's whole schedule has failed before.
impl Default for DisableAfter {
    fn default() -> Self {
        Self(Some(Duration::from_secs(5 * 24 * 60 * 60)))
    }
}

/// Why a text is not a [`DisableAfter`].
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
    /// Whether a callback that has failed since then, and failed again now, is to be disabled.
    fn is_over(self, failing_since: Timestamp, now: Timestamp) -> bool {
        self.0.is_some_and(|after| failing_since.plus(after) <= now)
    }
}

/// Since when callbacks have had nothing but failures: what Postgres knows, and what it is to be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Streaks {
    stored: HashMap<ObjectId, Timestamp>,
    begun: HashMap<ObjectId, Timestamp>,
    ended: HashMap<ObjectId, Timestamp>,
}

impl Streaks {
    /// Since when the callback fails.
    fn since(&self, callback_id: ObjectId) -> Option<Timestamp> {
        self.stored.get(&callback_id).or(self.begun.get(&callback_id)).copied()
    }

    /// Notes a failure. Returns since when the callback fails.
    fn failed(&mut self, callback_id: ObjectId, at: Timestamp) -> Timestamp {
        match self.since(callback_id) {
            Some(since) => since,
            None => *self.begun.entry(callback_id).or_insert(at),
        }
    }

    /// Notes a success.
    fn succeeded(&mut self, callback_id: ObjectId, at: Timestamp) {
        if self.stored.remove(&callback_id).is_some() | self.begun.remove(&callback_id).is_some() {
            self.ended.insert(callback_id, at);
        }
    }

    /// Takes over what Postgres knows after it was told `told`; what was noted meanwhile is kept.
    fn synced(&mut self, told: &Self, stored: HashMap<ObjectId, Timestamp>) {
        self.begun.retain(|id, since| told.begun.get(id) != Some(since));
        self.ended.retain(|id, at| told.ended.get(id) != Some(at));
        self.stored = stored;
        self.stored.retain(|id, since| self.ended.get(id).is_none_or(|ended| ended < since));
    }
}

#[derive(Debug, Default)]
struct State {
    disabled: HashMap<ObjectId, Arc<str>>,
    streaks: Streaks,
}

/// Takes over who is disabled by what Postgres knows, which was asked when `known` were; returns who is not any more. Who was disabled
/// meanwhile stays so: that is recorded with the attempt that was the reason.
fn take_over(
    disabled: &mut HashMap<ObjectId, Arc<str>>,
    known: &HashMap<ObjectId, Arc<str>>,
    stored: HashMap<ObjectId, Arc<str>>,
) -> Vec<ObjectId> {
    disabled.retain(|callback_id, _| !known.contains_key(callback_id));
    disabled.extend(stored);
    known.keys().filter(|callback_id| !disabled.contains_key(callback_id)).copied().collect()
}

/// How callbacks fare.
#[derive(Debug)]
pub(crate) struct Health {
    state: RwLock<State>,
    disable_after: DisableAfter,
}

impl Health {
    /// Nothing is known yet.
    pub(crate) fn new(disable_after: DisableAfter) -> Self {
        Self { state: RwLock::default(), disable_after }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why this callback gets nothing, if it is disabled.
    pub(crate) fn disabled(&self, callback_id: ObjectId) -> Option<String> {
        self.read().disabled.get(&callback_id).map(|reason| format!("the callback is disabled: {reason}"))
    }

    /// Since when the callback has had nothing but failures, if it has.
    pub(crate) fn failing_since(&self, callback_id: ObjectId) -> Option<Timestamp> {
        self.read().streaks.since(callback_id)
    }

    /// Disables a callback here and now; the other replicas read it from Postgres.
    pub(crate) fn disable(&self, callback_id: ObjectId, reason: &str) {
        self.write().disabled.insert(callback_id, reason.into());
    }

    /// Notes that the endpoint took a delivery.
    pub(crate) fn succeeded(&self, callback_id: ObjectId, now: Timestamp) {
        // Nearly always there is nothing to note.
        if self.read().streaks.since(callback_id).is_some() {
            self.write().streaks.succeeded(callback_id, now);
        }
    }

    /// Notes that an attempt failed. Returns why the callback is to be disabled, if it is.
    pub(crate) fn failed(&self, callback_id: ObjectId, now: Timestamp, error: &str) -> Option<String> {
        let known = self.read().streaks.since(callback_id);
        let since = known.unwrap_or_else(|| self.write().streaks.failed(callback_id, now));
        let over = self.disable_after.is_over(since, now);
        over.then(|| format!("nothing but failures since {}; the last: {error}", since.to_iso()))
    }

    /// Brings memory and Postgres together. Returns who is not disabled any more.
    pub(crate) async fn sync(&self, pool: &PgPool) -> sqlx::Result<Vec<ObjectId>> {
        let (told, known) = {
            let state = self.read();
            (state.streaks.clone(), state.disabled.clone())
        };
        store::health::tell(pool, &told.ended, &told.begun).await?;
        let failing = store::health::failing_callbacks(pool).await?;
        let disabled = store::health::disabled_callbacks(pool).await?;
        let mut state = self.write();
        state.streaks.synced(&told, failing);
        Ok(take_over(&mut state.disabled, &known, disabled))
    }

    /// Keeps memory and Postgres together until shutdown, whichever replica changed something.
    pub(crate) async fn follow(
        &self,
        pool: &PgPool,
        slots: &Slots,
        metrics: &Metrics,
        readiness: &Readiness,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let follow = async {
            loop {
                match self.sync(pool).await {
                    Ok(enabled) => {
                        readiness.ready("postgres");
                        // Enabling is a fresh start.
                        enabled.into_iter().for_each(|callback_id| slots.forgive(callback_id));
                    }
                    Err(e) => {
                        tracing::warn!("cannot read how callbacks fare: {}", error_chain(&e));
                        readiness.not_ready("postgres", error_chain(&e));
                    }
                }
                metrics.callbacks(slots.tidy(), self.read().disabled.len());
                tokio::time::sleep(INTERVAL).await;
            }
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.cancelled() => {}
        }
        Ok(())
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
    fn off_and_durations_are_read_and_written() {
        assert_eq!(DisableAfter::default().to_string().parse(), Ok(DisableAfter::default()));
        assert_eq!(DisableAfter::default().to_string(), "5days");
        assert_eq!("off".parse(), Ok(DisableAfter(None)));
        for nonsense in ["", "0s", "never", "-1s"] {
            assert!(nonsense.parse::<DisableAfter>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_callback_is_disabled_after_nothing_but_failures_for_long_enough() {
        let health = Health::new("1h".parse().unwrap());
        assert_eq!(health.failed(ID, at(0), "no"), None);
        assert_eq!(health.failed(ID, at(3599), "no"), None);
        let reason = health.failed(ID, at(3600), "no answer").unwrap();
        assert_eq!(reason, "nothing but failures since 2026-01-12T04:55:59.000Z; the last: no answer");
        health.succeeded(ID, at(3601));
        assert_eq!(health.failed(ID, at(3602), "no"), None, "a success begins anew");
        assert_eq!(health.failed(ID, at(7201), "no"), None);
        assert!(health.failed(ID, at(7202), "no").is_some());
        let never = Health::new(DisableAfter(None));
        assert_eq!(never.failed(ID, at(0), "no"), None);
        assert_eq!(never.failed(ID, at(1_000_000_000), "no"), None);
    }

    #[test]
    fn what_is_noted_while_postgres_is_told_is_kept() {
        let mut streaks = Streaks::default();
        streaks.failed(ID, at(1));
        let told = streaks.clone();
        streaks.succeeded(ID, at(2));
        streaks.synced(&told, HashMap::from([(ID, at(1))]));
        assert_eq!(streaks.since(ID), None, "it has succeeded since");
        assert_eq!(streaks.ended, HashMap::from([(ID, at(2))]), "and Postgres is told next time");
        let told = streaks.clone();
        streaks.synced(&told, HashMap::new());
        assert_eq!(streaks, Streaks::default());
        // Another replica saw a success: what is not in Postgres any more has ended.
        streaks.synced(&told, HashMap::from([(ID, at(3))]));
        assert_eq!(streaks.failed(ID, at(9)), at(3));
        streaks.synced(&Streaks::default(), HashMap::new());
        assert_eq!(streaks.failed(ID, at(9)), at(9));
    }

    #[test]
    fn who_is_disabled_while_postgres_is_asked_stays_disabled() {
        let [first, second, third] = [1, 2, 3].map(|n| ObjectId::from_bytes([n; 12]));
        let some = |ids: &[ObjectId]| ids.iter().map(|id| (*id, Arc::<str>::from("gone"))).collect::<HashMap<_, _>>();
        let mut disabled = some(&[first, second, third]);
        // The first was enabled by another replica, the third was disabled here after the question.
        assert_eq!(take_over(&mut disabled, &some(&[first, second]), some(&[second])), [first]);
        assert_eq!(disabled, some(&[second, third]));
        // Next time Postgres knows of it, or it was enabled at once.
        assert_eq!(take_over(&mut disabled, &some(&[second, third]), some(&[second])), [third]);
        assert_eq!(disabled, some(&[second]));
    }

    proptest! {
        /// Against a model of one replica and Postgres: whenever they were just brought together, both know since when
        /// the callback has had nothing but failures.
        #[test]
        fn memory_and_postgres_agree(steps in prop::collection::vec(0_u8..4, 0..100)) {
            let mut streaks = Streaks::default();
            let mut postgres = HashMap::<ObjectId, Timestamp>::new();
            let mut since = None;
            for (second, step) in (0..).zip(steps) {
                let now = at(second);
                match step {
                    0 | 1 => {
                        since = since.or(Some(now));
                        prop_assert_eq!(Some(streaks.failed(ID, now)), since);
                    }
                    2 => {
                        since = None;
                        streaks.succeeded(ID, now);
                    }
                    _ => {
                        let told = streaks.clone();
                        postgres.retain(|id, since| told.ended.get(id).is_none_or(|ended| ended < since));
                        for (id, since) in &told.begun {
                            postgres.entry(*id).or_insert(*since);
                        }
                        streaks.synced(&told, postgres.clone());
                        prop_assert_eq!(postgres.get(&ID).copied(), since);
                    }
                }
                prop_assert_eq!(streaks.since(ID), since);
            }
        }
    }
}

//! 1 Accept: a budget of work per project: the bytes that lead-state and webhook-notifier read, merge, store and send
//! for its updates. A rate of requests cannot bound them: an update of 60 bytes to a lead of 1 MB moves several MB.
//!
//! An update is charged when it is admitted, with the recent cost of the project's updates. lead-state reports the work
//! of each batch ([`contract::work`]), which corrects the charge. Every gateway receives all reports, so the budget
//! holds for all gateways together.
//!
//! Reads have a separate budget at each gateway, so that a client can read the outcomes of updates that used up the
//! first budget.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use contract::{
    ObjectId,
    work::{Work, WorkReport},
};

/// How much work may be saved up. Longer allows larger bursts, which delay other projects.
const WINDOW: Duration = Duration::from_secs(1);
/// How many updates of unknown cost a project may send at first. More let a project start faster, but may be expensive.
const UNKNOWN_UPDATES: f64 = 64.0;
/// The factor by which the estimated cost falls with each report of a lower cost. So the estimate for a project with
/// cheap and expensive updates follows the expensive ones.
const DECAY: f64 = 0.9;
/// How long an idle project is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(crate) struct WorkBudget {
    /// Bytes per second. None: no limit.
    rate: Option<f64>,
    accounts: Mutex<HashMap<ObjectId, Account>>,
}

/// The budget of a project.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Account {
    /// The bytes left. Negative after work that cost more than was left.
    bytes: f64,
    at: Instant,
    /// The recent cost of an update.
    cost: Option<f64>,
    /// The bytes that were charged by estimate and are not reported yet.
    estimated: f64,
}

impl Account {
    fn full(rate: f64, now: Instant) -> Self {
        Self { bytes: rate * WINDOW.as_secs_f64(), at: now, cost: None, estimated: 0.0 }
    }

    /// Adds the bytes that were earned since the last call. Returns the bytes left.
    fn earn(&mut self, rate: f64, now: Instant) -> f64 {
        let earned = rate * now.saturating_duration_since(self.at).as_secs_f64();
        self.bytes = (self.bytes + earned).min(rate * WINDOW.as_secs_f64());
        self.at = self.at.max(now);
        self.bytes
    }

    /// The estimated cost of an update.
    fn cost(&self, rate: f64) -> f64 {
        self.cost.unwrap_or(rate * WINDOW.as_secs_f64() / UNKNOWN_UPDATES).max(1.0)
    }

    /// The charge for updates that are admitted together: at most a whole budget, because the estimate may be wrong.
    fn estimate(&self, rate: f64, updates: usize) -> f64 {
        (self.cost(rate) * updates as f64).min(rate * WINDOW.as_secs_f64())
    }

    /// Charges updates by estimate.
    fn charge(&mut self, rate: f64, updates: usize) {
        let estimate = self.estimate(rate, updates);
        self.bytes -= estimate;
        self.estimated += estimate;
    }

    /// Takes back an estimate, at most the bytes that were charged here.
    fn release(&mut self, estimate: f64) {
        let estimate = estimate.min(self.estimated);
        self.estimated -= estimate;
        self.bytes += estimate;
    }

    /// Replaces estimates by the reported cost of updates.
    fn correct(&mut self, rate: f64, work: Work, now: Instant) {
        self.earn(rate, now);
        // Other gateways' updates were not charged here.
        self.release(self.cost(rate) * work.updates as f64);
        self.bytes -= work.bytes as f64;
        let cost = work.bytes as f64 / work.updates.max(1) as f64;
        self.cost = Some(cost.max(self.cost.unwrap_or_default() * DECAY));
    }
}

impl WorkBudget {
    /// Each project may spend this many bytes per second; 0 means no limit.
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { rate: (bytes_per_second > 0).then_some(bytes_per_second as f64), accounts: Mutex::default() }
    }

    /// Admits updates of a project and charges them by estimate; or returns how long to wait. One update may cost more
    /// than is left: the next one then waits.
    pub(crate) fn admit(&self, project_id: ObjectId, updates: usize, now: Instant) -> Result<(), Duration> {
        self.with(project_id, now, Ok(()), |rate, account| {
            let left = account.earn(rate, now);
            if left <= 0.0 {
                return Err(Duration::from_secs_f64((1.0 - left) / rate));
            }
            account.charge(rate, updates);
            Ok(())
        })
    }

    /// Takes back the charge for admitted updates that cause no work: they were refused, or in the log before.
    pub(crate) fn take_back(&self, project_id: ObjectId, updates: usize, now: Instant) {
        if updates > 0 {
            self.with(project_id, now, (), |rate, account| {
                account.earn(rate, now);
                account.release(account.estimate(rate, updates));
                account.bytes = account.bytes.min(rate * WINDOW.as_secs_f64());
            });
        }
    }

    /// Admits a read, whose cost is known only after it ([`spend`](Self::spend)); or returns how long to wait.
    pub(crate) fn admit_read(&self, project_id: ObjectId, now: Instant) -> Result<(), Duration> {
        self.admit(project_id, 0, now)
    }

    /// Charges work that was done for a project.
    pub(crate) fn spend(&self, project_id: ObjectId, bytes: u64, now: Instant) {
        self.with(project_id, now, (), |rate, account| {
            account.earn(rate, now);
            account.bytes -= bytes as f64;
        });
    }

    /// How many updates the project can afford now; at least one.
    pub(crate) fn affordable(&self, project_id: ObjectId, now: Instant) -> usize {
        self.with(project_id, now, usize::MAX, |rate, account| {
            // The cast saturates.
            ((account.earn(rate, now) / account.cost(rate)) as usize).max(1)
        })
    }

    /// Charges the work that lead-state reports.
    pub(crate) fn correct(&self, report: &WorkReport, now: Instant) {
        for (project_id, work) in &report.projects {
            self.with(*project_id, now, (), |rate, account| account.correct(rate, *work, now));
        }
    }

    pub(crate) fn evict_idle(&self, now: Instant) {
        self.lock().retain(|_, account| now.saturating_duration_since(account.at) < REMEMBERED);
    }

    /// Applies a function to the project's account; without a rate, returns `unlimited`.
    fn with<R>(
        &self,
        project_id: ObjectId,
        now: Instant,
        unlimited: R,
        apply: impl FnOnce(f64, &mut Account) -> R,
    ) -> R {
        let Some(rate) = self.rate else { return unlimited };
        apply(rate, self.lock().entry(project_id).or_insert_with(|| Account::full(rate, now)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ObjectId, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAVY: ObjectId = ObjectId::from_bytes([1; 12]);
    const OTHER: ObjectId = ObjectId::from_bytes([2; 12]);
    const MIB: u64 = 1 << 20;

    fn report(project_id: ObjectId, updates: u64, bytes: u64) -> WorkReport {
        WorkReport { projects: [(project_id, Work { updates, bytes })].into() }
    }

    /// How many updates are admitted one after the other.
    fn admitted(budget: &WorkBudget, project_id: ObjectId, now: Instant) -> usize {
        (0..1000).take_while(|_| budget.admit(project_id, 1, now).is_ok()).count()
    }

    #[test]
    fn a_project_spends_its_rate_and_no_more() {
        let (budget, start) = (WorkBudget::new(32 * MIB), Instant::now());
        let after = |seconds| start + Duration::from_secs_f64(seconds);
        assert_eq!(admitted(&budget, HEAVY, start), 64, "nothing is known about it");
        assert_eq!(admitted(&budget, OTHER, start), 64);

        // They cost 4 MiB each: eight times the budget.
        budget.correct(&report(HEAVY, 64, 64 * 4 * MIB), start);
        assert_eq!(budget.admit(HEAVY, 1, after(6.0)).unwrap_err().as_secs(), 1);
        assert_eq!(admitted(&budget, HEAVY, after(6.9)), 0);
        assert_eq!(admitted(&budget, HEAVY, after(7.2)), 2, "one is paid for, one on credit");
        assert_eq!(budget.affordable(HEAVY, after(60.0)), 8, "a second's work is saved up");
        assert_eq!(admitted(&budget, HEAVY, after(60.0)), 8);
    }

    #[test]
    fn an_estimate_is_replaced_by_the_report() {
        let (budget, now) = (WorkBudget::new(32 * MIB), Instant::now());
        budget.admit(HEAVY, 500, now).unwrap();
        assert!(budget.admit(HEAVY, 1, now).is_err());
        budget.correct(&report(HEAVY, 500, 500 * 4096), now);
        assert!(budget.affordable(HEAVY, now) > 7000, "{:?}", budget.lock());
        // A report of another gateway's updates gives nothing back.
        budget.correct(&report(HEAVY, 1000, 1000 * 4096), now);
        assert!(budget.affordable(HEAVY, now) < 7000);

        // A cost rises at once and falls slowly.
        budget.correct(&report(HEAVY, 1, MIB), now);
        budget.correct(&report(HEAVY, 1, 4096), now);
        assert!((20..40).contains(&budget.affordable(HEAVY, now)));
    }

    #[test]
    fn updates_that_were_refused_later_cost_nothing() {
        let (budget, now) = (WorkBudget::new(32 * MIB), Instant::now());
        for _ in 0..1000 {
            budget.admit(HEAVY, 1, now).unwrap();
            budget.take_back(HEAVY, 1, now);
        }
        assert_eq!(budget.lock()[&HEAVY].estimated, 0.0);
        assert_eq!(admitted(&budget, HEAVY, now), 64);
        budget.take_back(OTHER, 10, now);
        assert_eq!(admitted(&budget, OTHER, now), 64, "nothing was charged");
        budget.admit(HEAVY, 1000, now + 2 * WINDOW).unwrap();
        budget.take_back(HEAVY, 1000, now + 2 * WINDOW);
        assert_eq!(budget.lock()[&HEAVY].estimated, 32.0 * MIB as f64, "what the 64 were charged stays");
    }

    #[test]
    fn reads_spend_what_they_answer() {
        let (budget, start) = (WorkBudget::new(MIB), Instant::now());
        for _ in 0..3 {
            budget.admit_read(HEAVY, start).unwrap();
            budget.spend(HEAVY, MIB / 2 - 1, start);
        }
        assert_eq!(budget.admit_read(HEAVY, start).unwrap_err().as_millis(), 499);
        budget.admit_read(OTHER, start).unwrap();
        budget.admit_read(HEAVY, start + Duration::from_millis(501)).unwrap();
    }

    #[test]
    fn without_a_rate_there_is_no_limit_and_nothing_is_kept() {
        let (budget, now) = (WorkBudget::new(0), Instant::now());
        budget.correct(&report(HEAVY, 1, u64::MAX), now);
        assert_eq!((budget.admit(HEAVY, 1, now), budget.affordable(HEAVY, now)), (Ok(()), usize::MAX));
        assert!(budget.lock().is_empty());

        let budget = WorkBudget::new(MIB);
        budget.correct(&report(HEAVY, 1, 1), now);
        budget.evict_idle(now + REMEMBERED);
        assert!(budget.lock().is_empty());
    }

    proptest! {
        #[test]
        fn over_time_no_more_is_spent_than_the_rate_and_one_burst(
            costs in prop::collection::vec(1_u64..4 * MIB, 1..50), gaps in prop::collection::vec(0_u64..500, 50),
        ) {
            let (budget, start) = (WorkBudget::new(MIB), Instant::now());
            let (mut now, mut spent, mut largest) = (start, 0, 0);
            for (cost, gap) in costs.iter().zip(gaps) {
                now += Duration::from_millis(gap);
                if budget.admit(HEAVY, 1, now).is_ok() {
                    budget.correct(&report(HEAVY, 1, *cost), now);
                    spent += cost;
                    largest = largest.max(*cost);
                }
            }
            let earned = (MIB as f64) * (1.0 + (now - start).as_secs_f64());
            prop_assert!(spent as f64 <= earned + largest as f64 + 1.0);
        }
    }
}

//! 1 Accept: limits each project's unapplied work, so that a project that sends faster than lead-state applies delays
//! only its own commands.
//!
//! lead-state applies the log in order, so a command waits for every command that was published before it. The gateway
//! therefore bounds each project's backlog when it accepts commands, over HTTP and NATS alike. A project's unapplied
//! work is the work that this gateway has published after the last sequence that lead-state reported as applied. A
//! command of a project over the bound waits for a while, and is then refused.
//!
//! While nothing is applied, for example because Postgres is unavailable, commands accumulate in the log. The bound is
//! then a share of the log, so that no project fills it for the others.

use std::{
    collections::{HashMap, VecDeque},
    ops::{AddAssign, SubAssign},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use contract::{ObjectId, position::LogPosition};
use tokio::sync::Notify;

use crate::error::ApiError;

/// Most unapplied commands of a project at this gateway. More delay other projects; fewer slow down a project that
/// sends a lot, because lead-state reports its progress once per batch.
const MAX_COMMANDS: usize = 512;
/// Most bytes of unapplied commands of a project.
const MAX_BYTES: usize = 1 << 20;
/// While nothing is applied, a project may fill one part in this many of the log.
const LOG_SHARE: u64 = 4;
/// After this long without progress, lead-state counts as stalled. Shorter mistakes a slow batch for an outage.
const STALLED_AFTER: Duration = Duration::from_secs(2);
/// How long one command waits for admission: longer than [`STALLED_AFTER`], so that no command is refused because an
/// outage has just begun, and shorter than the timeout of JetStream clients.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// Most waiting requests of a project. Waiting slows down clients that send one request after the other, instead of
/// refusing them.
const MAX_WAITING: usize = 1024;
/// Most bytes of waiting requests of a project, not counting the last one; and, while nothing is applied, most bytes of
/// a project that are admitted and not published yet, which accumulate while the log has no leader.
const MAX_WAITING_BYTES: usize = 8 << 20;
/// Most marks per project. With fewer, work counts longer: a mark counts until its last command is applied.
const MAX_MARKS: usize = 64;
/// Bytes of a message in the log in addition to its payload.
const OVERHEAD: usize = 256;

/// Commands and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Work {
    commands: usize,
    bytes: usize,
}

impl Work {
    /// The work of commands with these payloads.
    pub(crate) fn of<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Self {
        payloads.into_iter().fold(Self::default(), |mut work, payload| {
            work += Self { commands: 1, bytes: payload.len() + OVERHEAD };
            work
        })
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.commands += other.commands;
        self.bytes += other.bytes;
    }
}

impl SubAssign for Work {
    fn sub_assign(&mut self, other: Self) {
        self.commands -= other.commands;
        self.bytes -= other.bytes;
    }
}

#[derive(Debug, Default)]
pub(crate) struct Admission {
    state: Mutex<State>,
    /// Notified when work was applied, or when admitted work was not published.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    applied: LogPosition,
    /// When work was last applied, or when the first project got unapplied work.
    progress_at: Option<Instant>,
    /// The limit of the log, in bytes. None until it is known, or if there is none.
    log_bytes: Option<u64>,
    /// Projects with unapplied work or waiting requests.
    projects: HashMap<ObjectId, Backlog>,
}

#[derive(Debug, Default)]
struct Backlog {
    /// All unapplied work, published or admitted.
    work: Work,
    /// The bytes of admitted work that is not published yet.
    unpublished_bytes: usize,
    /// Published work, each part with the last sequence of its commands, ascending.
    marks: VecDeque<(u64, Work)>,
    /// Requests that wait, and the bytes that they hold.
    waiting: usize,
    waiting_bytes: usize,
}

impl State {
    fn change(&mut self, project_id: ObjectId, change: impl FnOnce(&mut Backlog)) {
        if let Some(backlog) = self.projects.get_mut(&project_id) {
            change(backlog);
            if backlog.is_idle() {
                self.projects.remove(&project_id);
            }
        }
    }
}

impl Backlog {
    fn is_idle(&self) -> bool {
        self.work == Work::default() && self.waiting == 0
    }
}

impl Admission {
    /// Sets the size of the log, which bounds backlogs while nothing is applied.
    pub(crate) fn set_log_bytes(&self, max_bytes: i64) {
        self.lock().log_bytes = u64::try_from(max_bytes).ok().filter(|bytes| *bytes > 0);
    }

    /// Waits until the project may publish more. The work counts until it is applied, or until the result is dropped
    /// without [`Admitted::published`].
    ///
    /// # Errors
    /// The project's backlog is still too long after `patience`.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        project_id: ObjectId,
        work: Work,
        patience: Duration,
    ) -> Result<Admitted, ApiError> {
        if let Some(admitted) = self.try_admit(project_id, work) {
            return Ok(admitted);
        }
        let _waiting = self.wait_in(project_id, work.bytes)?;
        let admitted = async {
            loop {
                let mut changed = pin!(self.changed.notified());
                // Before the check, so that no change is missed.
                changed.as_mut().enable();
                if let Some(admitted) = self.try_admit(project_id, work) {
                    return admitted;
                }
                // Also without a notification: after [`STALLED_AFTER`] without progress, another bound applies.
                let _ = tokio::time::timeout(STALLED_AFTER / 4, changed).await;
            }
        };
        tokio::time::timeout(patience, admitted).await.map_err(|_| ApiError::ProjectBacklog)
    }

    /// Records how far lead-state has applied the log.
    pub(crate) fn record_applied(&self, applied: LogPosition) {
        {
            let mut state = self.lock();
            // Reports of an old and a new leader may cross.
            if state.applied >= applied {
                return;
            }
            // In a new log, the sequences of the old one have no meaning, and its lost commands will never be applied.
            let is_other_log = ![0, applied.epoch].contains(&state.applied.epoch);
            let up_to = if is_other_log { u64::MAX } else { applied.sequence };
            state.applied = applied;
            state.progress_at = Some(Instant::now());
            for backlog in state.projects.values_mut() {
                backlog.forget_up_to(up_to);
            }
            state.projects.retain(|_, backlog| !backlog.is_idle());
        }
        self.changed.notify_waiters();
    }

    fn try_admit(self: &Arc<Self>, project_id: ObjectId, work: Work) -> Option<Admitted> {
        let mut state = self.lock();
        let now = Instant::now();
        if state.projects.is_empty() {
            state.progress_at = Some(now);
        }
        let stalled = state.progress_at.is_some_and(|at| now.duration_since(at) > STALLED_AFTER);
        let log_share = state.log_bytes.map_or(usize::MAX, |bytes| MAX_BYTES.max((bytes / LOG_SHARE) as usize));
        let backlog = state.projects.entry(project_id).or_default();
        // A project under the bound may exceed it once, so that work of any size is admitted eventually.
        let admits = match stalled {
            false => backlog.work.commands < MAX_COMMANDS && backlog.work.bytes < MAX_BYTES,
            true => backlog.work.bytes < log_share && backlog.unpublished_bytes < MAX_WAITING_BYTES,
        };
        if !admits {
            return None;
        }
        backlog.work += work;
        backlog.unpublished_bytes += work.bytes;
        Some(Admitted { admission: self.clone(), project_id, work })
    }

    /// Counts a request of the project as waiting, with the bytes that it holds, until the result is dropped.
    ///
    /// # Errors
    /// Too many requests of the project wait.
    pub(crate) fn wait_in(&self, project_id: ObjectId, bytes: usize) -> Result<Waiting<'_>, ApiError> {
        let mut state = self.lock();
        let backlog = state.projects.entry(project_id).or_default();
        if backlog.waiting >= MAX_WAITING || backlog.waiting_bytes >= MAX_WAITING_BYTES {
            return Err(ApiError::ProjectBacklog);
        }
        backlog.waiting += 1;
        backlog.waiting_bytes += bytes;
        Ok(Waiting { admission: self, project_id, bytes })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backlog {
    fn forget_up_to(&mut self, sequence: u64) {
        while let Some((_, work)) = self.marks.pop_front_if(|(last, _)| *last <= sequence) {
            self.work -= work;
        }
    }

    /// Records work that is published up to this sequence.
    fn mark(&mut self, sequence: u64, work: Work) {
        let full = self.marks.len() >= MAX_MARKS;
        match self.marks.back_mut() {
            Some((last, marked)) if full || *last >= sequence => {
                *last = sequence.max(*last);
                *marked += work;
            }
            _ => self.marks.push_back((sequence, work)),
        }
    }
}

/// A request that waits for admission, or for the record of its idempotency key.
pub(crate) struct Waiting<'a> {
    admission: &'a Admission,
    project_id: ObjectId,
    bytes: usize,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.admission.lock().change(self.project_id, |backlog| {
            backlog.waiting -= 1;
            backlog.waiting_bytes -= self.bytes;
        });
    }
}

/// Work that may be published. If it is dropped before [`published`](Self::published), it no longer counts.
#[derive(Debug)]
pub(crate) struct Admitted {
    admission: Arc<Admission>,
    project_id: ObjectId,
    work: Work,
}

impl Admitted {
    /// Counts the work until the log is applied up to this sequence. None means that nothing is known to be published:
    /// the work no longer counts.
    pub(crate) fn published(mut self, last: Option<u64>) {
        let Some(last) = last else { return };
        let mut state = self.admission.lock();
        if last <= state.applied.sequence {
            return;
        }
        if let Some(backlog) = state.projects.get_mut(&self.project_id) {
            backlog.unpublished_bytes -= self.work.bytes;
            backlog.mark(last, std::mem::take(&mut self.work));
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.work == Work::default() {
            return;
        }
        self.admission.lock().change(self.project_id, |backlog| {
            backlog.work -= self.work;
            backlog.unpublished_bytes -= self.work.bytes;
        });
        self.admission.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOODING: ObjectId = ObjectId::from_bytes([1; 12]);
    const OTHER: ObjectId = ObjectId::from_bytes([2; 12]);
    const SOON: Duration = Duration::from_millis(20);

    fn one() -> Work {
        Work::of([&b"{}"[..]])
    }

    async fn admit(admission: &Arc<Admission>, project_id: ObjectId) -> Result<Admitted, ApiError> {
        admission.admit(project_id, one(), SOON).await
    }

    /// An admission in which [`FLOODING`] has published the most that it may, from sequence 1 on.
    async fn flooded() -> Arc<Admission> {
        let admission = Arc::<Admission>::default();
        for sequence in 1..=MAX_COMMANDS as u64 {
            admit(&admission, FLOODING).await.unwrap().published(Some(sequence));
        }
        admission
    }

    #[tokio::test]
    async fn a_project_with_much_unapplied_work_waits_and_others_do_not() {
        let admission = flooded().await;
        assert_eq!(admit(&admission, FLOODING).await.unwrap_err(), ApiError::ProjectBacklog);
        assert!(admit(&admission, OTHER).await.is_ok());

        let waiting = tokio::spawn({
            let admission = admission.clone();
            async move { admission.admit(FLOODING, one(), PATIENCE).await }
        });
        tokio::task::yield_now().await;
        admission.record_applied(LogPosition::message(1, 300));

        waiting.await.unwrap().unwrap().published(Some(600));
        assert!(admit(&admission, FLOODING).await.is_ok());
    }

    #[tokio::test]
    async fn work_that_is_applied_or_not_published_is_forgotten() {
        let admission = flooded().await;
        admission.record_applied(LogPosition::message(1, MAX_COMMANDS as u64));
        assert!(admission.lock().projects.is_empty());

        drop(admit(&admission, FLOODING).await.unwrap());
        admit(&admission, FLOODING).await.unwrap().published(None);
        // lead-state reported sequence 7 as applied before its ack arrived.
        admit(&admission, FLOODING).await.unwrap().published(Some(7));
        assert!(admission.lock().projects.is_empty());
        assert_eq!(admit(&admission, FLOODING).await.map(drop), Ok(()));
    }

    #[tokio::test]
    async fn another_log_starts_without_unapplied_work() {
        let admission = flooded().await;
        admission.record_applied(LogPosition::message(1, 100));

        admission.record_applied(LogPosition::message(2, 3));

        assert!(admission.lock().projects.is_empty());
    }

    #[tokio::test]
    async fn while_nothing_is_applied_a_project_may_fill_its_share_of_the_log() {
        let admission = flooded().await;
        admission.set_log_bytes(8 << 20);
        admission.lock().progress_at = Instant::now().checked_sub(STALLED_AFTER * 2);

        let mut sequence = MAX_COMMANDS as u64;
        while let Ok(more) = admit(&admission, FLOODING).await {
            sequence += 1;
            more.published(Some(sequence));
        }

        let bytes = admission.lock().projects[&FLOODING].work.bytes;
        assert!((2 << 20..(2 << 20) + 1024).contains(&bytes), "{bytes}");
        assert!(admit(&admission, OTHER).await.is_ok());
    }

    #[tokio::test]
    async fn while_the_log_has_no_leader_a_project_holds_few_bytes() {
        let admission = Arc::<Admission>::default();
        let large = Work { commands: 1, bytes: MAX_WAITING_BYTES / 4 };
        admission.lock().progress_at = Instant::now().checked_sub(STALLED_AFTER * 2);
        // Without a known project, the first admission would restart the time without progress.
        let _waiting = admission.wait_in(FLOODING, 0).unwrap();

        let admitted: Vec<_> = (0..4).map(|_| admission.try_admit(FLOODING, large).unwrap()).collect();

        assert!(admission.try_admit(FLOODING, one()).is_none());
        assert!(admission.try_admit(OTHER, one()).is_some());
        drop(admitted);
        assert!(admission.try_admit(FLOODING, one()).is_some());
    }

    #[tokio::test]
    async fn few_requests_of_a_project_wait() {
        let admission = flooded().await;
        for (most, bytes) in [(MAX_WAITING, 100), (8, MAX_WAITING_BYTES / 8)] {
            let waiting: Vec<_> = (0..most).map(|_| admission.wait_in(FLOODING, bytes).unwrap()).collect();
            assert!(admission.wait_in(FLOODING, bytes).is_err());
            assert!(admission.wait_in(OTHER, bytes).is_ok());
            drop(waiting);
            assert!(admission.wait_in(FLOODING, bytes).is_ok());
        }
    }

    #[test]
    fn marks_are_bounded_and_count_all_work() {
        let mut backlog = Backlog::default();
        for sequence in (1..=1000).rev().chain(2000..3000) {
            backlog.work += one();
            backlog.mark(sequence, one());
        }
        assert!(backlog.marks.len() <= MAX_MARKS);
        backlog.forget_up_to(1000);
        assert_eq!(backlog.work.commands, 1000);
        backlog.forget_up_to(2999);
        assert!(backlog.is_idle());
    }
}

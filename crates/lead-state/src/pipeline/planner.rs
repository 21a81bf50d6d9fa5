//! 4 Decide: plans batches. Each plan builds on the plans before it, whether or not they are written yet.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use contract::{ObjectId, Timestamp, position::LogPosition};
use service_kit::{clock, postgres::Pool};

use super::prefetch::{ParsedBatch, PrefetchedRows};
use crate::{
    cache::SharedCache,
    core::{
        batch::{BatchState, LeadKeys, Plan, decide_batch},
        decide::{Limits, queue_outcome_bytes},
        entry::{DeadLetter, Entry},
    },
    store::{StoreError, batch_state, ledger, queued_updates, rules::RulesCache},
};

/// Maximum number of erasures in a batch. Each may rewrite a thousand rows of the ledger, and all projects wait for it.
const MAX_ERASURES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the batch exceeds the memory limit of a batch, or has too many erasures")]
    TooLarge,
}

pub(crate) struct Planner {
    pub(crate) pool: Pool,
    pub(crate) limits: Limits,
    /// Whether the ledger is searched for a batch's updates before it is decided. Stays on while there are duplicates.
    pub(crate) check_duplicates: bool,
    /// Number of queued updates. While there are any, each batch is searched for duplicates of them.
    pub(crate) queued: u64,
    pub(crate) cache: Arc<SharedCache>,
    pub(crate) rules: RulesCache,
}

/// A decided batch.
#[derive(Debug)]
pub(crate) struct PlannedBatch {
    pub(crate) plan: Plan,
    /// The position of the last entry.
    pub(crate) last: LogPosition,
    /// When the log stored the last entry.
    pub(crate) logged_at: Timestamp,
    /// Whether the last entry is the last of its message.
    pub(crate) ends_message: bool,
    /// The timestamp of the outcomes.
    pub(crate) applied_at: Timestamp,
    /// How many entries it decides.
    pub(crate) count: usize,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// The processes whose rules the decisions depend on, with the revisions of the rules.
    pub(crate) revisions: Vec<(ObjectId, i64)>,
    /// How long planning took.
    pub(crate) took: Duration,
    has_duplicates: bool,
}

/// The state that a batch is decided on.
struct AssembledState {
    state: BatchState,
    processes: BTreeSet<ObjectId>,
    has_duplicates: bool,
}

impl Planner {
    /// Plans a batch. The next plan builds on it, unless it is [discarded](Self::discard_plans).
    pub(crate) async fn plan(
        &mut self,
        mut parsed: ParsedBatch,
        rows: Option<PrefetchedRows>,
    ) -> Result<PlannedBatch, PlanError> {
        let started = Instant::now();
        let entries = std::mem::take(&mut parsed.entries);
        let AssembledState { state, processes, has_duplicates } =
            self.assemble_state(&entries, rows, parsed.count).await?;
        let applied_at = clock::now();
        let plan = decide_batch(state, entries, applied_at, self.limits);
        self.cache.lock().record_decided(&plan);
        let revisions = self.rules.revisions(&processes);
        Ok(describe(parsed, plan, applied_at, revisions, has_duplicates, started.elapsed()))
    }

    async fn assemble_state(
        &mut self,
        entries: &[Entry],
        rows: Option<PrefetchedRows>,
        count: usize,
    ) -> Result<AssembledState, PlanError> {
        let budget = if count == 1 { usize::MAX } else { batch_state::MAX_BYTES };
        let keys = LeadKeys::of(entries);
        let mut state = match rows.and_then(|rows| self.complete_prefetched(&keys, rows)) {
            Some(state) => state,
            None => self.load_state(&keys, budget).await?,
        };
        let processes: BTreeSet<_> = state.leads.values().map(|lead| lead.process_id).collect();
        state.rules = self.rules.load(&self.pool, &processes).await?;
        if self.check_duplicates {
            state.recorded = ledger::duplicates(&self.pool, &keys).await?;
        }
        let erasures = entries.iter().filter(|entry| matches!(entry, Entry::Erase(_))).count();
        if count > 1 && (outcome_bytes(&state, entries) > budget || erasures > MAX_ERASURES) {
            return Err(PlanError::TooLarge);
        }
        let has_duplicates = !state.recorded.is_empty();
        if self.queued > 0 {
            state.recorded.extend(queued_updates::duplicates(&self.pool, &keys).await?);
        }
        Ok(AssembledState { state, processes, has_duplicates })
    }

    /// None if the cache has evicted leads since the rows were read.
    fn complete_prefetched(&self, keys: &LeadKeys, rows: PrefetchedRows) -> Option<BatchState> {
        let mut cache = self.cache.lock();
        cache.is_complete_since(rows.written).then(|| cache.batch_state(keys, rows.state))
    }

    async fn load_state(&self, keys: &LeadKeys, budget: usize) -> Result<BatchState, PlanError> {
        // Nothing is evicted between the two locks: only `record_written` evicts.
        let (missing, _) = self.cache.lock().missing(keys);
        let mut connection = self.pool.acquire().await.map_err(StoreError::from)?;
        let read = batch_state::read(&mut connection, &missing, budget).await?.ok_or(PlanError::TooLarge)?;
        Ok(self.cache.lock().batch_state(keys, read))
    }

    /// Whether a batch can be planned while the previous one is being written: planning must not read tables that the
    /// previous batch changes.
    pub(crate) fn can_plan_ahead(&self) -> bool {
        !self.check_duplicates && self.queued == 0
    }

    /// Records that the oldest planned batch is written.
    pub(crate) fn record_written(&mut self, batch: &PlannedBatch) {
        let (added, released) = (batch.plan.newly_queued.len() as u64, batch.plan.released.len() as u64);
        self.queued = (self.queued + added).saturating_sub(released);
        self.check_duplicates = batch.has_duplicates;
        self.cache.lock().record_written();
    }

    /// Discards all plans that are not written.
    pub(crate) fn discard_plans(&mut self) {
        self.cache.lock().clear();
    }

    /// Reads the rules of a batch again. Returns whether they changed.
    pub(crate) async fn reload_rules(&mut self, batch: &PlannedBatch) -> Result<bool, StoreError> {
        let processes = batch.revisions.iter().map(|(process, _)| *process).collect();
        self.rules.reload(&self.pool, &processes).await
    }
}

fn describe(
    parsed: ParsedBatch,
    mut plan: Plan,
    applied_at: Timestamp,
    revisions: Vec<(ObjectId, i64)>,
    has_duplicates: bool,
    took: Duration,
) -> PlannedBatch {
    let ParsedBatch { mut dead_letters, count, last, logged_at, ends_message, .. } = parsed;
    dead_letters.append(&mut plan.dead_letters);
    PlannedBatch {
        plan,
        last,
        logged_at,
        ends_message,
        applied_at,
        count,
        dead_letters,
        revisions,
        took,
        has_duplicates,
    }
}

/// Approximate bytes of metadata in the outcomes of these entries and of the queued updates that they may release.
fn outcome_bytes(state: &BatchState, entries: &[Entry]) -> usize {
    let updates = entries.iter().filter_map(|entry| match entry {
        Entry::Update(update) => Some(update),
        Entry::Call(_) | Entry::Erase(_) | Entry::Created(_) => None,
    });
    let updates = updates.map(|update| {
        let command = &update.command;
        let by_reference = || state.references.get(&(command.process_id?, command.reference_id.clone()?)).copied();
        let lead = command.lead_id.or_else(by_reference).and_then(|lead_id| state.leads.get(&lead_id));
        update.text.len() + lead.map_or(0, |lead| lead.metadata.get().len())
    });
    // Any entry of a lead may release the lead's queue.
    let queues = state.queued.iter().filter_map(|(lead_id, queue)| {
        let bytes = queue.iter().map(|queued| queued.update.text.len()).sum();
        Some(queue_outcome_bytes(state.leads.get(lead_id)?, queue.len(), bytes))
    });
    let created = entries.iter().map(|entry| match entry {
        Entry::Created(created) => 2 * created.text.len(),
        _ => 0,
    });
    updates.chain(queues).chain(created).sum()
}

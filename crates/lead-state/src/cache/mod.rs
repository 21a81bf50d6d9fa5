//! 4 Decide: the leader's cache of leads, so that a batch reads only the leads that earlier batches neither read nor
//! wrote.
//!
//! Only the leader changes existing leads (ADR 2), so a cached lead equals its row until another leader moves the
//! checkpoint. After that, no batch that was decided on the cache can be written. A cache lives for one term.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use contract::ObjectId;
use lru::LruCache;

use crate::core::{
    batch::{BatchState, LeadKeys, Plan, QueuedUpdate},
    decide::{Call, Lead},
};

/// Approximate limit of the cached bytes. Leads of an unwritten batch stay even beyond the limit. A larger cache saves
/// reads of leads that change rarely, and costs memory.
const MAX_BYTES: usize = 12 << 20;
/// Size of a lead without its texts.
const LEAD_OVERHEAD: usize = 512;

/// A cache shared by the prefetcher and the applier.
#[derive(Debug, Default)]
pub(crate) struct SharedCache(Mutex<LeadCache>);

impl SharedCache {
    pub(crate) fn lock(&self) -> MutexGuard<'_, LeadCache> {
        // A task that panics ends the term, and the cache with it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(crate) struct LeadCache {
    leads: LruCache<ObjectId, CachedLead>,
    /// Ids of cached leads that a batch addressed by process and external id.
    references: HashMap<(ObjectId, String), ObjectId>,
    bytes: usize,
    max_bytes: usize,
    /// Number of batches decided so far.
    decided: u64,
    /// Number of decided batches that are written.
    written: u64,
    /// The greatest `last_used` of all evicted leads.
    evicted: Option<u64>,
}

#[derive(Debug)]
struct CachedLead {
    lead: Arc<Lead>,
    calls: Vec<Call>,
    queued: Vec<Arc<QueuedUpdate>>,
    /// Number of the last batch that used the lead. A prefetched batch counts as the last one written, because its
    /// number is not known yet.
    last_used: u64,
}

impl CachedLead {
    fn bytes(&self) -> usize {
        let Lead { reference_id, name, state, disposition, metadata, .. } = &*self.lead;
        let texts = [reference_id, name, disposition].into_iter().flatten().map(String::len).sum::<usize>();
        let queued = self.queued.iter().map(|queued| LEAD_OVERHEAD + queued.update.text.len()).sum::<usize>();
        let calls = self.calls.iter().map(|call| size_of::<Call>() + call.call_id.len()).sum::<usize>();
        LEAD_OVERHEAD + texts + state.len() + metadata.get().len() + queued + calls
    }
}

impl Default for LeadCache {
    fn default() -> Self {
        Self::with_max_bytes(MAX_BYTES)
    }
}

impl LeadCache {
    fn with_max_bytes(max_bytes: usize) -> Self {
        let leads = LruCache::unbounded();
        Self { leads, references: HashMap::new(), bytes: 0, max_bytes, decided: 0, written: 0, evicted: None }
    }

    /// The keys that must be read, and the number of batches written at this moment.
    pub(crate) fn missing(&mut self, keys: &LeadKeys) -> (LeadKeys, u64) {
        let written = self.written;
        let mut is_missing = |lead_id: &ObjectId| match self.leads.get_mut(lead_id) {
            Some(cached) => {
                cached.last_used = cached.last_used.max(written);
                false
            }
            None => true,
        };
        let leads = keys.leads.iter().filter(|lead_id| is_missing(lead_id)).copied().collect();
        let references = keys.references.iter();
        let references =
            references.filter(|key| self.references.get(key).is_none_or(&mut is_missing)).cloned().collect();
        (LeadKeys { leads, references, ..LeadKeys::default() }, written)
    }

    /// Whether rows that were read when `written` batches were written are still usable: no lead was evicted that was
    /// used since then. Otherwise the rows lack leads that were cached then, or are older than the evicted leads.
    pub(crate) fn is_complete_since(&self, written: u64) -> bool {
        self.evicted.is_none_or(|last_used| last_used < written)
    }

    /// The state of a batch, except for its rules, from the cache and the rows read for it.
    pub(crate) fn batch_state(&mut self, keys: &LeadKeys, read: BatchState) -> BatchState {
        self.insert_missing(read);
        let mut state = BatchState::default();
        for key in &keys.references {
            if let Some(lead_id) = self.references.get(key) {
                state.references.insert(key.clone(), *lead_id);
            }
        }
        for lead_id in keys.leads.iter().chain(state.references.values()) {
            let Some(cached) = self.leads.get_mut(lead_id) else { continue };
            cached.last_used = self.decided + 1;
            state.leads.insert(*lead_id, cached.lead.clone());
            if !cached.calls.is_empty() {
                state.calls.insert(*lead_id, cached.calls.clone());
            }
            if !cached.queued.is_empty() {
                state.queued.insert(*lead_id, cached.queued.clone());
            }
        }
        state
    }

    /// Adds what was read. A lead that is cached already is as new or newer.
    fn insert_missing(&mut self, BatchState { leads, references, mut calls, mut queued, .. }: BatchState) {
        for (lead_id, lead) in leads {
            if self.leads.contains(&lead_id) {
                continue;
            }
            let calls = calls.remove(&lead_id).unwrap_or_default();
            let queued = queued.remove(&lead_id).unwrap_or_default();
            let cached = CachedLead { lead, calls, queued, last_used: self.decided };
            self.bytes += cached.bytes();
            self.leads.put(lead_id, cached);
        }
        // A lead that was erased meanwhile has lost its reference.
        let has = |((_, reference), lead_id): &((ObjectId, String), ObjectId)| {
            self.leads.peek(lead_id).is_some_and(|cached| cached.lead.reference_id.as_ref() == Some(reference))
        };
        self.references.extend(references.into_iter().filter(has));
    }

    /// Applies the plan of the batch decided last, before it is written.
    pub(crate) fn record_decided(&mut self, plan: &Plan) {
        let mut change = |lead_id: &ObjectId, change: &mut dyn FnMut(&mut CachedLead)| {
            // Every lead in a plan was in the batch's state, and nothing was evicted since.
            let Some(cached) = self.leads.get_mut(lead_id) else { return };
            self.bytes -= cached.bytes();
            change(cached);
            self.bytes += cached.bytes();
        };
        for erasure in &plan.erasures {
            if let Some(reference) = &erasure.reference_id {
                self.references.remove(&(erasure.process_id, reference.clone()));
            }
        }
        for lead in &plan.leads {
            change(&lead.lead_id, &mut |cached| cached.lead = lead.clone());
        }
        for (lead_id, calls) in &plan.calls {
            change(lead_id, &mut |cached| cached.calls.clone_from(calls));
        }
        for (lead_id, queued) in &plan.queued {
            change(lead_id, &mut |cached| cached.queued.clone_from(queued));
        }
        self.decided += 1;
    }

    /// Records that the oldest decided batch is written, and evicts leads over the limit. Leads of batches still to be
    /// written stay: Postgres does not have their state yet.
    pub(crate) fn record_written(&mut self) {
        self.written += 1;
        while self.bytes > self.max_bytes
            && self.leads.peek_lru().is_some_and(|(_, cached)| cached.last_used <= self.written)
            && let Some((_, cached)) = self.leads.pop_lru()
        {
            self.bytes -= cached.bytes();
            self.evicted = self.evicted.max(Some(cached.last_used));
            if let Some(reference) = &cached.lead.reference_id {
                self.references.remove(&(cached.lead.process_id, reference.clone()));
            }
        }
    }

    /// Evicts everything, because the batches decided last were not written.
    pub(crate) fn clear(&mut self) {
        self.leads.clear();
        self.references.clear();
        self.bytes = 0;
        self.decided = self.written;
        self.evicted = Some(self.written);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use contract::{JsonObject, position::LogPosition};
    use proptest::prelude::*;

    use super::*;
    use crate::core::batch::Erasure;

    fn id(n: u8) -> ObjectId {
        ObjectId::from_bytes([n; 12])
    }

    fn lead(n: u8, version: i64) -> Arc<Lead> {
        Arc::new(Lead {
            lead_id: id(n),
            project_id: id(0),
            process_id: id(0),
            reference_id: Some(n.to_string()),
            name: None,
            state: "new".into(),
            disposition: None,
            metadata: JsonObject::empty(),
            version,
            is_erased: false,
        })
    }

    /// The keys of leads by id or by external id.
    fn keys(leads: &[u8], by_id: bool) -> LeadKeys {
        let mut keys = LeadKeys::default();
        for lead in leads {
            if by_id {
                keys.leads.insert(id(*lead));
            } else {
                keys.references.insert((id(0), lead.to_string()));
            }
        }
        keys
    }

    fn read(database: &HashMap<u8, i64>, missing: &LeadKeys) -> BatchState {
        let mut state = BatchState::default();
        for (n, version) in database {
            let (lead, reference) = (lead(*n, *version), (id(0), n.to_string()));
            if missing.references.contains(&reference) {
                state.references.insert(reference, lead.lead_id);
            } else if !missing.leads.contains(&lead.lead_id) {
                continue;
            }
            state.leads.insert(lead.lead_id, lead);
        }
        state
    }

    fn versions(state: &BatchState) -> HashMap<u8, i64> {
        state.leads.values().map(|lead| (lead.lead_id.as_bytes()[0], lead.version)).collect()
    }

    #[test]
    fn cached_leads_are_not_read_again() {
        let mut cache = LeadCache::default();
        let database = HashMap::from([(1, 5), (2, 5)]);
        let three = keys(&[1, 2, 3], true);
        let (missing, written) = cache.missing(&three);
        assert_eq!(missing.leads.len(), 3);
        assert!(cache.is_complete_since(written));
        let state = cache.batch_state(&three, read(&database, &missing));
        assert_eq!(versions(&state), database);

        cache.record_decided(&Plan { leads: vec![lead(1, 6)], ..Plan::default() });
        cache.record_written();

        let (missing, _) = cache.missing(&three);
        assert_eq!(missing.leads, [id(3)].into(), "a lead that does not exist is read each time");
        assert_eq!(versions(&cache.batch_state(&three, BatchState::default())), [(1, 6), (2, 5)].into());
        let (missing, _) = cache.missing(&keys(&[1], false));
        assert_eq!(missing.references.len(), 1, "cached by id only");
    }

    #[test]
    fn a_reference_that_was_read_before_its_lead_was_erased_finds_nothing() {
        let mut cache = LeadCache::default();
        let (database, by_reference) = (HashMap::from([(1, 5)]), keys(&[1], false));
        let stale = || read(&database, &by_reference);
        assert_eq!(cache.batch_state(&by_reference, stale()).references.len(), 1);
        let erased = Lead { reference_id: None, is_erased: true, ..Arc::unwrap_or_clone(lead(1, 5)) };
        let (reference_id, position) = (Some("1".into()), LogPosition::default());
        let erasure = Erasure { lead_id: id(1), project_id: id(0), process_id: id(0), reference_id, position };

        cache.record_decided(&Plan { leads: vec![Arc::new(erased)], erasures: vec![erasure], ..Plan::default() });
        cache.record_written();

        assert!(cache.batch_state(&by_reference, BatchState::default()).references.is_empty(), "the cache");
        assert!(cache.batch_state(&by_reference, stale()).references.is_empty(), "rows that were read ahead");
    }

    proptest! {
        /// Holds for any number of prefetched batches, any delay of their writes, and any size of the cache.
        #[test]
        fn a_batch_sees_the_changes_of_all_earlier_batches(
            batches in prop::collection::vec(
                (prop::collection::btree_set(0_u8..12, 1..6), any::<bool>(), any::<bool>(), 0_u8..20), 1..60),
            prefetch in 0_usize..3,
            cached_leads in 0_usize..14,
        ) {
            let bytes = CachedLead { lead: lead(1, 1), calls: vec![], queued: vec![], last_used: 0 }.bytes();
            let mut cache = LeadCache::with_max_bytes(cached_leads * bytes);
            let mut database: HashMap<u8, i64> = (0..10).map(|n| (n, 0)).collect();
            // Decided, not written.
            let mut pending = Vec::<(u8, i64)>::new();
            let mut prefetched = VecDeque::new();
            let mut next = batches.iter();
            for (leads, by_id, stays_pending, fails) in &batches {
                let leads = leads.iter().copied().collect::<Vec<_>>();
                while prefetched.len() <= prefetch && let Some((leads, by_id, ..)) = next.next() {
                    let leads = leads.iter().copied().collect::<Vec<_>>();
                    let (missing, written) = cache.missing(&keys(&leads, *by_id));
                    prefetched.push_back((read(&database, &missing), written));
                }
                if *fails == 0 {
                    pending.clear();
                    cache.clear();
                }
                let keys = keys(&leads, *by_id);
                let (rows, written) = prefetched.pop_front().unwrap();
                let state = if cache.is_complete_since(written) {
                    cache.batch_state(&keys, rows)
                } else {
                    let (missing, _) = cache.missing(&keys);
                    cache.batch_state(&keys, read(&database, &missing))
                };
                let mut expected = database.clone();
                expected.extend(pending.iter().copied());
                expected.retain(|n, _| leads.contains(n));
                prop_assert_eq!(versions(&state), expected.clone());
                let changed = expected.into_iter().map(|(n, version)| lead(n, version + 1)).collect::<Vec<_>>();
                cache.record_decided(&Plan { leads: changed.clone(), ..Plan::default() });
                // At most one batch is decided before the batch before it is written.
                if cache.decided - cache.written > 1 {
                    database.extend(pending.drain(..));
                    cache.record_written();
                }
                pending.extend(changed.iter().map(|lead| (lead.lead_id.as_bytes()[0], lead.version)));
                if !stays_pending {
                    database.extend(pending.drain(..));
                    cache.record_written();
                    prop_assert!(cache.bytes <= cached_leads * bytes);
                }
                prop_assert!(cache.references.len() <= cache.leads.len());
            }
        }
    }
}

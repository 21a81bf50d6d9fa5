//! 4 Decide: what the leader knows of leads, so that it need not read again what it read or wrote a while ago.
//!
//! Leads that are there change in the leader's batches alone (ADR 2), so what it knows of one is what the database holds. It stops being
//! that when somebody else moves the checkpoint, and then nothing that is decided on it is written any more. What is
//! known is of one term.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use contract::ObjectId;
use lru::LruCache;

use crate::core::{
    batch::{Held, Names, Plan, World},
    decide::{Call, Lead},
};

/// Most bytes that are kept, about; a batch that names more than that is kept until it is written. More spares reading leads
/// that change seldom, and is memory.
const BYTES: usize = 12 << 20;
/// What a lead takes beside its texts.
const OVERHEAD: usize = 512;

/// What the leader knows, for who reads ahead and for who applies.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Cache>);

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Cache> {
        // Whoever panicked ended the term, and with it this.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the leader knows of leads.
#[derive(Debug)]
pub(crate) struct Cache {
    leads: LruCache<ObjectId, Known>,
    /// Of leads that were named so.
    references: HashMap<(ObjectId, String), ObjectId>,
    bytes: usize,
    most: usize,
    /// How many batches were decided.
    decided: u64,
    /// How many of these were written.
    written: u64,
    /// The last batch that used what is forgotten now.
    forgotten: Option<u64>,
}

/// A lead, its calls, and what they hold.
#[derive(Debug)]
struct Known {
    lead: Arc<Lead>,
    calls: Vec<Call>,
    held: Vec<Arc<Held>>,
    /// The last batch that used it, by its number; the one before the oldest that may, where it was asked for ahead.
    used: u64,
}

impl Known {
    fn bytes(&self) -> usize {
        let Lead { reference_id, name, state, disposition, metadata, .. } = &*self.lead;
        let texts = [reference_id, name, disposition].into_iter().flatten().map(String::len).sum::<usize>();
        let held = self.held.iter().map(|held| OVERHEAD + held.update.text.get().len()).sum::<usize>();
        OVERHEAD + texts + state.len() + metadata.get().len() + held
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self::of(BYTES)
    }
}

impl Cache {
    fn of(most: usize) -> Self {
        let leads = LruCache::unbounded();
        Self { leads, references: HashMap::new(), bytes: 0, most, decided: 0, written: 0, forgotten: None }
    }

    /// What of these names must be read, and how many batches are written.
    pub(crate) fn unknown(&mut self, names: &Names) -> (Names, u64) {
        let written = self.written;
        let mut unknown = |lead_id: &ObjectId| match self.leads.get_mut(lead_id) {
            Some(known) => {
                known.used = known.used.max(written);
                false
            }
            None => true,
        };
        let leads = names.leads.iter().filter(|lead_id| unknown(lead_id)).copied().collect();
        let references = names.references.iter();
        let references =
            references.filter(|name| self.references.get(name).is_none_or(&mut unknown)).cloned().collect();
        (Names { leads, references, ..Names::default() }, written)
    }

    /// Whether all that was known when so many batches were written, and all that is newer, is still known. Else what was
    /// read then does not complete it, and may be older than what was forgotten.
    pub(crate) fn remembers(&self, written: u64) -> bool {
        self.forgotten.is_none_or(|used| used < written)
    }

    /// All that is known of what a batch names, the rules aside, with what was read of it.
    pub(crate) fn world(&mut self, names: &Names, read: World) -> World {
        self.learn(read);
        let mut world = World::default();
        for name in &names.references {
            if let Some(lead_id) = self.references.get(name) {
                world.references.insert(name.clone(), *lead_id);
            }
        }
        for lead_id in names.leads.iter().chain(world.references.values()) {
            let Some(known) = self.leads.get_mut(lead_id) else { continue };
            known.used = self.decided + 1;
            world.leads.insert(*lead_id, known.lead.clone());
            if !known.calls.is_empty() {
                world.calls.insert(*lead_id, known.calls.clone());
            }
            if !known.held.is_empty() {
                world.held.insert(*lead_id, known.held.clone());
            }
        }
        world
    }

    /// Notes what was read. What is known already is as new or newer.
    fn learn(&mut self, World { leads, references, mut calls, mut held, .. }: World) {
        for (lead_id, lead) in leads {
            if self.leads.contains(&lead_id) {
                continue;
            }
            let calls = calls.remove(&lead_id).unwrap_or_default();
            let held = held.remove(&lead_id).unwrap_or_default();
            let known = Known { lead, calls, held, used: self.decided };
            self.bytes += known.bytes();
            self.leads.put(lead_id, known);
        }
        self.references.extend(references);
    }

    /// Notes what the next batch makes of the leads in its world.
    pub(crate) fn decided(&mut self, plan: &Plan) {
        let mut change = |lead_id: &ObjectId, change: &mut dyn FnMut(&mut Known)| {
            // All that a plan changes was in its world, and nothing is forgotten between the two.
            let Some(known) = self.leads.get_mut(lead_id) else { return };
            self.bytes -= known.bytes();
            change(known);
            self.bytes += known.bytes();
        };
        for lead in &plan.leads {
            change(&lead.lead_id, &mut |known| known.lead = lead.clone());
        }
        for (lead_id, calls) in &plan.calls {
            change(lead_id, &mut |known| known.calls.clone_from(calls));
        }
        for (lead_id, held) in &plan.held {
            change(lead_id, &mut |known| known.held.clone_from(held));
        }
        self.decided += 1;
    }

    /// Notes that the oldest batch that was decided is written, and forgets what is too much: not what those still to be
    /// written made, which cannot be read.
    pub(crate) fn written(&mut self) {
        self.written += 1;
        while self.bytes > self.most
            && self.leads.peek_lru().is_some_and(|(_, known)| known.used <= self.written)
            && let Some((_, known)) = self.leads.pop_lru()
        {
            self.bytes -= known.bytes();
            self.forgotten = self.forgotten.max(Some(known.used));
            if let Some(reference) = &known.lead.reference_id {
                self.references.remove(&(known.lead.process_id, reference.clone()));
            }
        }
    }

    /// Forgets everything, because what was decided last is not written.
    pub(crate) fn forget(&mut self) {
        self.leads.clear();
        self.references.clear();
        self.bytes = 0;
        self.decided = self.written;
        self.forgotten = Some(self.written);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use contract::JsonObject;
    use proptest::prelude::*;

    use super::*;

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
        })
    }

    /// Leads by their ids, in even batches, or by their external ids.
    fn names(leads: &[u8], by_id: bool) -> Names {
        let mut names = Names::default();
        for lead in leads {
            if by_id {
                names.leads.insert(id(*lead));
            } else {
                names.references.insert((id(0), lead.to_string()));
            }
        }
        names
    }

    /// What the database holds, as far as it is named.
    fn read(database: &HashMap<u8, i64>, unknown: &Names) -> World {
        let mut world = World::default();
        for (n, version) in database {
            let (lead, reference) = (lead(*n, *version), (id(0), n.to_string()));
            if unknown.references.contains(&reference) {
                world.references.insert(reference, lead.lead_id);
            } else if !unknown.leads.contains(&lead.lead_id) {
                continue;
            }
            world.leads.insert(lead.lead_id, lead);
        }
        world
    }

    fn versions(world: &World) -> HashMap<u8, i64> {
        world.leads.values().map(|lead| (lead.lead_id.as_bytes()[0], lead.version)).collect()
    }

    #[test]
    fn what_is_known_is_not_read_again() {
        let mut cache = Cache::default();
        let database = HashMap::from([(1, 5), (2, 5)]);
        let both = names(&[1, 2, 3], true);
        let (unknown, written) = cache.unknown(&both);
        assert_eq!(unknown.leads.len(), 3);
        assert!(cache.remembers(written));
        let world = cache.world(&both, read(&database, &unknown));
        assert_eq!(versions(&world), database);
        cache.decided(&Plan { leads: vec![lead(1, 6)], ..Plan::default() });
        cache.written();

        let (unknown, _) = cache.unknown(&both);
        assert_eq!(unknown.leads, [id(3)].into(), "what is not there may be there next time");
        assert_eq!(versions(&cache.world(&both, World::default())), [(1, 6), (2, 5)].into());
        let (unknown, _) = cache.unknown(&names(&[1], false));
        assert_eq!(unknown.references.len(), 1, "not known by that name");
    }

    proptest! {
        /// However many batches are read ahead, however late they are written, and however little is kept: a batch is decided on
        /// what those before it made.
        #[test]
        fn a_batch_sees_what_those_before_it_made(
            batches in prop::collection::vec(
                (prop::collection::btree_set(0_u8..12, 1..6), any::<bool>(), any::<bool>(), 0_u8..20), 1..60),
            ahead in 0_usize..3,
            keep in 0_usize..14,
        ) {
            let bytes = Known { lead: lead(1, 1), calls: vec![], held: vec![], used: 0 }.bytes();
            let mut cache = Cache::of(keep * bytes);
            let mut database: HashMap<u8, i64> = (0..10).map(|n| (n, 0)).collect();
            // What was decided and is not written.
            let mut pending = Vec::<(u8, i64)>::new();
            let mut read_ahead = VecDeque::new();
            let mut next = batches.iter();
            for (leads, by_id, waits, fails) in &batches {
                let leads = leads.iter().copied().collect::<Vec<_>>();
                while read_ahead.len() <= ahead && let Some((leads, by_id, ..)) = next.next() {
                    let leads = leads.iter().copied().collect::<Vec<_>>();
                    let (unknown, written) = cache.unknown(&names(&leads, *by_id));
                    read_ahead.push_back((read(&database, &unknown), written));
                }
                if *fails == 0 {
                    pending.clear();
                    cache.forget();
                }
                let names = names(&leads, *by_id);
                let (known, written) = read_ahead.pop_front().unwrap();
                let world = if cache.remembers(written) {
                    cache.world(&names, known)
                } else {
                    let (unknown, _) = cache.unknown(&names);
                    cache.world(&names, read(&database, &unknown))
                };
                let mut there = database.clone();
                there.extend(pending.iter().copied());
                there.retain(|n, _| leads.contains(n));
                prop_assert_eq!(versions(&world), there.clone());
                let changed = there.into_iter().map(|(n, version)| lead(n, version + 1)).collect::<Vec<_>>();
                cache.decided(&Plan { leads: changed.clone(), ..Plan::default() });
                // At most one is written later than the next one is decided.
                if cache.decided - cache.written > 1 {
                    database.extend(pending.drain(..));
                    cache.written();
                }
                pending.extend(changed.iter().map(|lead| (lead.lead_id.as_bytes()[0], lead.version)));
                if !waits {
                    database.extend(pending.drain(..));
                    cache.written();
                    prop_assert!(cache.bytes <= keep * bytes);
                }
                prop_assert!(cache.references.len() <= cache.leads.len());
            }
        }
    }
}

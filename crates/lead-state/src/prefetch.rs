//! 4 Decide: a batch's entries and what the database holds of them, read while the batch before is still being written.
//!
//! So what is read may be older than what the batches before make of it. Each batch says how many were written when it was
//! read; [`Overlay`] has what the others made.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use service_kit::clock;
use sqlx::PgPool;
use tokio::sync::mpsc;

use crate::{
    entry::{DeadLetter, Entry, LogMessage, parse},
    fold::{Names, Plan, World},
    reader::Read,
    store::batch::{self, Fetched},
};

/// Most log entries in a transaction. More of them apply faster and make each one wait longer: 2000 gain a tenth over
/// 500 and take three times as long.
const BATCH_MESSAGES: usize = 500;

/// What there was in the log, at least one message.
pub(crate) struct Ahead {
    pub(crate) read: Vec<Read>,
    /// When they were taken out of the log.
    pub(crate) read_at: SystemTime,
    pub(crate) entries: Vec<Entry>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// None where the database did not answer or has too much of it.
    pub(crate) fetched: Option<Fetched>,
    /// How many batches were written before it was read.
    pub(crate) written: u64,
}

/// Takes batches out of the log and reads their worlds, one ahead of whoever takes them, until either end is closed.
pub(crate) async fn prefetch(
    pool: PgPool,
    mut log: mpsc::Receiver<Read>,
    written: Arc<AtomicU64>,
    out: mpsc::Sender<Ahead>,
) {
    // No batch is begun before there is room for it: what comes meanwhile goes along.
    while let Ok(room) = out.reserve().await {
        let mut read = Vec::with_capacity(BATCH_MESSAGES.min(log.len().max(1)));
        // What is there, at least one: an update alone waits for no company.
        if log.recv_many(&mut read, BATCH_MESSAGES).await == 0 {
            return;
        }
        let read_at = clock::precise();
        let written = written.load(Ordering::Acquire);
        let (entries, dead_letters) = understand(read.iter().map(|read| &read.message));
        let budget = if read.len() == 1 { usize::MAX } else { batch::BYTES };
        // The applier reads anew what could not be read, and says what is wrong.
        let fetched = batch::fetch(&pool, &Names::of(&entries), budget).await.ok().flatten();
        room.send(Ahead { read, read_at, entries, dead_letters, fetched, written });
    }
}

/// Parses messages; those that cannot be are dead letters.
pub(crate) fn understand<'a>(messages: impl Iterator<Item = &'a LogMessage>) -> (Vec<Entry>, Vec<DeadLetter>) {
    let mut dead_letters = Vec::new();
    let entries = messages.filter_map(|message| parse(message).map_err(|dead| dead_letters.push(dead)).ok());
    let entries = entries.collect();
    (entries, dead_letters)
}

/// What the last batches made of leads, calls and what they hold, by how many batches were written with them.
#[derive(Default)]
pub(crate) struct Overlay {
    batches: VecDeque<(u64, World)>,
}

impl Overlay {
    /// Notes what a batch made.
    pub(crate) fn add(&mut self, written: u64, plan: &Plan) {
        let world = World {
            leads: plan.leads.iter().map(|lead| (lead.lead_id, lead.clone())).collect(),
            calls: plan.calls.iter().cloned().collect(),
            held: plan.held.iter().cloned().collect(),
            ..World::default()
        };
        self.batches.push_back((written, world));
    }

    /// Brings up to date what was read when so many batches were written, and forgets what nobody needs any more: what is
    /// read later is read later.
    pub(crate) fn bring_up_to_date(&mut self, written: u64, world: &mut World) {
        while self.batches.front().is_some_and(|(with, _)| *with <= written) {
            self.batches.pop_front();
        }
        for (_, newer) in &self.batches {
            for (lead_id, lead) in &newer.leads {
                if let Some(known) = world.leads.get_mut(lead_id) {
                    *known = lead.clone();
                }
            }
            for (lead_id, calls) in &newer.calls {
                if world.leads.contains_key(lead_id) {
                    world.calls.insert(*lead_id, calls.clone());
                }
            }
            for (lead_id, held) in &newer.held {
                if world.leads.contains_key(lead_id) {
                    world.held.insert(*lead_id, held.clone());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use contract::{JsonObject, ObjectId, Timestamp};

    use super::*;
    use crate::decide::{Call, Lead};

    fn lead(id: u8, version: i64) -> Lead {
        let id = ObjectId::from_bytes([id; 12]);
        Lead {
            lead_id: id,
            project_id: id,
            process_id: id,
            reference_id: None,
            name: None,
            state: "new".into(),
            disposition: None,
            metadata: JsonObject::empty(),
            version,
        }
    }

    fn world(leads: &[Lead]) -> World {
        World { leads: leads.iter().map(|lead| (lead.lead_id, lead.clone())).collect(), ..World::default() }
    }

    #[test]
    fn what_was_written_since_it_was_read_is_laid_over() {
        let at = Timestamp::from_millis(0);
        let call = Call { call_id: "c".into(), started_at: at, expires_at: at };
        let mut overlay = Overlay::default();
        let calls = vec![(lead(1, 0).lead_id, vec![call])];
        overlay.add(1, &Plan { leads: vec![lead(1, 2), lead(2, 2)], calls, ..Plan::default() });
        overlay.add(2, &Plan { leads: vec![lead(1, 3)], ..Plan::default() });

        // Read before both were written.
        let mut read = world(&[lead(1, 1), lead(3, 1)]);
        overlay.bring_up_to_date(0, &mut read);
        let versions = |world: &World| {
            let mut versions: Vec<_> = world.leads.values().map(|lead| lead.version).collect();
            versions.sort_unstable();
            versions
        };
        assert_eq!(versions(&read), [1, 3], "the newest, and only of leads that are asked for");
        assert_eq!(read.calls[&lead(1, 0).lead_id].len(), 1);

        // Between the two; what it read of the first stays as it was read.
        let mut read = world(&[lead(1, 2), lead(2, 7)]);
        overlay.bring_up_to_date(1, &mut read);
        assert_eq!(versions(&read), [3, 7]);
        assert!(read.calls.is_empty());

        // After both.
        let mut read = world(&[lead(1, 9)]);
        overlay.bring_up_to_date(2, &mut read);
        assert_eq!(versions(&read), [9]);
        assert!(overlay.batches.is_empty(), "nobody needs them any more");
    }
}

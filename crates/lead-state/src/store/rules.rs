//! The rules of processes, cached with their revisions. A batch is written only if its revisions are still the current
//! ones.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use contract::{ObjectId, process::Rules};
use serde::{Deserialize, de::IgnoredAny};
use service_kit::postgres::Pool;

use super::{
    StoreError,
    row::{Hex, Row},
};

/// Limit of cached processes; beyond it the cache starts empty again.
const MAX_PROCESSES: usize = 10_000;

#[derive(Debug, Default)]
pub(crate) struct RulesCache(HashMap<ObjectId, CachedProcess>);

#[derive(Debug)]
struct CachedProcess {
    revision: i64,
    rules: Arc<Rules>,
    callbacks: u64,
}

/// The part of a process that determines how often its events are sent.
#[derive(Deserialize)]
struct Callbacks {
    callbacks: Vec<IgnoredAny>,
}

impl RulesCache {
    /// The rules of processes. Reads those that are not cached.
    pub(crate) async fn load(
        &mut self,
        pool: &Pool,
        processes: &BTreeSet<ObjectId>,
    ) -> Result<HashMap<ObjectId, Arc<Rules>>, StoreError> {
        let missing = self.make_room_for(processes, MAX_PROCESSES);
        self.read(pool, &missing).await?;
        let rules = |process: &ObjectId| self.0.get(process).map(|cached| (*process, cached.rules.clone()));
        Ok(processes.iter().filter_map(rules).collect())
    }

    /// Reads the rules of processes again. Returns whether a revision has changed.
    pub(crate) async fn reload(&mut self, pool: &Pool, processes: &BTreeSet<ObjectId>) -> Result<bool, StoreError> {
        let cached = self.revisions(processes);
        self.read(pool, &processes.iter().copied().collect::<Vec<_>>()).await?;
        Ok(self.revisions(processes) != cached)
    }

    /// The cached revisions of processes.
    pub(crate) fn revisions(&self, processes: &BTreeSet<ObjectId>) -> Vec<(ObjectId, i64)> {
        processes.iter().filter_map(|process| Some((*process, self.0.get(process)?.revision))).collect()
    }

    /// How many callbacks a cached process has.
    pub(crate) fn callbacks(&self, process: ObjectId) -> u64 {
        self.0.get(&process).map_or(0, |cached| cached.callbacks)
    }

    /// The processes that must be read. If the cache would be too large with them, it is emptied first, and all
    /// processes must be read.
    fn make_room_for(&mut self, processes: &BTreeSet<ObjectId>, max_processes: usize) -> Vec<ObjectId> {
        let missing = |cache: &Self| -> Vec<_> {
            processes.iter().filter(|process| !cache.0.contains_key(process)).copied().collect()
        };
        let found = missing(self);
        if self.0.len() + found.len() <= max_processes {
            return found;
        }
        self.0.clear();
        missing(self)
    }

    async fn read(&mut self, pool: &Pool, processes: &[ObjectId]) -> Result<(), StoreError> {
        if processes.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = processes.iter().map(|process| *process.as_bytes()).collect();
        let rows = sqlx::query!(
            r#"SELECT process_id AS "process_id!", revision, config::text AS "config!"
               FROM lead_state.processes WHERE process_id = ANY($1::bytea[])"#,
            &ids as _
        )
        .fetch_all(pool)
        .await?;
        for row in rows {
            let stored = Row::new("processes", Hex(&row.process_id));
            let rules = Arc::new(stored.json("config", &row.config)?);
            let Callbacks { callbacks } = stored.json("config", &row.config)?;
            let cached = CachedProcess { revision: row.revision, rules, callbacks: callbacks.len() as u64 };
            self.0.insert(stored.id("process_id", &row.process_id)?, cached);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_were_cached_are_read_again_if_the_cache_is_emptied_for_others() {
        let id = |byte| ObjectId::from_bytes([byte; 12]);
        let cached = || CachedProcess { revision: 1, rules: Arc::default(), callbacks: 0 };
        let mut cache = RulesCache((1..=3).map(|byte| (id(byte), cached())).collect());

        assert_eq!(cache.make_room_for(&[id(1), id(4)].into(), 4), [id(4)]);
        assert_eq!(cache.make_room_for(&[id(1), id(4)].into(), 3), [id(1), id(4)]);
        assert!(cache.0.is_empty());
    }
}

//! 7 Deliver: releases parked events, whose process could not be read, once it can.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::future::join_all;
use service_kit::{clock, nats::error_chain, postgres::Pool};
use tokio_util::sync::CancellationToken;

use super::event::{AckDecision, EventDispatcher};
use crate::{
    callbacks::Callbacks,
    store::{
        self,
        error::StoreError,
        parked::{EventKey, ProcessRef},
    },
};

/// How often the processes of parked events are read. A longer interval delays their deliveries; a shorter one costs
/// NATS more.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long a claim is exclusive: well beyond the time to record its deliveries.
const LEASE: Duration = Duration::from_secs(30);
/// Maximum number of events whose deliveries are recorded at once. A larger batch takes more memory.
const BATCH: i64 = 32;
/// Maximum number of processes in one statement.
const MAX_PROCESSES: i64 = 500;

/// The task that releases parked events.
pub(crate) struct ParkedEvents {
    pub(crate) dispatcher: EventDispatcher,
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) pool: Pool,
}

impl ParkedEvents {
    /// Releases events until shutdown. Events that are claimed then are released after their lease.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut reported = HashSet::new();
        let release = async {
            loop {
                if let Err(e) = self.round(&mut reported).await {
                    tracing::warn!("cannot release parked events, trying again: {}", error_chain(&e));
                }
                tokio::time::sleep(INTERVAL).await;
            }
        };
        shutdown.run_until_cancelled(release).await;
        Ok(())
    }

    /// Releases the events of every process that can be read. Logs once why a process cannot be read.
    async fn round(&self, reported: &mut HashSet<ProcessRef>) -> Result<(), StoreError> {
        let mut unreadable = HashSet::new();
        let mut after = None;
        loop {
            let processes = store::parked::processes(&self.pool, after, MAX_PROCESSES).await?;
            for process in &processes {
                let (project_id, process_id) = *process;
                match self.callbacks.check_readable(project_id, process_id).await {
                    Ok(()) => self.release(*process).await?,
                    Err(e) => {
                        if !reported.contains(process) {
                            tracing::error!(%project_id, ?process_id, "events are parked: {e}");
                        }
                        unreadable.insert(*process);
                    }
                }
            }
            after = processes.last().copied();
            if (processes.len() as i64) < MAX_PROCESSES {
                *reported = unreadable;
                return Ok(());
            }
        }
    }

    async fn release(&self, process: ProcessRef) -> Result<(), StoreError> {
        let mut released = 0;
        loop {
            let now = clock::now();
            let events = store::parked::claim(&self.pool, process, BATCH, now, now.plus(LEASE)).await?;
            let results = join_all(events.iter().map(|event| self.dispatcher.release(event))).await;
            let (mut done, mut failed) = (Vec::<EventKey>::new(), None);
            for (event, result) in events.iter().zip(results) {
                match result {
                    Ok(()) => done.push(event.event.clone()),
                    Err(decision) => failed = Some(decision),
                }
            }
            store::parked::delete(&self.pool, &done).await?;
            released += done.len();
            if let Some(AckDecision::RetryLater(reason)) = &failed {
                tracing::warn!("a parked event is not released yet: {reason}");
            }
            if failed.is_some() || (events.len() as i64) < BATCH {
                break;
            }
        }
        if released > 0 {
            let (project_id, process_id) = process;
            tracing::info!(%project_id, ?process_id, released, "recorded the deliveries of parked events");
        }
        Ok(())
    }
}

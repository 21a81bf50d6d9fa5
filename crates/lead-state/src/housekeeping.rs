//! Periodic tasks of the leader: partitions, retention of the ledger and of the command log, projection of the
//! configuration, and sealing of secrets that an earlier version stored in clear.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::stream::Stream;
use contract::{Timestamp, streams::LEAD_COMMANDS};
use service_kit::{
    clock,
    nats::error_chain,
    postgres::Pool,
    retention::{Retention, purge_read},
};

use crate::{
    config::{projection::Projector, sealer::Sealer},
    store::{
        self, StoreError,
        checkpoint::{self, Checkpoint},
        housekeeping,
    },
};

/// The pause between two rounds. A longer one lets the log grow further beyond half of its limit before it is purged.
const INTERVAL: Duration = Duration::from_secs(10);
/// How often old months are dropped. Each attempt may delay a batch by a second while the ledger is being read.
const DROP_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How far ahead partitions are created.
const PARTITIONS_AHEAD: Duration = Duration::from_secs(62 * 24 * 60 * 60);
/// How far back partitions are created, for ids that were generated long before their updates were logged.
const PARTITIONS_BACK: Duration = Duration::from_secs(31 * 24 * 60 * 60);
/// How long expired calls are kept, in the time of the log. Updates that were logged during such a call may not be
/// applied yet.
const EXPIRED_CALLS_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// Calls that expired before this time are deleted; none before the first entry of the log is applied.
fn expired_calls_end(checkpoint: &Checkpoint, log_last: u64, now: Timestamp) -> Option<Timestamp> {
    let is_applied = checkpoint.applied.sequence >= log_last && checkpoint.ends_message;
    let applied_until = if is_applied { now } else { checkpoint.last_logged_at?.min(now) };
    Some(applied_until.minus(EXPIRED_CALLS_KEPT))
}

pub(crate) struct Housekeeper {
    pub(crate) pool: Pool,
    pub(crate) log: Stream,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
    /// How long applied commands stay in the log.
    pub(crate) log_retention: Duration,
    /// How long months of the ledger are kept.
    pub(crate) ledger_retention: Retention,
    /// How long the counts of updates are kept.
    pub(crate) statistics_retention: Retention,
}

impl Housekeeper {
    /// Runs until it is dropped. A task that fails is retried in the next round.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Fills lost buckets again when a leader starts.
        let mut project_everything = true;
        let mut seal_clear = true;
        let mut dropped_at: Option<Instant> = None;
        loop {
            if seal_clear {
                match self.sealer.seal_clear().await {
                    Ok(()) => seal_clear = false,
                    Err(e) => tracing::warn!("cannot seal secrets that are stored in clear, retrying: {e:#}"),
                }
            }
            match self.projector.project_pending(project_everything).await {
                Ok(()) => project_everything = false,
                Err(e) => tracing::warn!("cannot project the configuration, retrying: {}", error_chain(&e)),
            }
            if let Err(e) = self.maintain_tables().await {
                tracing::warn!("cannot create the ledger's partitions, retrying: {}", error_chain(&e));
            }
            if let Err(e) = self.delete_expired_calls().await {
                tracing::warn!("cannot delete expired calls, retrying: {e:#}");
            }
            if dropped_at.is_none_or(|at| at.elapsed() > DROP_INTERVAL) {
                match self.drop_old_months().await {
                    Ok(()) => dropped_at = Some(Instant::now()),
                    Err(e) => tracing::warn!("cannot drop old months of the ledger, retrying: {}", error_chain(&e)),
                }
                if let Err(e) = self.delete_old_counts().await {
                    tracing::warn!("cannot delete old statistics, retrying in an hour: {}", error_chain(&e));
                }
            }
            if let Err(e) = self.purge_log().await {
                tracing::warn!("cannot purge {LEAD_COMMANDS}, retrying: {e:#}");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn maintain_tables(&self) -> Result<(), StoreError> {
        let now = clock::now();
        housekeeping::ensure_partitions(&self.pool, now.minus(PARTITIONS_BACK), now.plus(PARTITIONS_AHEAD)).await
    }

    async fn delete_expired_calls(&self) -> anyhow::Result<()> {
        let now = clock::now();
        // Read before the checkpoint, because entries that are logged later have a later time.
        let log_last = self.log.get_info().await?.state.last_sequence;
        let Some(checkpoint) = checkpoint::get(&self.pool, LEAD_COMMANDS).await? else { return Ok(()) };
        if let Some(before) = expired_calls_end(&checkpoint, log_last, now) {
            housekeeping::delete_expired_calls(&mut store::acquire(&self.pool).await?, before).await?;
        }
        Ok(())
    }

    async fn drop_old_months(&self) -> Result<(), StoreError> {
        let Some(cutoff) = self.ledger_retention.cutoff(clock::now()) else { return Ok(()) };
        let dropped = housekeeping::drop_partitions(&self.pool, cutoff).await?;
        if !dropped.is_empty() {
            tracing::info!(dropped = dropped.join(", "), "months of the ledger were dropped");
        }
        Ok(())
    }

    async fn delete_old_counts(&self) -> Result<(), StoreError> {
        let Some(cutoff) = self.statistics_retention.cutoff(clock::now()) else { return Ok(()) };
        let mut connection = store::acquire(&self.pool).await?;
        let deleted = housekeeping::delete_counts(&mut connection, cutoff).await?;
        if deleted > 0 {
            tracing::info!(deleted, "deleted old statistics of updates");
        }
        Ok(())
    }

    async fn purge_log(&self) -> anyhow::Result<()> {
        let Some(checkpoint) = checkpoint::get(&self.pool, LEAD_COMMANDS).await? else { return Ok(()) };
        // Unannounced entries stay. While an older epoch is announced again, no entry of this log is announced.
        if checkpoint.announced.epoch < checkpoint.applied.epoch {
            return Ok(());
        }
        let purged =
            purge_read(&self.log, checkpoint.last_announced_message(), clock::now(), self.log_retention).await?;
        if purged > 0 {
            tracing::info!(purged, "purged applied commands from {LEAD_COMMANDS}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use contract::position::LogPosition;

    use super::*;

    #[test]
    fn expired_calls_stay_while_updates_of_their_time_are_to_be_applied() {
        let at = |hours: i64| Timestamp::from_millis(hours * 60 * 60 * 1000);
        let checkpoint = |ends_message, last_logged_at| Checkpoint {
            stream: LEAD_COMMANDS.into(),
            stream_created_at: "l".into(),
            generation: 0,
            applied: LogPosition::message(1, 7),
            last_logged_at,
            ends_message,
            announced: LogPosition::default(),
            delivered: LogPosition::default(),
            events_created_at: None,
        };

        assert_eq!(expired_calls_end(&checkpoint(true, Some(at(10))), 7, at(100)), Some(at(76)));
        assert_eq!(expired_calls_end(&checkpoint(true, Some(at(60))), 8, at(100)), Some(at(36)));
        assert_eq!(expired_calls_end(&checkpoint(false, Some(at(60))), 7, at(100)), Some(at(36)), "within a pack");
        assert_eq!(
            expired_calls_end(&checkpoint(true, None), 8, at(100)),
            None,
            "a restored database and a log to replay"
        );
        assert_eq!(expired_calls_end(&checkpoint(true, None), 0, at(100)), Some(at(76)), "nothing was ever logged");
    }
}

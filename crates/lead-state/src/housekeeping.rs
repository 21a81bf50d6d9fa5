//! What the leader does beside the flow: partitions ahead, old ones dropped, applied log entries purged, projection mended, secrets that
//! an older version stored in clear sealed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::stream::Stream;
use contract::streams::LEAD_COMMANDS;
use service_kit::{
    clock,
    nats::error_chain,
    retention::{Retention, purge_read},
};
use sqlx::PgPool;

use crate::{
    config::projection::Projector,
    config::secrets::Sealer,
    store::{checkpoint, ledger},
};

/// How often. Longer lets the log grow further past half of its bound before room is made.
const INTERVAL: Duration = Duration::from_secs(10);
/// How often old months are dropped. Each try may hold up a batch for a second while somebody reads the ledger.
const DROP_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How far ahead partitions are made.
const PARTITIONS_AHEAD: Duration = Duration::from_secs(62 * 24 * 60 * 60);
/// How far back: ids of late producers find their month as well.
const PARTITIONS_BACK: Duration = Duration::from_secs(31 * 24 * 60 * 60);
/// How long expired calls stay for people to see. Nothing is decided by them.
const EXPIRED_CALLS_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The leader's housekeeping.
pub(crate) struct Housekeeper {
    pub(crate) pool: PgPool,
    pub(crate) log: Stream,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
    /// How long applied commands stay in the log.
    pub(crate) log_retention: Duration,
    /// How long months of the ledger stay.
    pub(crate) ledger_retention: Retention,
}

impl Housekeeper {
    /// Keeps house until it is dropped. What fails is tried again the next time.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // A bucket that was lost is filled again when a leader starts.
        let mut everything = true;
        let mut in_clear = true;
        let mut dropped_at: Option<Instant> = None;
        loop {
            if in_clear {
                match self.sealer.seal_clear().await {
                    Ok(()) => in_clear = false,
                    Err(e) => tracing::warn!("cannot seal secrets that are stored in clear, trying again: {e:#}"),
                }
            }
            match self.projector.project_pending(everything).await {
                Ok(()) => everything = false,
                Err(e) => tracing::warn!("cannot project the configuration, trying again: {e:#}"),
            }
            if let Err(e) = self.partitions().await {
                tracing::warn!("cannot make the ledger's partitions, trying again: {}", error_chain(&e));
            }
            if dropped_at.is_none_or(|at| at.elapsed() > DROP_INTERVAL) {
                match self.forget().await {
                    Ok(()) => dropped_at = Some(Instant::now()),
                    Err(e) => tracing::warn!("cannot drop old months of the ledger, trying again: {}", error_chain(&e)),
                }
            }
            if let Err(e) = self.purge().await {
                tracing::warn!("cannot purge {LEAD_COMMANDS}, trying again: {e:#}");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn partitions(&self) -> Result<(), crate::store::StoreError> {
        let now = clock::now();
        ledger::ensure_partitions(&self.pool, now.minus(PARTITIONS_BACK), now.plus(PARTITIONS_AHEAD)).await?;
        ledger::sweep_calls(&self.pool, now.minus(EXPIRED_CALLS_KEPT)).await?;
        Ok(())
    }

    /// Drops the months that are too old. What is not announced and told yet stays.
    async fn forget(&self) -> Result<(), crate::store::StoreError> {
        let Some(cutoff) = self.ledger_retention.cutoff(clock::now()) else { return Ok(()) };
        let dropped = ledger::drop_partitions(&self.pool, cutoff).await?;
        if !dropped.is_empty() {
            tracing::info!(dropped = dropped.join(", "), "months of the ledger were dropped");
        }
        Ok(())
    }

    async fn purge(&self) -> anyhow::Result<()> {
        let Some(checkpoint) = checkpoint::get(&self.pool, LEAD_COMMANDS).await? else { return Ok(()) };
        // Only what is announced as well: the log and the ledger tell the same story for as long as one is needed.
        if checkpoint.announced.epoch < checkpoint.applied.epoch {
            return Ok(());
        }
        let purged = purge_read(&self.log, checkpoint.announced.sequence, clock::now(), self.log_retention).await?;
        if purged > 0 {
            tracing::info!(purged, "applied commands left {LEAD_COMMANDS}");
        }
        Ok(())
    }
}

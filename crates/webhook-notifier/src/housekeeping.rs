//! 7 Deliver: creates and drops partitions of the delivery log, and purges delivered events.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream;
use contract::streams::{LEAD_EVENTS, NOTIFIER_CONSUMER};
use service_kit::{
    clock,
    nats::error_chain,
    postgres::Pool,
    retention::{Retention, purge_read},
};
use tokio_util::sync::CancellationToken;

use crate::store;

/// How often partitions are created and dropped.
const PARTITIONS_INTERVAL: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How far back the first start creates partitions: events may have waited in their stream.
const PARTITIONS_BACK: Duration = DAY.saturating_mul(31);
/// How far ahead partitions are created. More bridges a longer time without a notifier, after which rows go to the
/// default partition and have to be moved.
const PARTITIONS_AHEAD: Duration = DAY.saturating_mul(62);
/// How often delivered events are purged. Longer lets a full stream stay full for longer.
const PURGE_INTERVAL: Duration = Duration::from_secs(15);

/// Creates and drops partitions, and deletes old statistics, until shutdown.
pub(crate) async fn partitions(
    pool: Pool,
    retention: Retention,
    statistics: Retention,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let maintain = || async {
        create_partitions(&pool).await;
        drop_partitions(&pool, retention).await;
        delete_counts(&pool, statistics).await;
    };
    every(PARTITIONS_INTERVAL, shutdown, maintain).await
}

/// Drops old months. A month with a pending delivery stays.
async fn drop_partitions(pool: &Pool, retention: Retention) {
    let Some(cutoff) = retention.cutoff(clock::now()) else { return };
    match store::partitions::drop_old(pool, cutoff).await {
        Ok(dropped) if dropped.is_empty() => {}
        Ok(dropped) => tracing::info!(dropped = dropped.join(", "), "dropped months of the delivery log"),
        Err(e) => tracing::warn!("cannot drop old months of the delivery log: {}", error_chain(&e)),
    }
}

/// Deletes old statistics whose deliveries were dropped.
async fn delete_counts(pool: &Pool, retention: Retention) {
    let Some(cutoff) = retention.cutoff(clock::now()) else { return };
    match store::partitions::delete_counts(pool, cutoff).await {
        Ok(0) => {}
        Ok(deleted) => tracing::info!(deleted, "deleted old statistics of deliveries"),
        Err(e) => tracing::warn!("cannot delete old statistics of deliveries: {}", error_chain(&e)),
    }
}

pub(crate) async fn create_partitions(pool: &Pool) {
    let now = clock::now();
    match store::partitions::ensure(pool, now.minus(PARTITIONS_BACK), now.plus(PARTITIONS_AHEAD)).await {
        Ok(0) => {}
        Ok(created) => tracing::info!(created, "created partitions of the delivery log"),
        // Meanwhile rows go to the default partition.
        Err(e) => tracing::warn!("cannot create partitions of the delivery log: {}", error_chain(&e)),
    }
}

/// Purges acknowledged events older than `window`, until shutdown.
pub(crate) async fn retention(
    js: jetstream::Context,
    window: Duration,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    every(PURGE_INTERVAL, shutdown, || purge_delivered(&js, window)).await
}

async fn purge_delivered(js: &jetstream::Context, window: Duration) {
    match purge(js, window).await {
        Ok(0) => {}
        Ok(purged) => tracing::debug!(purged, "purged delivered events"),
        Err(e) => tracing::warn!("cannot purge delivered events: {e:#}"),
    }
}

async fn purge(js: &jetstream::Context, window: Duration) -> anyhow::Result<u64> {
    let stream = js.get_stream(LEAD_EVENTS).await.context("cannot find the stream LEAD_EVENTS")?;
    let consumer = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read the consumer's state")?;
    purge_read(&stream, consumer.ack_floor.stream_sequence, clock::now(), window).await
}

/// Runs a task now and after every interval, until shutdown.
async fn every<F: Future<Output = ()>>(
    interval: Duration,
    shutdown: CancellationToken,
    task: impl Fn() -> F,
) -> anyhow::Result<()> {
    let repeat = async {
        loop {
            task().await;
            tokio::time::sleep(interval).await;
        }
    };
    tokio::select! {
        () = repeat => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

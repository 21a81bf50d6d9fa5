//! 7 Deliver: room ahead and room behind: next months' partitions, old ones, and events that everybody was told of.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream;
use contract::streams::{LEAD_EVENTS, NOTIFIER_CONSUMER};
use service_kit::{
    clock,
    nats::error_chain,
    retention::{Retention, purge_read},
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::store;

/// How often the partitions are looked after.
const PARTITIONS_INTERVAL: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How far back the first start makes partitions: events may have waited in their stream.
const PARTITIONS_BACK: Duration = DAY.saturating_mul(31);
/// How far ahead there are partitions. More bridges a longer time without a notifier, after which rows go to the default
/// partition and must be moved.
const PARTITIONS_AHEAD: Duration = DAY.saturating_mul(62);
/// How often delivered events are purged. Longer lets a full stream stay full for longer.
const PURGE_INTERVAL: Duration = Duration::from_secs(15);

/// Keeps partitions ahead of time, and drops those that are too old, until shutdown.
pub(crate) async fn partitions(pool: PgPool, keep: Retention, shutdown: CancellationToken) -> anyhow::Result<()> {
    let keep_house = || async {
        make_partitions(&pool).await;
        drop_partitions(&pool, keep).await;
    };
    every(PARTITIONS_INTERVAL, shutdown, keep_house).await
}

/// Drops the months that are too old. What waits stays, and the month with it.
async fn drop_partitions(pool: &PgPool, keep: Retention) {
    let Some(cutoff) = keep.cutoff(clock::now()) else { return };
    match store::partitions::drop_old(pool, cutoff).await {
        Ok(dropped) if dropped.is_empty() => {}
        Ok(dropped) => tracing::info!(dropped = dropped.join(", "), "months of the delivery log were dropped"),
        Err(e) => tracing::warn!("cannot drop old months of the delivery log: {}", error_chain(&e)),
    }
}

/// Makes the partitions of the next months.
pub(crate) async fn make_partitions(pool: &PgPool) {
    let now = clock::now();
    match store::partitions::ensure(pool, now.minus(PARTITIONS_BACK), now.plus(PARTITIONS_AHEAD)).await {
        Ok(0) => {}
        Ok(made) => tracing::info!(made, "made partitions of the delivery log"),
        // Meanwhile rows go to the default partition.
        Err(e) => tracing::warn!("cannot make partitions of the delivery log: {}", error_chain(&e)),
    }
}

/// Purges the events that every notifier is done with and that are older than `window`, until shutdown.
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
    let stream = js.get_stream(LEAD_EVENTS).await.context("cannot find the stream of events")?;
    let consumer = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read the consumer's state")?;
    purge_read(&stream, consumer.ack_floor.stream_sequence, clock::now(), window).await
}

/// Does something now and after every interval, until shutdown.
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

//! 7 Deliver: creates and drops partitions of the delivery log, ends held deliveries in old ones, deletes the state of
//! removed callbacks, and purges delivered events.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream;
use contract::{
    ObjectId,
    streams::{LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use service_kit::{
    clock,
    nats::error_chain,
    postgres::Pool,
    retention::{Retention, purge_read},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::Callbacks,
    store::{self, error::StoreError, health::ConfiguredIn},
};

/// How often partitions are created and dropped.
const PARTITIONS_INTERVAL: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How far back the first start creates partitions: events may have waited in their stream.
const PARTITIONS_BACK: Duration = DAY.saturating_mul(31);
/// How far ahead partitions are created. If no notifier runs for longer, rows go to the default partition and have to
/// be moved.
const PARTITIONS_AHEAD: Duration = DAY.saturating_mul(62);
/// Maximum number of held deliveries that one statement ends. A larger batch locks rows for longer.
const EXPIRY_BATCH: i64 = 1000;
/// How often the first round checks whether the configuration is complete.
const CONFIGURATION_POLL: Duration = Duration::from_secs(1);
/// How often delivered events are purged. A longer interval lets a full stream stay full for longer.
const PURGE_INTERVAL: Duration = Duration::from_secs(15);

/// Creates and drops partitions, and deletes old statistics and the state of removed callbacks, until shutdown.
pub(crate) async fn partitions(
    pool: Pool,
    retention: Retention,
    statistics: Retention,
    callbacks: Arc<Callbacks>,
    outbox: Arc<Notify>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let maintain = || async {
        create_partitions(&pool).await;
        expire_held(&pool, &callbacks, retention, &outbox).await;
        drop_partitions(&pool, retention).await;
        delete_counts(&pool, statistics).await;
        if let Err(e) = end_pauses(&pool, &callbacks).await {
            tracing::warn!("cannot end the pauses of removed callbacks: {}", error_chain(&e));
        }
        if let Err(e) = forget_disabled(&pool, &callbacks).await {
            tracing::warn!("cannot delete the state of removed callbacks: {}", error_chain(&e));
        }
    };
    every(PARTITIONS_INTERVAL, shutdown, maintain).await
}

/// Ends held deliveries in months that are due to be dropped. These months are dropped once the deliveries are
/// announced as exhausted.
async fn expire_held(pool: &Pool, callbacks: &Callbacks, retention: Retention, outbox: &Notify) {
    let Some(cutoff) = retention.cutoff(clock::now()) else { return };
    // Right after the start, a callback that is off may not be in memory yet.
    wait_for_configuration(callbacks).await;
    let held = callbacks.held();
    let mut expired = 0;
    loop {
        match store::partitions::expire_held(pool, &held, cutoff, clock::now(), EXPIRY_BATCH).await {
            Ok(batch) => {
                expired += batch;
                if batch < EXPIRY_BATCH {
                    break;
                }
            }
            Err(e) => {
                tracing::warn!("cannot end old deliveries that wait for their callback: {}", error_chain(&e));
                break;
            }
        }
    }
    if expired > 0 {
        tracing::warn!(expired, "exhausted deliveries that waited for their callback longer than DELIVERY_RETENTION");
        outbox.notify_one();
    }
}

async fn wait_for_configuration(callbacks: &Callbacks) {
    while !callbacks.view.is_complete() {
        tokio::time::sleep(CONFIGURATION_POLL).await;
    }
}

/// Ends the pauses of callbacks that were removed from their process. The pauses of a process that is missing stay: a
/// lost bucket is filled again.
async fn end_pauses(pool: &Pool, callbacks: &Callbacks) -> Result<(), StoreError> {
    wait_for_configuration(callbacks).await;
    let mut found = Vec::new();
    for (callback_id, known) in store::health::pauses(pool).await? {
        match (callbacks.process_of(callback_id), known) {
            (Some(process), known) if known != Some(process) => found.push((callback_id, process)),
            (None, Some(process)) if is_removed(callbacks, callback_id, process).await => {
                store::health::resume_callback(pool, callback_id, clock::now()).await?;
                tracing::info!(%callback_id, "ended the pause of a removed callback");
            }
            _ => {}
        }
    }
    store::health::note_processes(pool, &found).await
}

/// Deletes the disabled state of callbacks that were removed from their process. As with pauses, the state of a
/// callback stays while its process is missing.
async fn forget_disabled(pool: &Pool, callbacks: &Callbacks) -> Result<(), StoreError> {
    wait_for_configuration(callbacks).await;
    for (callback_id, process) in store::health::processes_of_disabled(pool).await? {
        if callbacks.process_of(callback_id).is_none()
            && is_removed(callbacks, callback_id, process).await
            && store::health::forget_disabled(pool, callback_id).await?
        {
            tracing::info!(%callback_id, "deleted the disabled state of a removed callback");
        }
    }
    Ok(())
}

/// Whether a callback was removed from its process. A process that cannot be read may still have it.
async fn is_removed(callbacks: &Callbacks, callback_id: ObjectId, process: ConfiguredIn) -> bool {
    callbacks.is_removed(callback_id, process).await.unwrap_or(false)
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

//! 3 Read in order, 6 Announce: measures how far applying and announcing lag behind the log.
//!
//! Every instance measures, including standbys, because a leader that hangs would report no lag. While Postgres is
//! unavailable nothing is applied, so the last known checkpoint still holds, and the lag grows with the log.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context;
use async_nats::jetstream;
use contract::{
    Timestamp,
    rpc::Lag,
    streams::{LEAD_COMMANDS, LEAD_EVENTS},
};
use service_kit::{clock, idempotency::bucket_lasts, metrics::age, nats::error_chain, postgres::Pool};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    recovery::state::logged_at,
    store::{
        StoreError,
        checkpoint::{self, Checkpoint},
        housekeeping, ledger, queued_updates,
    },
};

/// Longer intervals hide short waits, shorter ones cost requests.
const INTERVAL: Duration = Duration::from_secs(5);

/// The values last read from Postgres.
#[derive(Default)]
struct Known {
    checkpoint: Option<Checkpoint>,
    /// When the oldest unannounced update was applied.
    unannounced_since: Option<Timestamp>,
}

/// The last measurement, for queries.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastLag(Arc<RwLock<Lag>>);

impl LastLag {
    pub(crate) fn get(&self) -> Lag {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, lag: Lag) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = lag;
    }
}

/// Measures until shutdown.
pub(crate) async fn watch(
    pool: Pool,
    js: jetstream::Context,
    metrics: Metrics,
    last: LastLag,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut known = Known::default();
    let watch = async {
        loop {
            if let Err(e) = read_postgres(&pool, &metrics, &mut known).await {
                tracing::debug!("cannot read the checkpoint: {}", error_chain(&e));
            }
            match bucket_lasts(&js).await {
                Ok(lasts) => {
                    metrics.lag.idempotency_lasts.set(lasts.as_secs_f64());
                }
                Err(e) => tracing::debug!("cannot measure the bucket of idempotency keys: {e:#}"),
            }
            match measure_streams(&js, &metrics, &known).await {
                Ok(Some(lag)) => last.set(lag),
                Ok(None) => {}
                Err(e) => tracing::debug!("cannot read the state of the streams: {e:#}"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    shutdown.run_until_cancelled(watch).await;
    Ok(())
}

async fn read_postgres(pool: &Pool, metrics: &Metrics, known: &mut Known) -> Result<(), StoreError> {
    let checkpoint = checkpoint::get(pool, LEAD_COMMANDS).await?;
    known.unannounced_since = match &checkpoint {
        Some(at) if at.announced < at.applied => ledger::first_applied_after(pool, at.announced).await?,
        _ => None,
    };
    known.checkpoint = checkpoint;
    metrics.lag.active_calls.set(housekeeping::count_active_calls(pool, clock::now()).await?);
    metrics.lag.queued_updates.set(i64::try_from(queued_updates::count(pool).await?).unwrap_or(i64::MAX));
    Ok(())
}

async fn measure_streams(js: &jetstream::Context, metrics: &Metrics, known: &Known) -> anyhow::Result<Option<Lag>> {
    let lag = &metrics.lag;
    let log = js.get_stream(LEAD_COMMANDS).await.with_context(|| format!("cannot find {LEAD_COMMANDS}"))?;
    let events = js.get_stream(LEAD_EVENTS).await.with_context(|| format!("cannot find {LEAD_EVENTS}"))?;
    for (name, stream) in [(LEAD_COMMANDS, &log), (LEAD_EVENTS, &events)] {
        let info = stream.cached_info();
        let bytes = i64::try_from(info.state.bytes).unwrap_or(i64::MAX);
        lag.stream_bytes.get_or_create(&[("stream", name)]).set(bytes);
        // An unbounded stream has no sample.
        if info.config.max_bytes > 0 {
            lag.stream_max_bytes.get_or_create(&[("stream", name)]).set(info.config.max_bytes);
        }
    }
    let Some(checkpoint) = &known.checkpoint else { return Ok(None) };
    let (applied, announced) = (checkpoint.applied, checkpoint.announced);
    let state = &log.cached_info().state;
    // Messages, not commands: how many a pack holds is known only once it is read.
    let behind = (state.last_sequence + 1).saturating_sub(checkpoint.next_sequence());
    let oldest = match behind {
        0 => None,
        _ => logged_at(&log, state.first_sequence.max(checkpoint.next_sequence())).await?,
    };
    let now = clock::now();
    lag.log_messages.set(i64::try_from(behind).unwrap_or(i64::MAX));
    lag.log_seconds.set(oldest.map_or(0.0, |at| age(now, at)));
    // The length of an older epoch that is announced again is unknown.
    let from = if announced.epoch < applied.epoch { 0 } else { announced.sequence };
    lag.announce_messages.set(i64::try_from(applied.sequence.saturating_sub(from)).unwrap_or(i64::MAX));
    lag.announce_seconds.set(known.unannounced_since.map_or(0.0, |at| age(now, at)));
    lag.measured_at.set(now.millis() as f64 / 1000.0);
    Ok(Some(Lag {
        measured_at: Some(now),
        unapplied_since: oldest,
        unapplied_messages: Some(behind),
        unannounced_since: known.unannounced_since,
    }))
}

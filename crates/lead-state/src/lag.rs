//! 3 Read in order, 6 Announce: how far behind the log everything is, for the metrics.
//!
//! Every instance looks for itself, the standbys too: a leader that hangs would show that all is well. While Postgres is
//! away nothing is applied, so what was last seen of the checkpoint still holds, and the lag grows with the log.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream;
use contract::{
    Timestamp,
    streams::{LEAD_COMMANDS, LEAD_EVENTS},
};
use service_kit::{clock, metrics::age, nats::error_chain};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    recovery::logged_at,
    store::{
        StoreError,
        checkpoint::{self, Checkpoint},
        held, ledger,
    },
};

/// How often. Longer hides short waits, shorter asks NATS and Postgres more for nothing.
const INTERVAL: Duration = Duration::from_secs(5);

/// What Postgres said last.
#[derive(Default)]
struct Known {
    checkpoint: Option<Checkpoint>,
    /// When the oldest update was applied that is not announced.
    waiting: Option<Timestamp>,
}

/// Shows how far behind everything is, until shutdown.
pub(crate) async fn watch(
    pool: PgPool,
    js: jetstream::Context,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut known = Known::default();
    let watch = async {
        loop {
            if let Err(e) = ask(&pool, &metrics, &mut known).await {
                tracing::debug!("cannot read how far the log is applied: {}", error_chain(&e));
            }
            if let Err(e) = look(&js, &metrics, &known).await {
                tracing::debug!("cannot see how far the log goes: {e:#}");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    shutdown.run_until_cancelled(watch).await;
    Ok(())
}

/// Asks Postgres.
async fn ask(pool: &PgPool, metrics: &Metrics, known: &mut Known) -> Result<(), StoreError> {
    let checkpoint = checkpoint::get(pool, LEAD_COMMANDS).await?;
    known.waiting = match &checkpoint {
        Some(at) if at.published() < (at.epoch, at.last_seq) => ledger::first_behind(pool, at.published()).await?,
        _ => None,
    };
    known.checkpoint = checkpoint;
    metrics.lag.active_calls.set(ledger::active_calls(pool, clock::now()).await?);
    metrics.lag.held_updates.set(i64::try_from(held::count(pool).await?).unwrap_or(i64::MAX));
    Ok(())
}

/// Looks at the streams, and shows what is known now.
async fn look(js: &jetstream::Context, metrics: &Metrics, known: &Known) -> anyhow::Result<()> {
    let lag = &metrics.lag;
    let log = js.get_stream(LEAD_COMMANDS).await.context("cannot find the log")?;
    let events = js.get_stream(LEAD_EVENTS).await.context("cannot find the events")?;
    for (name, stream) in [(LEAD_COMMANDS, &log), (LEAD_EVENTS, &events)] {
        let info = stream.cached_info();
        let bytes = i64::try_from(info.state.bytes).unwrap_or(i64::MAX);
        lag.stream_bytes.get_or_create(&[("stream", name)]).set(bytes);
        // Without a bound there is no number that says so.
        if info.config.max_bytes > 0 {
            lag.stream_max_bytes.get_or_create(&[("stream", name)]).set(info.config.max_bytes);
        }
    }
    let Some(checkpoint) = &known.checkpoint else { return Ok(()) };
    let state = &log.cached_info().state;
    let behind = state.last_sequence.saturating_sub(checkpoint.last_seq);
    let oldest = match behind {
        0 => None,
        _ => logged_at(&log, state.first_sequence.max(checkpoint.last_seq + 1)).await?,
    };
    let now = clock::now();
    lag.log_messages.set(i64::try_from(behind).unwrap_or(i64::MAX));
    lag.log_seconds.set(oldest.map_or(0.0, |at| age(now, at)));
    // Of an older epoch that is announced again it is not known how long it was.
    let from = if checkpoint.published_epoch < checkpoint.epoch { 0 } else { checkpoint.published_seq };
    lag.announce_messages.set(i64::try_from(checkpoint.last_seq.saturating_sub(from)).unwrap_or(i64::MAX));
    lag.announce_seconds.set(known.waiting.map_or(0.0, |at| age(now, at)));
    lag.seen.set(now.millis() as f64 / 1000.0);
    Ok(())
}

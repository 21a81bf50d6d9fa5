//! 7 Deliver, 8 Retry: measures the backlog for the metrics.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream::{self, stream::RawMessageErrorKind};
use contract::streams::{LEAD_EVENTS, NOTIFIER_CONSUMER};
use service_kit::{clock, metrics::age, nats::error_chain, postgres::Pool};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::Callbacks,
    metrics::Backlog,
    store::{self, error::StoreError},
};

/// How often the backlog is measured. A longer interval hides short backlogs; a shorter one costs NATS and Postgres
/// more queries.
const INTERVAL: Duration = Duration::from_secs(5);

/// Measures until shutdown.
pub(crate) async fn watch(
    pool: Pool,
    js: jetstream::Context,
    callbacks: Arc<Callbacks>,
    metrics: Backlog,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let watch = async {
        loop {
            let deliveries = deliveries(&pool, &callbacks, &metrics).await;
            let events = events(&js, &metrics).await;
            match deliveries.map_err(|e| anyhow::anyhow!(error_chain(&e))).and(events) {
                Ok(()) => _ = metrics.seen.set(clock::now().millis() as f64 / 1000.0),
                Err(e) => tracing::debug!("cannot measure the backlog: {e:#}"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    shutdown.run_until_cancelled(watch).await;
    Ok(())
}

async fn deliveries(pool: &Pool, callbacks: &Callbacks, metrics: &Backlog) -> Result<(), StoreError> {
    let pending = store::backlog::pending(pool, &callbacks.held()).await?;
    metrics.pending.set(pending.count);
    metrics.oldest_pending.set(pending.oldest_at.map_or(0.0, |at| age(clock::now(), at)));
    metrics.held.set(pending.held);
    metrics.parked.set(store::parked::count(pool).await?);
    Ok(())
}

async fn events(js: &jetstream::Context, metrics: &Backlog) -> anyhow::Result<()> {
    let stream = js.get_stream(LEAD_EVENTS).await.context("cannot find the stream LEAD_EVENTS")?;
    let consumer = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read the consumer's state")?;
    let waiting = consumer.num_pending + consumer.num_ack_pending as u64;
    metrics.events.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    let oldest = match waiting {
        0 => None,
        _ => {
            let first = stream.cached_info().state.first_sequence;
            match stream.get_raw_message(first.max(consumer.ack_floor.stream_sequence + 1)).await {
                Ok(message) => Some(message.time.into()),
                Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => None,
                Err(e) => return Err(e).context("cannot read the oldest event"),
            }
        }
    };
    metrics.oldest_event.set(oldest.map_or(0.0, |at| age(clock::now(), at)));
    Ok(())
}

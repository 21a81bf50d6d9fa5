//! 6 Announce, 7 Deliver: watches for a checkpoint that an operator moved, and records the delivered watermark.

use std::time::Duration;

use async_nats::jetstream::{self, stream::Stream};
use contract::{
    position::LogPosition,
    streams::{LEAD_COMMANDS, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use service_kit::{nats::error_chain, postgres::Pool};
use tokio::sync::watch;

use super::state::event_position;
use crate::store::{
    self,
    checkpoint::{self, Checkpoint},
};

const INTERVAL: Duration = Duration::from_secs(1);
/// The delivered watermark is recorded once per this many intervals. Recording it less often causes more repeated
/// deliveries when events are lost.
const RECORD_EVERY: u32 = 10;

/// Returns when the checkpoint is no longer that of this term, or when events were lost. The next term announces lost
/// events again. `last_stored` is the last sequence of the event stream.
pub(crate) async fn watch_checkpoint(
    pool: Pool,
    js: jetstream::Context,
    term: Checkpoint,
    last_stored: watch::Receiver<u64>,
) -> String {
    let mut rounds = 0_u32;
    loop {
        tokio::time::sleep(INTERVAL).await;
        match checkpoint::get(&pool, LEAD_COMMANDS).await {
            Ok(Some(now)) if (now.generation, now.applied.epoch) != (term.generation, term.applied.epoch) => {
                return "the checkpoint was moved by a recovery".into();
            }
            Ok(Some(now)) if rounds.is_multiple_of(RECORD_EVERY) => {
                let last_stored = *last_stored.borrow();
                match record_delivered(&pool, &js, &now, last_stored).await {
                    Ok(true) => {}
                    // The next term announces the lost events again.
                    Ok(false) => return format!("{LEAD_EVENTS} lost events"),
                    Err(e) => tracing::debug!("cannot record the delivered watermark: {e:#}"),
                }
            }
            Ok(_) => {}
            Err(e) => tracing::debug!("cannot read the checkpoint: {}", error_chain(&e)),
        }
        rounds = rounds.wrapping_add(1);
    }
}

/// Records the watermark. Returns false instead if the stream lost events. `checkpoint` and `last_stored` must have
/// been read before.
async fn record_delivered(
    pool: &Pool,
    js: &jetstream::Context,
    checkpoint: &Checkpoint,
    last_stored: u64,
) -> anyhow::Result<bool> {
    let mut events = js.get_stream(LEAD_EVENTS).await?;
    if events.cached_info().state.last_sequence < last_stored {
        // A server that was the stream's leader before may have answered.
        tokio::time::sleep(INTERVAL).await;
        if events.info().await?.state.last_sequence < last_stored {
            checkpoint::forget_events(&mut store::acquire(pool).await?, checkpoint).await?;
            return Ok(false);
        }
    }
    if let Some(delivered) = delivered_watermark(&events, checkpoint).await? {
        checkpoint::set_delivered(&mut store::acquire(pool).await?, checkpoint, delivered).await?;
    }
    Ok(true)
}

/// The position up to which the webhook-notifier acked all events; None if that is unknown.
async fn delivered_watermark(events: &Stream, checkpoint: &Checkpoint) -> anyhow::Result<Option<LogPosition>> {
    let Ok(consumer) = events.consumer_info(NOTIFIER_CONSUMER).await else { return Ok(None) };
    let acked = consumer.ack_floor.stream_sequence;
    if acked == 0 {
        return Ok(None);
    }
    if acked >= events.cached_info().state.last_sequence && consumer.num_pending == 0 {
        // All events are acked, and all that counted as announced before were in the stream.
        return Ok(Some(checkpoint.announced));
    }
    let position = event_position(events, acked).await?;
    // Several events share a position when a call ended and released queued updates, so only the position before is
    // certain.
    Ok(position.filter(|at| at.generation == checkpoint.generation).map(|at| at.log.before()))
}

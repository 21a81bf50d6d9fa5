//! 6 Announce, 7 Deliver: watches for a checkpoint that an operator moved, and records the delivered watermark.

use std::time::Duration;

use async_nats::jetstream::{self, stream::Stream};
use contract::{
    position::LogPosition,
    streams::{self, LEAD_COMMANDS, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use service_kit::{nats::error_chain, postgres::Pool};

use super::state::event_position;
use crate::store::{
    self,
    checkpoint::{self, Checkpoint},
};

const INTERVAL: Duration = Duration::from_secs(1);
/// The delivered watermark is recorded once in so many intervals. Less often means more repeated deliveries when the
/// events are lost.
const RECORD_EVERY: u32 = 10;

/// Returns when the checkpoint is not that of this term any more.
pub(crate) async fn watch_checkpoint(pool: Pool, js: jetstream::Context, term: Checkpoint) -> String {
    let mut rounds = 0_u32;
    loop {
        tokio::time::sleep(INTERVAL).await;
        match checkpoint::get(&pool, LEAD_COMMANDS).await {
            Ok(Some(now)) if (now.generation, now.applied.epoch) != (term.generation, term.applied.epoch) => {
                return "the checkpoint was moved by a recovery".into();
            }
            Ok(Some(now)) if rounds.is_multiple_of(RECORD_EVERY) => match record_delivered(&pool, &js, &now).await {
                Ok(true) => {}
                // The next term announces again what it lost.
                Ok(false) => return format!("{LEAD_EVENTS} was deleted and created again"),
                Err(e) => tracing::debug!("cannot record the delivered watermark: {e:#}"),
            },
            Ok(_) => {}
            Err(e) => tracing::debug!("cannot read the checkpoint: {}", error_chain(&e)),
        }
        rounds = rounds.wrapping_add(1);
    }
}

/// Records the watermark, unless the stream is not the one that the events were announced to: then false. `checkpoint` must
/// have been read before.
async fn record_delivered(pool: &Pool, js: &jetstream::Context, checkpoint: &Checkpoint) -> anyhow::Result<bool> {
    let events = js.get_stream(LEAD_EVENTS).await?;
    let identity = streams::identity(events.cached_info());
    if checkpoint.events_created_at.as_ref().is_some_and(|known| *known != identity) {
        return Ok(false);
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

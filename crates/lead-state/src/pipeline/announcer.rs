//! 6 Announce: publishes completion events from the ledger. JetStream acks them before the announce watermark moves.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::message::OutboundMessage;
use bytes::Bytes;
use contract::{
    headers,
    position::{EventPosition, LogPosition},
    subject,
};
use service_kit::{
    clock,
    nats::{error_chain, retry_backoff},
    postgres::Pool,
    publish::message,
    publisher::Publisher,
    traces::{Span, Step, Traces},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::timeout,
};

use crate::store::{
    self, StoreError,
    checkpoint::{Checkpoint, set_announced},
    ledger::{Announcement, outbox},
};

/// Limit of the events that wait for the announcer. More of them hide a slower NATS, and are held in memory.
const WAITING_EVENTS: u32 = 1000;
/// How long the applier may be idle before the watermark is written in a transaction of its own. Otherwise the next
/// batch writes it. A longer time announces more events again after a crash; a shorter one competes with the applier
/// for the checkpoint's row.
const WRITE_AFTER: Duration = Duration::from_millis(20);
/// How many events are read from the ledger at once after a crash. They may have a MiB each.
const BACKLOG_ROWS: i64 = 64;

/// The events of batches that are written.
#[derive(Debug)]
struct AppliedBatches {
    /// In log order.
    announcements: Vec<Announcement>,
    /// The position of the last entry.
    last: LogPosition,
    /// The place that they take until they are announced.
    room: OwnedSemaphorePermit,
}

/// Where the applier hands over the batches that it has written.
#[derive(Debug)]
pub(crate) struct ToAnnounce {
    sender: mpsc::Sender<AppliedBatches>,
    room: Arc<Semaphore>,
}

impl ToAnnounce {
    /// Hands over the events of a batch, once there is room for them. Does nothing if the announcer has ended: the next
    /// term announces from the ledger.
    pub(crate) async fn send(&self, announcements: Vec<Announcement>, last: LogPosition) {
        let events = u32::try_from(announcements.len()).unwrap_or(u32::MAX).clamp(1, WAITING_EVENTS);
        let room = tokio::select! {
            room = self.room.clone().acquire_many_owned(events) => room,
            () = self.sender.closed() => return,
        };
        // It is never closed.
        let Ok(room) = room else { return };
        let _ = self.sender.send(AppliedBatches { announcements, last, room }).await;
    }
}

pub(crate) fn channel() -> (ToAnnounce, Applied) {
    // A batch without events takes one place, too, so the channel always has room for what the semaphore lets pass.
    let (sender, receiver) = mpsc::channel(WAITING_EVENTS as usize);
    (ToAnnounce { sender, room: Arc::new(Semaphore::new(WAITING_EVENTS as usize)) }, Applied(receiver))
}

/// Where the announcer takes the batches that are written.
#[derive(Debug)]
pub(crate) struct Applied(mpsc::Receiver<AppliedBatches>);

impl Applied {
    /// All batches that wait, as one: a server that syncs before it acknowledges does so once for many events. None once
    /// the applier has ended.
    async fn recv(&mut self) -> Option<AppliedBatches> {
        let mut batches = self.0.recv().await?;
        while let Ok(next) = self.0.try_recv() {
            batches.announcements.extend(next.announcements);
            batches.last = next.last;
            batches.room.merge(next.room);
        }
        Some(batches)
    }
}

pub(crate) struct Announcer {
    pub(crate) pool: Pool,
    pub(crate) events: Publisher,
    pub(crate) checkpoint: Checkpoint,
    /// The announce watermark. The applier writes it with its next batch.
    pub(crate) announced: watch::Sender<LogPosition>,
    pub(crate) traces: Traces,
}

impl Announcer {
    /// Announces every applied batch, until the channel is closed.
    pub(crate) async fn run(self, mut applied: Applied) -> Result<(), StoreError> {
        let mut written = self.checkpoint.announced;
        loop {
            let batches = match timeout(WRITE_AFTER, applied.recv()).await {
                Ok(batches) => batches,
                Err(_) if *self.announced.borrow() == written => applied.recv().await,
                Err(_) => {
                    written = *self.announced.borrow();
                    self.write_watermark(written).await?;
                    continue;
                }
            };
            let Some(AppliedBatches { announcements, last, room }) = batches else { break };
            self.announce(&announcements, last).await;
            self.announced.send_replace(last);
            drop(room);
        }
        let announced = *self.announced.borrow();
        self.write_watermark(announced).await
    }

    /// Announces the ledger's rows between the watermark and the checkpoint, which a crash or a rewind left, epoch by
    /// epoch.
    pub(crate) async fn catch_up(&mut self) -> Result<(), StoreError> {
        let applied = self.checkpoint.applied;
        if self.checkpoint.announced < applied {
            tracing::info!(announced = %self.checkpoint.announced, %applied, "announcing the ledger's backlog");
        }
        while self.checkpoint.announced < applied {
            let announced = self.checkpoint.announced;
            let end = LogPosition { epoch: announced.epoch, sequence: i64::MAX as u64, index: u32::MAX };
            let rows = outbox(&self.pool, announced, applied.min(end), BACKLOG_ROWS).await?;
            let up_to = match rows.last() {
                Some(row) if rows.len() as i64 >= BACKLOG_ROWS => row.decided_at,
                _ if announced.epoch < applied.epoch => LogPosition::message(announced.epoch + 1, 0),
                _ => applied,
            };
            self.announce(&rows, up_to).await;
            self.write_watermark(up_to).await?;
            self.checkpoint.announced = up_to;
            self.announced.send_replace(up_to);
        }
        Ok(())
    }

    /// Publishes events until JetStream has acked all of them.
    async fn announce(&self, announcements: &[Announcement], up_to: LogPosition) {
        let prepared: Vec<_> = announcements.iter().map(|announcement| self.serialize(announcement)).collect();
        for delay in retry_backoff() {
            // A retry publishes all of them; JetStream drops those that it has by their message ids.
            let messages: Vec<_> = announcements
                .iter()
                .zip(&prepared)
                .map(|(announcement, event)| outbound(announcement, event, self.checkpoint.generation))
                .collect();
            match self.events.publish_all(messages).await {
                Ok(()) => break,
                Err(e) => {
                    tracing::warn!(%up_to, "cannot announce, retrying: {e}");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    fn serialize(&self, announcement: &Announcement) -> SerializedEvent {
        let event = &announcement.event;
        let mut span = self.traces.begin(Step::Announce, announcement.traceparent.as_deref());
        span.update(event.update_id);
        #[allow(clippy::expect_used, reason = "a completion event always serializes")]
        let payload = serde_json::to_vec(event).expect("a completion event serializes").into();
        SerializedEvent { payload, span }
    }

    async fn write_watermark(&self, up_to: LogPosition) -> Result<(), StoreError> {
        for delay in retry_backoff() {
            let written = async {
                let mut connection = store::acquire(&self.pool).await?;
                set_announced(&mut connection, &self.checkpoint, up_to, clock::now()).await
            };
            match written.await {
                Ok(()) => break,
                Err(StoreError::Unavailable(e)) => {
                    tracing::warn!(%up_to, "cannot write the announce watermark, retrying: {}", error_chain(&e));
                    tokio::time::sleep(delay).await;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

struct SerializedEvent {
    payload: Bytes,
    /// Until JetStream has acked it.
    span: Span,
}

fn outbound(announcement: &Announcement, event: &SerializedEvent, generation: i32) -> OutboundMessage {
    let Announcement { decided_at, traceparent, event: completion } = announcement;
    // Two projects may have an update with the same id. JetStream remembers the ids of the generation before and would drop
    // the event as a duplicate.
    let id = match generation {
        0 => format!("{}-{}", completion.update_id, completion.project_id),
        generation => format!("{}-{}-{generation}", completion.update_id, completion.project_id),
    };
    let own = event.span.traceparent();
    let mut message = message(
        subject::event(completion.project_id, completion.process_id, completion.kind, completion.success),
        &id,
        own.as_deref().or(traceparent.as_deref()),
        event.payload.clone(),
    );
    let position = EventPosition { generation, log: *decided_at };
    message.headers.get_or_insert_default().insert(headers::POSITION, position.to_string());
    message
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn batches_that_wait_are_announced_together_and_hold_their_room_until_then() {
        let (to_announce, mut applied) = channel();
        for sequence in 1..=u64::from(WAITING_EVENTS) {
            to_announce.send(Vec::new(), LogPosition::message(1, sequence)).await;
        }
        let last = LogPosition::message(1, u64::from(WAITING_EVENTS) + 1);
        assert!(to_announce.send(Vec::new(), last).now_or_never().is_none(), "there is no room");

        let waiting = applied.recv().await.expect("batches");
        assert_eq!(waiting.last, LogPosition::message(1, u64::from(WAITING_EVENTS)));
        assert!(to_announce.send(Vec::new(), last).now_or_never().is_none(), "they are not announced yet");
        drop(waiting);
        to_announce.send(Vec::new(), last).await;
        assert_eq!(applied.recv().await.expect("a batch").last, last);

        drop(applied);
        to_announce.send(Vec::new(), last).await;
    }
}

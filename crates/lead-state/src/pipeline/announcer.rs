//! 6 Announce: publishes completion events from the ledger. JetStream acks them before the announce watermark moves.

use std::time::Duration;

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
    sync::{mpsc, watch},
    time::timeout,
};

use crate::store::{
    self, StoreError,
    checkpoint::{Checkpoint, set_announced},
    ledger::{Announcement, outbox},
};

/// Limit of the applied batches that wait for the announcer. More of them hide a slower NATS, and are held in memory.
const WAITING_BATCHES: usize = 2;
/// How long the applier may be idle before the watermark is written in a transaction of its own. Otherwise the next
/// batch writes it. A longer time announces more events again after a crash; a shorter one competes with the applier
/// for the checkpoint's row.
const WRITE_AFTER: Duration = Duration::from_millis(20);
/// How many events are read from the ledger at once after a crash. They may have a MiB each.
const BACKLOG_ROWS: i64 = 64;

/// The events of a batch that is written.
#[derive(Debug)]
pub(crate) struct AppliedBatch {
    /// In log order.
    pub(crate) announcements: Vec<Announcement>,
    /// The position of the last message.
    pub(crate) last: LogPosition,
}

pub(crate) fn channel() -> (mpsc::Sender<AppliedBatch>, mpsc::Receiver<AppliedBatch>) {
    mpsc::channel(WAITING_BATCHES)
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
    pub(crate) async fn run(self, mut applied: mpsc::Receiver<AppliedBatch>) -> Result<(), StoreError> {
        let mut written = self.checkpoint.announced;
        loop {
            let batch = match timeout(WRITE_AFTER, applied.recv()).await {
                Ok(batch) => batch,
                Err(_) if *self.announced.borrow() == written => applied.recv().await,
                Err(_) => {
                    written = *self.announced.borrow();
                    self.write_watermark(written).await?;
                    continue;
                }
            };
            let Some(batch) = batch else { break };
            self.announce(&batch.announcements, batch.last).await;
            self.announced.send_replace(batch.last);
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
    // JetStream remembers the ids of the generation before and would drop the event as a duplicate.
    let id = match generation {
        0 => completion.update_id.to_string(),
        generation => format!("{}-{generation}", completion.update_id),
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

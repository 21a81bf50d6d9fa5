//! 6 Announce: completion events from the ledger, acked by JetStream before `published_seq` moves on.

use std::time::Duration;

use async_nats::jetstream;
use contract::{headers, subject};
use service_kit::{
    clock,
    nats::{error_chain, retry_backoff},
    publish::message,
    publisher::Publisher,
    traces::{Span, Step, Traces},
};
use sqlx::PgPool;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use crate::store::{
    StoreError,
    checkpoint::{Checkpoint, set_published},
    ledger::{Announcement, outbox},
};

/// How many applied batches may wait to be announced. More of them hide a slower NATS, and are held in memory.
const WAITING_BATCHES: usize = 2;
/// How long nothing more may be applied before it is noted in a transaction of its own what is announced; else the next
/// batch's transaction notes it. Longer announces more again after a crash, shorter competes with the applier for the
/// checkpoint.
const NOTE_AFTER: Duration = Duration::from_millis(20);
/// How many events are read back from the ledger at once after a crash. They may hold a MiB each.
const BACKLOG_ROWS: i64 = 64;

/// The events of an applied batch.
#[derive(Debug)]
pub(crate) struct Batch {
    /// In log order.
    pub(crate) announcements: Vec<Announcement>,
    /// The last log entry of the batch.
    pub(crate) up_to: u64,
}

/// Makes the channel between the applier and the announcer.
pub(crate) fn channel() -> (mpsc::Sender<Batch>, mpsc::Receiver<Batch>) {
    mpsc::channel(WAITING_BATCHES)
}

/// Publishes what the ledger holds behind `published_seq`, and from then on what is applied, until the channel ends.
pub(crate) struct Announcer {
    pub(crate) pool: PgPool,
    pub(crate) events: Publisher,
    pub(crate) checkpoint: Checkpoint,
    /// How far it is. Who applies notes that on the way.
    pub(crate) announced: watch::Sender<(i32, u64)>,
    pub(crate) traces: Traces,
}

impl Announcer {
    pub(crate) async fn run(self, mut applied: mpsc::Receiver<Batch>) -> Result<(), StoreError> {
        let epoch = self.checkpoint.epoch;
        let mut noted = self.checkpoint.published();
        loop {
            let batch = match timeout(NOTE_AFTER, applied.recv()).await {
                Ok(batch) => batch,
                Err(_) if *self.announced.borrow() == noted => applied.recv().await,
                Err(_) => {
                    noted = *self.announced.borrow();
                    self.note(noted).await?;
                    continue;
                }
            };
            let Some(batch) = batch else { break };
            self.announce(&batch.announcements, epoch, batch.up_to).await;
            self.announced.send_replace((epoch, batch.up_to));
        }
        let announced = *self.announced.borrow();
        self.note(announced).await
    }

    /// Announces what a crash left unannounced, or what was taken back: all of it, epoch by epoch.
    pub(crate) async fn catch_up(&mut self) -> Result<(), StoreError> {
        let last = (self.checkpoint.epoch, self.checkpoint.last_seq);
        if self.checkpoint.published() < last {
            let Checkpoint { last_seq, published_epoch, published_seq, .. } = self.checkpoint;
            tracing::info!(published_epoch, published_seq, last_seq, "announcing what was applied but not announced");
        }
        while self.checkpoint.published() < last {
            let (epoch, published) = self.checkpoint.published();
            let end = if epoch == last.0 { last.1 } else { i64::MAX as u64 };
            let rows = outbox(&self.pool, epoch, published, end, BACKLOG_ROWS).await?;
            let up_to = match rows.last() {
                Some(row) if rows.len() as i64 >= BACKLOG_ROWS => (epoch, row.seq),
                _ if epoch < last.0 => (epoch + 1, 0),
                _ => last,
            };
            self.announce(&rows, epoch, up_to.1).await;
            self.note(up_to).await?;
            (self.checkpoint.published_epoch, self.checkpoint.published_seq) = up_to;
            self.announced.send_replace(up_to);
        }
        Ok(())
    }

    /// Publishes events until JetStream has them all.
    async fn announce(&self, announcements: &[Announcement], epoch: i32, up_to: u64) {
        let spans: Vec<_> = announcements.iter().map(|announcement| self.begin(announcement)).collect();
        for delay in retry_backoff() {
            // Again all of them: those that are there already are known by their message ids.
            let messages: Vec<_> = announcements
                .iter()
                .zip(&spans)
                .map(|(announcement, span)| outbound(announcement, span, &self.checkpoint, epoch))
                .collect();
            match self.events.publish_all(messages).await {
                Ok(()) => break,
                Err(e) => {
                    tracing::warn!(up_to, "cannot announce, trying again: {e}");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    fn begin(&self, announcement: &Announcement) -> Span {
        let mut span = self.traces.begin(Step::Announce, announcement.traceparent.as_deref());
        span.update(announcement.event.update_id);
        span
    }

    /// Notes how far it is announced.
    async fn note(&self, up_to: (i32, u64)) -> Result<(), StoreError> {
        for delay in retry_backoff() {
            match set_published(&self.pool, &self.checkpoint, up_to, clock::now()).await {
                Ok(()) => break,
                Err(StoreError::Unavailable(e)) => {
                    tracing::warn!(
                        up_to = up_to.1,
                        "cannot note what was announced, trying again: {}",
                        error_chain(&e)
                    );
                    tokio::time::sleep(delay).await;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The message of an event. What is announced again after a recovery goes under an id of its own: JetStream would take it
/// for the one that it still remembers.
fn outbound(
    announcement: &Announcement,
    span: &Span,
    checkpoint: &Checkpoint,
    epoch: i32,
) -> jetstream::message::OutboundMessage {
    let event = &announcement.event;
    let own = span.traceparent();
    #[allow(clippy::expect_used, reason = "an event always serializes")]
    let payload = serde_json::to_vec(event).expect("an event serializes");
    let id = match checkpoint.generation {
        0 => event.update_id.to_string(),
        generation => format!("{}-{generation}", event.update_id),
    };
    let mut message = message(
        subject::event(event.project_id, event.process_id, event.success),
        &id,
        own.as_deref().or(announcement.traceparent.as_deref()),
        payload.into(),
    );
    let position = checkpoint.position(epoch, announcement.seq);
    message.headers.get_or_insert_default().insert(headers::POSITION, position.to_string());
    message
}

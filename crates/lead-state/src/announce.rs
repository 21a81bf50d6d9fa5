//! 6 Announce: completion events from the ledger, acked by JetStream before `published_seq` moves on.

use async_nats::jetstream;
use contract::subject;
use service_kit::{
    batch::Publisher,
    clock,
    nats::{chain, patient},
    publish::message,
};
use sqlx::PgPool;
use tokio::sync::mpsc;

use crate::store::{
    StoreError,
    checkpoint::{Checkpoint, set_published},
    ledger::{Announcement, outbox},
};

/// How many applied batches may wait to be announced. More of them hide a slower NATS, and are held in memory.
const WAITING_BATCHES: usize = 2;
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
}

impl Announcer {
    pub(crate) async fn run(self, mut applied: mpsc::Receiver<Batch>) -> Result<(), StoreError> {
        while let Some(batch) = applied.recv().await {
            self.announce(&batch.announcements, batch.up_to).await?;
        }
        Ok(())
    }

    /// Announces what a crash left unannounced.
    pub(crate) async fn catch_up(&mut self) -> Result<(), StoreError> {
        let Checkpoint { last_seq, published_seq, .. } = self.checkpoint;
        if published_seq < last_seq {
            tracing::info!(published_seq, last_seq, "announcing what was applied but not announced");
        }
        while self.checkpoint.published_seq < last_seq {
            let published = self.checkpoint.published_seq;
            let rows = outbox(&self.pool, &self.checkpoint, published, last_seq, BACKLOG_ROWS).await?;
            let whole = (rows.len() as i64) < BACKLOG_ROWS;
            let up_to = rows.last().filter(|_| !whole).map_or(last_seq, |row| row.log_seq);
            self.announce(&rows, up_to).await?;
            self.checkpoint.published_seq = up_to;
        }
        Ok(())
    }

    /// Publishes events until JetStream has them all, then notes it.
    async fn announce(&self, announcements: &[Announcement], up_to: u64) -> Result<(), StoreError> {
        for delay in patient() {
            // Again all of them: those that are there already are known by their message ids.
            match self.events.publish_all(announcements.iter().map(outbound)).await {
                Ok(()) => break,
                Err(e) => {
                    tracing::warn!(up_to, "cannot announce, trying again: {e}");
                    tokio::time::sleep(delay).await;
                }
            }
        }
        for delay in patient() {
            match set_published(&self.pool, &self.checkpoint, up_to, clock::now()).await {
                Ok(()) => break,
                Err(StoreError::Unavailable(e)) => {
                    tracing::warn!(up_to, "cannot note what was announced, trying again: {}", chain(&e));
                    tokio::time::sleep(delay).await;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn outbound(announcement: &Announcement) -> jetstream::message::OutboundMessage {
    let event = &announcement.event;
    #[allow(clippy::expect_used, reason = "an event always serializes")]
    let payload = serde_json::to_vec(event).expect("an event serializes");
    message(
        subject::event(event.project_id, event.process_id, event.success),
        &event.update_id.to_string(),
        announcement.traceparent.as_deref(),
        payload.into(),
    )
}

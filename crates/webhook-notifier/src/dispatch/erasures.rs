//! 7 Deliver: erases the content of the deliveries of erased leads.
//!
//! The event of an erasure only makes it pending: the deliveries of earlier events may not be recorded yet. Once they
//! are, their content cannot come back, because the ledger has none of it either.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::{Client, jetstream};
use contract::{
    ObjectId,
    event::CompletionEvent,
    rpc::{DEFAULT_TIMEOUT, ListUpdates, MAX_LIMIT},
    streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use service_kit::{clock, postgres::Pool, rpc::request};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::store::erasures::{self, PendingErasure};

/// How often Postgres is polled for erasures. A longer interval keeps content longer; a shorter one costs Postgres
/// more.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long after its event an erasure starts. A redelivery that read its body from the ledger before the event takes
/// at most this long.
pub(super) const DELAY: Duration = DEFAULT_TIMEOUT;
/// How long a claim is exclusive. After a crash, the erasure is claimed again when the claim ends.
const LEASE: Duration = Duration::from_secs(60);

pub(crate) struct Erasures {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
    pub(crate) pool: Pool,
    /// Notified when the outbox has a new event.
    pub(crate) outbox: Arc<Notify>,
}

impl Erasures {
    /// Erases until shutdown. An erasure that is claimed then is carried out after its lease.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let erase = async {
            loop {
                tokio::time::sleep(INTERVAL).await;
                if let Err(e) = self.round().await {
                    tracing::warn!("cannot erase the deliveries of a lead, trying again: {e:#}");
                }
            }
        };
        shutdown.run_until_cancelled(erase).await;
        Ok(())
    }

    async fn round(&self) -> anyhow::Result<()> {
        loop {
            let now = clock::now();
            let Some(erasure) = erasures::claim(&self.pool, now, now.plus(LEASE)).await? else { return Ok(()) };
            if self.is_recorded(&erasure).await? && self.erase(&erasure).await? {
                erasures::finish(&self.pool, &erasure).await?;
                self.outbox.notify_one();
                tracing::info!(lead_id = %erasure.lead_id, project_id = %erasure.project_id, "a lead is erased");
            } else {
                erasures::postpone(&self.pool, &erasure, clock::now().plus(INTERVAL)).await?;
            }
        }
    }

    /// Whether all events up to the erasure's are recorded.
    async fn is_recorded(&self, erasure: &PendingErasure) -> anyhow::Result<bool> {
        let stream = self.js.get_stream(LEAD_EVENTS).await.context("cannot find the stream LEAD_EVENTS")?;
        if streams::identity(stream.cached_info()) != erasure.event.stream {
            // The stream was replaced. Events of the new one are announced from the ledger.
            return Ok(true);
        }
        let consumer = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read the consumer's state")?;
        Ok(consumer.ack_floor.stream_sequence >= erasure.event.sequence)
    }

    /// Erases the deliveries of all updates before the erasure. Returns whether nothing is left.
    async fn erase(&self, erasure: &PendingErasure) -> anyhow::Result<bool> {
        let PendingErasure { lead_id, project_id, update_id, .. } = *erasure;
        let (mut cursor, mut is_before, mut is_complete) = (None, false, true);
        loop {
            let lead_id = Some(lead_id);
            let list = ListUpdates {
                project_id,
                lead_id,
                since: None,
                until: None,
                oldest_first: false,
                cursor,
                limit: MAX_LIMIT,
            };
            let page = request(&self.client, &list).await.context("cannot list the updates of the lead")?;
            let mut update_ids = Vec::with_capacity(page.items.len());
            for update in &page.items {
                // The newest ones come first.
                if is_before {
                    update_ids.push(update.update_id);
                }
                is_before |= update.update_id == update_id;
            }
            is_complete &= erasures::erase_deliveries(&self.pool, project_id, &update_ids, clock::now()).await?;
            is_complete &= self.erase_parked(project_id, &update_ids).await?;
            cursor = page.next;
            if cursor.is_none() {
                return Ok(is_complete);
            }
        }
    }

    async fn erase_parked(&self, project_id: ObjectId, update_ids: &[ObjectId]) -> anyhow::Result<bool> {
        let now = clock::now();
        let (parked, any_claimed) = erasures::parked(&self.pool, project_id, update_ids, now).await?;
        let mut is_complete = !any_claimed;
        for (event, payload) in parked {
            let parsed: CompletionEvent = serde_json::from_str(&payload).context("a parked event cannot be read")?;
            let erased = serde_json::to_string(&parsed.erased()).context("an event cannot be written")?;
            is_complete &= erasures::replace_parked(&self.pool, &event, &erased, now).await?;
        }
        Ok(is_complete)
    }
}

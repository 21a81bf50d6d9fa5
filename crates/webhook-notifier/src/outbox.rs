//! 7 Deliver, 8 Retry: publishes events about exhausted deliveries and disabled callbacks to `WEBHOOK_EVENTS`.
//!
//! Postgres is the outbox: rows that are not announced are published, then marked. After a crash between the two they
//! are published again, under the same message id.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream;
use contract::{
    event::WebhookEvent,
    rpc::DeliveryId,
    subject::{callback_disabled, delivery_exhausted},
};
use service_kit::{
    clock,
    nats::{error_chain, retry_backoff},
    postgres::Pool,
    publish::{self, PublishError},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::store::{self, error::StoreError, outbox::AnnouncedExhaustion};

/// How often Postgres is polled for rows of other replicas and rows from before a crash. This replica's own rows are
/// announced at once.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of events of each kind per round.
const BATCH: i64 = 500;

/// Why a round failed. It is retried in any case.
#[derive(Debug, thiserror::Error)]
enum OutboxError {
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Publishes until shutdown.
pub(crate) async fn run(
    js: jetstream::Context,
    pool: Pool,
    recorded: Arc<Notify>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let publish = async {
        let mut delays = retry_backoff();
        loop {
            match publish_pending(&js, &pool).await {
                Ok(()) => delays = retry_backoff(),
                Err(e) => {
                    tracing::warn!("cannot publish webhook events, trying again: {}", error_chain(&e));
                    tokio::time::sleep(delays.next().unwrap_or(POLL_INTERVAL)).await;
                    continue;
                }
            }
            tokio::select! {
                () = recorded.notified() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    };
    tokio::select! {
        () = publish => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// Publishes and marks rows until none is left.
async fn publish_pending(js: &jetstream::Context, pool: &Pool) -> Result<(), OutboxError> {
    loop {
        let exhausted = store::outbox::exhausted(pool, BATCH).await?;
        let disabled = store::outbox::disabled(pool, BATCH).await?;
        if exhausted.is_empty() && disabled.is_empty() {
            return Ok(());
        }
        let messages = exhausted.iter().chain(&disabled).map(message).collect::<Result<Vec<_>, _>>()?;
        publish::publish_all(js, messages).await?;
        let exhausted = exhausted.iter().filter_map(|event| match event {
            WebhookEvent::Exhausted { update_id, callback_id, kind, attempts, timestamp, .. } => {
                let id = DeliveryId { update_id: *update_id, callback_id: *callback_id, kind: *kind };
                Some(AnnouncedExhaustion { id, attempts: *attempts, exhausted_at: *timestamp })
            }
            WebhookEvent::CallbackDisabled { .. } => None,
        });
        let disabled = disabled.iter().filter_map(|event| match event {
            WebhookEvent::CallbackDisabled { callback_id, timestamp, .. } => Some((*callback_id, *timestamp)),
            WebhookEvent::Exhausted { .. } => None,
        });
        store::outbox::mark_exhausted_announced(pool, &exhausted.collect::<Vec<_>>(), clock::now()).await?;
        store::outbox::mark_disabled_announced(pool, &disabled.collect::<Vec<_>>()).await?;
    }
}

fn message(event: &WebhookEvent) -> Result<jetstream::message::OutboundMessage, PublishError> {
    let (subject, id) = match event {
        // A redelivery may be exhausted again: after more attempts, or without one if its callback was removed.
        WebhookEvent::Exhausted {
            project_id, process_id, update_id, callback_id, kind, attempts, timestamp, ..
        } => {
            let id = DeliveryId { update_id: *update_id, callback_id: *callback_id, kind: *kind };
            let id = format!("{id}-exhausted-{attempts}-{}", timestamp.millis());
            (delivery_exhausted(*project_id, *process_id), id)
        }
        WebhookEvent::CallbackDisabled { project_id, process_id, callback_id, timestamp, .. } => {
            (callback_disabled(*project_id, *process_id), format!("{callback_id}-disabled-{}", timestamp.millis()))
        }
    };
    let payload = serde_json::to_vec(event).map_err(|e| PublishError::Refused(e.to_string()))?;
    Ok(publish::message(subject, &id, None, payload.into()))
}

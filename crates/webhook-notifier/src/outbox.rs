//! 7 Deliver, 8 Retry: that a delivery is exhausted or a callback disabled is told on `WEBHOOK_EVENTS`.
//!
//! Postgres is the outbox: what is not marked as announced is published, then marked. After a crash between the two it is
//! published again, under the same message id.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream;
use contract::{
    event::WebhookEvent,
    subject::{callback_disabled, delivery_exhausted},
};
use service_kit::{
    nats::{error_chain, retry_backoff},
    publish::{self, PublishError},
};
use sqlx::PgPool;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::store;

/// How often is looked for what another replica, or a crash, left. What is recorded here is announced at once.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Most events published between two looks at Postgres.
const BATCH: i64 = 500;

/// Why the outbox is not empty. Either way it is tried again.
#[derive(Debug, thiserror::Error)]
enum AnnounceError {
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Store(#[from] sqlx::Error),
}

/// Announces until shutdown.
pub(crate) async fn run(
    js: jetstream::Context,
    pool: PgPool,
    recorded: Arc<Notify>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let announce = async {
        let mut delays = retry_backoff();
        loop {
            match announce(&js, &pool).await {
                Ok(()) => delays = retry_backoff(),
                Err(e) => {
                    tracing::warn!("cannot announce, trying again: {}", error_chain(&e));
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
        () = announce => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// Empties the outbox.
async fn announce(js: &jetstream::Context, pool: &PgPool) -> Result<(), AnnounceError> {
    loop {
        let exhausted = store::outbox::exhausted(pool, BATCH).await?;
        let disabled = store::outbox::disabled(pool, BATCH).await?;
        if exhausted.is_empty() && disabled.is_empty() {
            return Ok(());
        }
        let messages = exhausted.iter().chain(&disabled).map(message).collect::<Result<Vec<_>, _>>()?;
        publish::publish_all(js, messages).await?;
        let exhausted = exhausted.iter().filter_map(|event| match event {
            WebhookEvent::Exhausted { update_id, callback_id, .. } => Some((*update_id, *callback_id)),
            WebhookEvent::CallbackDisabled { .. } => None,
        });
        let disabled = disabled.iter().filter_map(|event| match event {
            WebhookEvent::CallbackDisabled { callback_id, timestamp, .. } => Some((*callback_id, *timestamp)),
            WebhookEvent::Exhausted { .. } => None,
        });
        store::outbox::mark_exhausted(pool, &exhausted.collect::<Vec<_>>()).await?;
        store::outbox::mark_disabled(pool, &disabled.collect::<Vec<_>>()).await?;
    }
}

fn message(event: &WebhookEvent) -> Result<jetstream::message::OutboundMessage, PublishError> {
    let (subject, id) = match event {
        // What is made again may be exhausted again, after more attempts.
        WebhookEvent::Exhausted { project_id, process_id, update_id, callback_id, attempts, .. } => {
            (delivery_exhausted(*project_id, *process_id), format!("{update_id}-{callback_id}-exhausted-{attempts}"))
        }
        WebhookEvent::CallbackDisabled { project_id, process_id, callback_id, timestamp, .. } => {
            (callback_disabled(*project_id, *process_id), format!("{callback_id}-disabled-{}", timestamp.millis()))
        }
    };
    let payload = serde_json::to_vec(event).map_err(|e| PublishError::Refused(e.to_string()))?;
    Ok(publish::message(subject, &id, None, payload.into()))
}

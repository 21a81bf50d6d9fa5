//! 7 Deliver, 8 Retry: queries over NATS: the deliveries of an update, and enabling a callback again.

use std::sync::Arc;

use async_nats::service::Service;
use contract::rpc::{CALLBACK_ENABLE, DELIVERY_OF_UPDATE, Delivery, EnableCallback, Enabled, GetUpdate};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{endpoint, internal},
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{callbacks::Callbacks, store};

/// Serves the queries, until shutdown.
pub(crate) async fn serve(
    tasks: &mut Tasks,
    service: &Service,
    pool: &PgPool,
    callbacks: &Arc<Callbacks>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let reader = pool.clone();
    endpoint(tasks, service, DELIVERY_OF_UPDATE, shutdown.clone(), move |query: GetUpdate| {
        let pool = reader.clone();
        async move {
            let deliveries = store::query::of_update(&pool, query.project_id, query.update_id).await;
            deliveries.map_err(|e| internal(DELIVERY_OF_UPDATE, &e)) as Result<Vec<Delivery>, _>
        }
    })
    .await?;
    let (pool, callbacks) = (pool.clone(), callbacks.clone());
    endpoint(tasks, service, CALLBACK_ENABLE, shutdown.clone(), move |query: EnableCallback| {
        let (pool, callbacks) = (pool.clone(), callbacks.clone());
        async move {
            let enable = async {
                let was_disabled = store::health::enable_callback(&pool, query.callback_id, clock::now()).await?;
                // The other replicas follow within a second.
                callbacks.refresh_disabled(&pool).await?;
                Ok(Enabled { was_disabled })
            };
            enable.await.map_err(|e: sqlx::Error| internal(CALLBACK_ENABLE, &e))
        }
    })
    .await
}

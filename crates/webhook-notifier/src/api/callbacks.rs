//! 7 Deliver, 8 Retry: queries over NATS: the deliveries of an update, how callbacks fare, and
//! enabling one again.

use std::sync::Arc;

use async_nats::service::Service;
use contract::{
    process::Process,
    rpc::{
        CALLBACK_ENABLE, CALLBACK_LIST, CallbackState, CallbackStatus, DELIVERY_OF_UPDATE, Delivery, EnableCallback,
        EnableResult, GetUpdate, ListCallbacks,
    },
};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{endpoint, internal},
};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::{admission::limiter::Slots, callback_health::Health, callbacks::Callbacks, store};

/// Serves the queries, until shutdown.
pub(crate) async fn serve(
    tasks: &mut Tasks,
    service: &Service,
    pool: &PgPool,
    callbacks: &Arc<Callbacks>,
    slots: &Arc<Slots>,
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
    let listed = callbacks.clone();
    endpoint(tasks, service, CALLBACK_LIST, shutdown.clone(), move |query: ListCallbacks| {
        let mut processes = listed.view.all();
        processes.retain(|process| process.project_id == query.project_id);
        processes.sort_by(|one, other| one.name.cmp(&other.name));
        let list = processes.iter().flat_map(|process| statuses(process, &listed.health)).collect::<Vec<_>>();
        async move { Ok(list) }
    })
    .await?;
    let (pool, callbacks, slots) = (pool.clone(), callbacks.clone(), slots.clone());
    endpoint(tasks, service, CALLBACK_ENABLE, shutdown.clone(), move |query: EnableCallback| {
        let (pool, callbacks, slots) = (pool.clone(), callbacks.clone(), slots.clone());
        async move {
            let enable = async {
                let was_disabled = store::health::enable_callback(&pool, query.callback_id, clock::now()).await?;
                // The other replicas follow within a second.
                callbacks.health.sync(&pool).await?;
                slots.forgive(query.callback_id);
                Ok(EnableResult { was_disabled })
            };
            enable.await.map_err(|e: sqlx::Error| internal(CALLBACK_ENABLE, &e))
        }
    })
    .await
}

/// How the callbacks of a process fare.
fn statuses(process: &Process, health: &Health) -> Vec<CallbackStatus> {
    let status = |callback: &contract::process::Callback| {
        let failing_since = health.failing_since(callback.callback_id);
        let disabled = health.disabled(callback.callback_id);
        CallbackStatus {
            callback_id: callback.callback_id,
            name: callback.name.clone(),
            process_id: process.process_id,
            process: process.name.clone(),
            state: match (&disabled, failing_since) {
                _ if !callback.enabled => CallbackState::Off,
                (Some(_), _) => CallbackState::Disabled,
                (None, Some(_)) => CallbackState::Failing,
                (None, None) => CallbackState::Healthy,
            },
            failing_since,
            reason: disabled,
        }
    };
    process.callbacks.iter().map(status).collect()
}

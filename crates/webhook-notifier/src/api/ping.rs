//! A ping: one test request to a callback, sent like every attempt, with the same guard, limits, signatures and
//! authentication. It is not a delivery, is not recorded, and does not change the state of the callback.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_nats::service::Service;
use contract::{
    ObjectId,
    event::TestPayload,
    event_kind::DeliveryKind,
    rpc::{ErrorCode, Query, RpcError, TestCallback, TestResult},
};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{internal, serve},
};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::Target,
    core::{delivery::PendingDelivery, outcome::Attempt},
    deliver::Deliverer,
};

/// Maximum number of a project's pings in flight in one notifier. A higher maximum lets one project with slow endpoints
/// delay the others.
const MAX_IN_FLIGHT: u32 = 4;

#[derive(Debug)]
struct PingApi {
    deliverer: Arc<Deliverer>,
    in_flight: Mutex<HashMap<ObjectId, u32>>,
    shutdown: CancellationToken,
}

/// Answers until shutdown.
pub(crate) async fn serve_pings(
    tasks: &mut Tasks,
    service: &Service,
    deliverer: &Arc<Deliverer>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let (deliverer, in_flight) = (deliverer.clone(), Mutex::default());
    let api = Arc::new(PingApi { deliverer, in_flight, shutdown: shutdown.clone() });
    serve(tasks, service, shutdown.clone(), move |query: TestCallback| {
        let api = api.clone();
        async move { api.test(query).await }
    })
    .await
}

/// The right to send a ping.
struct PingPermit<'a> {
    api: &'a PingApi,
    project_id: ObjectId,
}

impl Drop for PingPermit<'_> {
    fn drop(&mut self) {
        let mut in_flight = self.api.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = in_flight.get_mut(&self.project_id) {
            *count -= 1;
            if *count == 0 {
                in_flight.remove(&self.project_id);
            }
        }
    }
}

impl PingApi {
    fn acquire(&self, project_id: ObjectId) -> Result<PingPermit<'_>, RpcError> {
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        let count = in_flight.entry(project_id).or_default();
        if *count >= MAX_IN_FLIGHT {
            let message = format!("{MAX_IN_FLIGHT} callbacks of the project are being tested already");
            return Err(RpcError::new(ErrorCode::TooManyTests, message));
        }
        *count += 1;
        Ok(PingPermit { api: self, project_id })
    }

    async fn test(&self, query: TestCallback) -> Result<TestResult, RpcError> {
        let TestCallback { project_id, process_id, callback_id } = query;
        let _ping_permit = self.acquire(project_id)?;
        let target = self.deliverer.callbacks.read(project_id, process_id, callback_id).await;
        let target = target.map_err(|e| internal(TestCallback::SUBJECT, &e))?;
        let target = target.ok_or_else(|| RpcError::new(ErrorCode::CallbackNotFound, "Callback not found"))?;
        let (webhook_id, delivery) = ping(project_id, &target);
        let callback = self.deliverer.callbacks.prepare(&target).map_err(|e| {
            RpcError::new(ErrorCode::SecretsLocked, format!("the secrets of the callback cannot be opened: {e}"))
        })?;
        let permit = self.deliverer.limiter.acquire_for_test(&target.endpoint(), delivery.body.len());
        let mut permit = permit.map_err(|limit| RpcError::new(ErrorCode::CallbackBusy, limit.to_string()))?;
        permit.start();
        let attempt = tokio::select! {
            attempt = self.deliverer.client.send(callback, &delivery, None) => attempt,
            () = self.shutdown.cancelled() => {
                return Err(RpcError::new(ErrorCode::Unavailable, "webhook-notifier is shutting down: try again"));
            }
        };
        let Attempt { started_at, duration, outcome, response } = attempt;
        let (status_code, error) = (outcome.status(), outcome.error().map(str::to_owned));
        let result = error.as_deref().unwrap_or("accepted");
        tracing::info!(%callback_id, %webhook_id, status_code, "callback tested: {result}");
        let duration_ms = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Ok(TestResult { webhook_id, started_at, duration_ms, status_code, error, response })
    }
}

/// A ping with a new id, not that of an update.
fn ping(project_id: ObjectId, target: &Target) -> (ObjectId, PendingDelivery) {
    let webhook_id = clock::new_id();
    let (callback_id, process_id) = (target.callback_id, target.process_id());
    let payload = TestPayload { action_type: "test", callback_id, process_id, timestamp: clock::now() };
    #[allow(clippy::expect_used, reason = "ids and a number always serialize")]
    let body = serde_json::to_string(&payload).expect("a ping serializes").into();
    let delivery = PendingDelivery {
        update_id: webhook_id,
        callback_id,
        // Like the outcome of an update, a ping has no suffix in its webhook-id.
        kind: DeliveryKind::Update,
        project_id,
        process_id,
        body,
        traceparent: None,
        order: None,
    };
    (webhook_id, delivery)
}

//! 7 Deliver: a ping: one POST to a callback that tells of no update, to see whether it can be told. It goes the way of
//! every attempt, by the same guard, signatures, limits and authentication; it is no delivery, is not recorded, and says
//! nothing about how the callback fares.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_nats::service::Service;
use contract::{
    ObjectId,
    event::TestPayload,
    rpc::{CALLBACK_CHECK, CALLBACK_TEST, CheckUrls, RpcError, TestCallback, TestResult, UrlCheck},
};
use futures::{StreamExt, stream};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{endpoint, internal},
};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::Target,
    core::delivery::{Attempt, Delivery},
    deliver::Deliverer,
};

/// Most pings of a project at once, in one notifier. More would let one project's slow endpoints keep the others waiting.
const AT_ONCE: u32 = 4;
/// How many names are looked up at once.
const LOOKUPS: usize = 16;

/// Makes pings.
#[derive(Debug)]
struct Pings {
    deliverer: Arc<Deliverer>,
    under_way: Mutex<HashMap<ObjectId, u32>>,
    shutdown: CancellationToken,
}

/// Serves pings, and the question which URLs callbacks may have, until shutdown.
pub(crate) async fn serve(
    tasks: &mut Tasks,
    service: &Service,
    deliverer: &Arc<Deliverer>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let callbacks = deliverer.callbacks.clone();
    endpoint(tasks, service, CALLBACK_CHECK, shutdown.clone(), move |query: CheckUrls| {
        let callbacks = callbacks.clone();
        async move {
            let check = async |url: String| UrlCheck { refused: callbacks.refusal(&url).await };
            Ok(stream::iter(query.urls).map(check).buffered(LOOKUPS).collect::<Vec<_>>().await)
        }
    })
    .await?;
    let pings =
        Arc::new(Pings { deliverer: deliverer.clone(), under_way: Mutex::default(), shutdown: shutdown.clone() });
    endpoint(tasks, service, CALLBACK_TEST, shutdown.clone(), move |query: TestCallback| {
        let pings = pings.clone();
        async move { pings.test(query).await }
    })
    .await
}

/// The right to make a ping.
struct UnderWay<'a> {
    pings: &'a Pings,
    project_id: ObjectId,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = self.pings.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = under_way.get_mut(&self.project_id) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.project_id);
            }
        }
    }
}

impl Pings {
    fn begin(&self, project_id: ObjectId) -> Result<UnderWay<'_>, RpcError> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let count = under_way.entry(project_id).or_default();
        if *count >= AT_ONCE {
            let message = format!("{AT_ONCE} callbacks of the project are being tested already");
            return Err(RpcError::new(429, "too_many_tests", message));
        }
        *count += 1;
        Ok(UnderWay { pings: self, project_id })
    }

    async fn test(&self, query: TestCallback) -> Result<TestResult, RpcError> {
        let TestCallback { project_id, process_id, callback_id } = query;
        let _under_way = self.begin(project_id)?;
        let found = self.deliverer.callbacks.now(project_id, process_id, callback_id).await;
        let target = found.map_err(|e| internal(CALLBACK_TEST, &e))?;
        let target = target.ok_or_else(|| RpcError::new(404, "callback_not_found", "Callback not found"))?;
        let (webhook_id, delivery) = ping(project_id, &target);
        let prepared = self.deliverer.callbacks.open(&target).map_err(|e| {
            RpcError::new(409, "secrets_locked", format!("the secrets of the callback cannot be opened: {e}"))
        })?;
        let slot = self.deliverer.slots.take_for_ping(&target.endpoint(), delivery.body.len());
        let mut slot = slot.ok_or_else(|| {
            let message = "The callback has as many attempts under way, or begun in this second, as it may: try again";
            RpcError::new(429, "callback_busy", message)
        })?;
        slot.begin();
        let attempt = tokio::select! {
            attempt = self.deliverer.poster.post(prepared, &delivery, None) => attempt,
            () = self.shutdown.cancelled() => {
                return Err(RpcError::new(503, "unavailable", "the webhook-notifier stops"));
            }
        };
        let Attempt { started_at, duration, status, error, response, .. } = attempt;
        tracing::info!(%callback_id, %webhook_id, status, "tested, as asked: {}", error.as_deref().unwrap_or("taken"));
        let duration_ms = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Ok(TestResult { webhook_id, started_at, duration_ms, status_code: status, error, response })
    }
}

/// A ping under an id of its own, which is no update's.
fn ping(project_id: ObjectId, target: &Target) -> (ObjectId, Delivery) {
    let webhook_id = clock::new_id();
    let (callback_id, process_id) = (target.callback_id, target.process_id());
    let payload = TestPayload { action_type: "test", callback_id, process_id, timestamp: clock::now() };
    #[allow(clippy::expect_used, reason = "ids and a number always serialize")]
    let body = serde_json::to_string(&payload).expect("a ping serializes").into();
    (
        webhook_id,
        Delivery { update_id: webhook_id, callback_id, project_id, process_id, body, traceparent: None, order: None },
    )
}

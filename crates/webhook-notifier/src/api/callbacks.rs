//! Queries about the state of callbacks; enabling, pausing and resuming one.

use std::sync::Arc;

use async_nats::service::Service;
use contract::{
    process::{Callback, Process},
    rpc::{
        CallbackState, CallbackStatus, CheckUrls, EnableCallback, EnableResult, ListCallbacks, PauseCallback,
        PauseResult, RpcError, UrlCheck,
    },
};
use futures::{StreamExt, stream};
use service_kit::{clock, lifecycle::Tasks, postgres::Pool, rpc::serve};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::ConcurrencyLimiter,
    callback_health::{CallbackHealth, Hold},
    callbacks::Callbacks,
    store,
};

/// How many names are resolved at once.
const LOOKUPS: usize = 16;

/// Answers queries about callbacks.
#[derive(Debug, Clone)]
pub(crate) struct CallbackApi {
    pub(crate) pool: Pool,
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) limiter: Arc<ConcurrencyLimiter>,
}

impl CallbackApi {
    /// Answers until shutdown.
    pub(crate) async fn serve(
        self,
        tasks: &mut Tasks,
        service: &Service,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        let api = self.clone();
        serve(tasks, service, shutdown.clone(), move |query| api.clone().list(query)).await?;
        let api = self.clone();
        serve(tasks, service, shutdown.clone(), move |query| api.clone().check_urls(query)).await?;
        let api = self.clone();
        serve(tasks, service, shutdown.clone(), move |query| api.clone().pause(query)).await?;
        serve(tasks, service, shutdown.clone(), move |query| self.clone().enable(query)).await
    }

    async fn list(self, query: ListCallbacks) -> Result<Vec<CallbackStatus>, RpcError> {
        let mut processes = self.callbacks.view.all();
        processes.retain(|process| process.project_id == query.project_id);
        processes.sort_by(|one, other| one.name.cmp(&other.name));
        let statuses = processes.iter().flat_map(|process| statuses(process, &self.callbacks.health));
        let mut statuses: Vec<_> = statuses.collect();
        if query.details {
            let ids: Vec<_> = statuses.iter().map(|status| status.callback_id).collect();
            let details = store::health::details(&self.pool, &ids).await?;
            for (status, details) in statuses.iter_mut().zip(details) {
                status.details = Some(details);
            }
        }
        Ok(statuses)
    }

    /// Checks which URLs callbacks may have.
    async fn check_urls(self, query: CheckUrls) -> Result<Vec<UrlCheck>, RpcError> {
        let check = async |url: String| UrlCheck { refused: self.callbacks.url_refusal(query.project_id, &url).await };
        Ok(stream::iter(query.urls).map(check).buffered(LOOKUPS).collect().await)
    }

    async fn enable(self, query: EnableCallback) -> Result<EnableResult, RpcError> {
        let was_disabled = store::health::enable_callback(&self.pool, query.callback_id, clock::now()).await?;
        // The other replicas follow within a second.
        self.callbacks.health.sync(&self.pool).await?;
        self.limiter.reset_breaker(query.callback_id);
        Ok(EnableResult { was_disabled })
    }

    async fn pause(self, query: PauseCallback) -> Result<PauseResult, RpcError> {
        let PauseCallback { callback_id, paused } = query;
        let was_paused = match paused {
            true => {
                let process = self.callbacks.process_of(callback_id);
                store::health::pause_callback(&self.pool, callback_id, process, clock::now()).await?
            }
            false => store::health::resume_callback(&self.pool, callback_id, clock::now()).await?,
        };
        // The other replicas follow within a second.
        self.callbacks.health.sync(&self.pool).await?;
        self.limiter.wake_retries();
        tracing::info!(%callback_id, paused, was_paused, "callback paused or resumed");
        Ok(PauseResult { was_paused })
    }
}

fn statuses(process: &Process, health: &CallbackHealth) -> Vec<CallbackStatus> {
    let status = |callback: &Callback| {
        let failing_since = health.failing_since(callback.callback_id);
        let hold = health.hold(callback);
        let state = match (&hold, failing_since) {
            (Some(Hold::Off), _) => CallbackState::Off,
            (Some(Hold::Paused), _) => CallbackState::Paused,
            (Some(Hold::Disabled(_)), _) => CallbackState::Disabled,
            (None, Some(_)) => CallbackState::Failing,
            (None, None) => CallbackState::Healthy,
        };
        let reason = hold.filter(|hold| matches!(hold, Hold::Disabled(_))).map(|hold| hold.to_string());
        CallbackStatus {
            callback_id: callback.callback_id,
            name: callback.name.clone(),
            process_id: process.process_id,
            process: process.name.clone(),
            state,
            failing_since,
            reason,
            details: None,
        }
    };
    process.callbacks.iter().map(status).collect()
}

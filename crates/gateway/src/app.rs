//! 1 Accept: the state that requests share.

use std::sync::{Arc, OnceLock};

use async_nats::{Client, jetstream};
use axum::http::HeaderMap;
use contract::{
    ObjectId,
    key::{ApiKey, Scope},
    process::Platform,
    rpc::Query,
};
use serde::Deserialize;
use service_kit::{
    clock,
    kv::BucketCache,
    publisher::Publisher,
    rpc::{self, RequestError},
    shares::{Permit, Pool},
    traces::Traces,
};

use crate::{
    auth,
    command_log::CommandLog,
    config::Config,
    error::{ApiError, SharedPool},
    event_subscribers::EventSubscribers,
    idempotency::IdempotencyStore,
    key_uses::KeyUses,
    metrics::Metrics,
    outcome_waiters::OutcomeWaiters,
    rate_limit::RateLimits,
    work_budget::WorkBudget,
};

/// Most bulk requests at once. Each may hold a few MiB. Most of them wait for their bodies or their rate limits.
const MAX_BULK_REQUESTS: usize = 32;
/// Most reports of voice platforms at once. Each may hold two copies of half a MiB.
const MAX_CALL_REPORTS: usize = 64;

#[derive(Debug)]
pub(crate) struct App {
    /// The API keys, by their SHA-256.
    pub(crate) keys: BucketCache<ApiKey>,
    pub(crate) key_uses: KeyUses,
    /// The sources of call reports, by the key of their process.
    pub(crate) sources: BucketCache<ProcessSources>,
    /// Empty until the first connection.
    pub(crate) broker: OnceLock<Broker>,
    pub(crate) command_log: CommandLog,
    /// Bounds the bytes that a project's reads return, and the bytes of a source's call reports.
    pub(crate) read_budget: WorkBudget,
    pub(crate) idempotency: IdempotencyStore,
    pub(crate) outcome_waiters: Arc<OutcomeWaiters>,
    pub(crate) event_subscribers: Arc<EventSubscribers>,
    pub(crate) rates: RateLimits,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    bulk_requests: Arc<Pool<ObjectId>>,
    call_reports: Arc<Pool<ObjectId>>,
    pub(crate) max_body_bytes: usize,
}

/// The part of a process that the gateway reads. The sealed secrets of the sources are left out.
#[derive(Debug, Deserialize)]
pub(crate) struct ProcessSources {
    #[serde(default)]
    pub(crate) sources: Vec<ReportingSource>,
}

/// A source of call reports.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReportingSource {
    pub(crate) source_id: ObjectId,
    pub(crate) platform: Platform,
    pub(crate) enabled: bool,
}

/// The connection to NATS.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
    pub(crate) commands: Publisher,
}

impl App {
    pub(crate) fn new(config: &Config, keys: BucketCache<ApiKey>, metrics: Metrics, traces: Traces) -> Self {
        let budget = || WorkBudget::new(u64::from(config.work_rate) << 20);
        let command_log =
            CommandLog::new(config.max_in_flight as usize, budget(), metrics.pack_sizes.clone(), traces.clone());
        Self {
            keys,
            key_uses: KeyUses::default(),
            sources: BucketCache::default(),
            broker: OnceLock::new(),
            idempotency: IdempotencyStore::new(command_log.admission.clone()),
            command_log,
            read_budget: budget(),
            outcome_waiters: Arc::new(OutcomeWaiters::new()),
            event_subscribers: Arc::new(EventSubscribers::new(config.max_listeners as usize)),
            rates: RateLimits::new(config.update_rate, config.other_rate),
            metrics,
            traces,
            bulk_requests: Pool::new(MAX_BULK_REQUESTS),
            call_reports: Pool::new(MAX_CALL_REPORTS),
            max_body_bytes: config.max_body_bytes as usize,
        }
    }

    /// The API key of a request, if it is valid now and has the scope.
    pub(crate) fn authorize(&self, headers: &HeaderMap, scope: Scope) -> Result<Arc<ApiKey>, ApiError> {
        let now = clock::now();
        let key = auth::authorize(&self.keys, headers, scope, now)?;
        self.key_uses.record(key.key_id, now);
        Ok(key)
    }

    pub(crate) fn bulk_permit(&self, project_id: ObjectId) -> Result<Permit<ObjectId>, ApiError> {
        self.bulk_requests.try_acquire(project_id).map_err(|e| ApiError::ShareUsed(SharedPool::BulkRequests, e))
    }

    pub(crate) fn report_permit(&self, project_id: ObjectId) -> Result<Permit<ObjectId>, ApiError> {
        self.call_reports.try_acquire(project_id).map_err(|e| ApiError::ShareUsed(SharedPool::CallReports, e))
    }

    /// The connection, for commands. It may be down at the moment.
    pub(crate) fn broker(&self) -> Result<&Broker, ApiError> {
        self.broker.get().ok_or(ApiError::BrokerUnavailable)
    }

    /// The connection, for queries and events. It may be down at the moment.
    pub(crate) fn connection(&self) -> Result<&Broker, ApiError> {
        self.broker.get().ok_or(ApiError::Unavailable)
    }

    /// Sends a query to lead-state or webhook-notifier.
    pub(crate) async fn request<Q: Query>(&self, query: &Q) -> Result<Q::Reply, ApiError> {
        rpc::request(&self.connection()?.client, query).await.map_err(|error| query_error(error, Q::REPEATABLE))
    }
}

/// Maps a failed query to the client's error. Logs the unavailable subject for operators.
fn query_error(error: RequestError, repeatable: bool) -> ApiError {
    let (sent, error) = match error {
        RequestError::Answered(error) if error.code != "unavailable" => return ApiError::Query(error),
        error @ (RequestError::NotConnected { .. } | RequestError::NoResponder { .. }) => (false, error),
        error => (true, error),
    };
    tracing::warn!("a query failed: {error}");
    if sent && !repeatable { ApiError::Unconfirmed } else { ApiError::Unavailable }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use contract::rpc::RpcError;

    use super::*;

    #[test]
    fn only_a_change_that_was_sent_may_have_been_made() {
        let subject = || "leads.rpc.lead.initiate".to_owned();
        let timed_out = || RequestError::TimedOut { subject: subject(), timeout: Duration::from_secs(5) };
        let answered = |status, code| RequestError::Answered(RpcError::received(status, code, "no"));

        assert_eq!(query_error(timed_out(), true), ApiError::Unavailable);
        assert_eq!(query_error(timed_out(), false), ApiError::Unconfirmed);
        assert_eq!(query_error(RequestError::NoResponder { subject: subject() }, false), ApiError::Unavailable);
        assert_eq!(query_error(RequestError::NotConnected { subject: subject() }, false), ApiError::Unavailable);
        assert_eq!(query_error(answered(503, "unavailable"), false), ApiError::Unconfirmed);
        assert_eq!(query_error(answered(404, "lead_not_found"), false).code(), "lead_not_found");
        assert_eq!(query_error(answered(503, "not_projected"), false).code(), "not_projected");
    }
}

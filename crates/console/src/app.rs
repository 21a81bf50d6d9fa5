//! The state that requests share.

use std::sync::{Arc, OnceLock};

use async_nats::{Client, jetstream};
use contract::{key::ApiKey, rpc::Query};
use secrets::TokenKey;
use service_kit::{kv::BucketCache, rpc};
use tokio_util::sync::CancellationToken;

use crate::{config::PublicUrl, fault::Fault, gateway::Gateway, live::Live, visit_rate::VisitRate};

#[derive(Debug)]
pub(crate) struct App {
    /// The API keys, by their SHA-256.
    pub(crate) keys: BucketCache<ApiKey>,
    /// Empty until the first connection.
    pub(crate) broker: OnceLock<Broker>,
    pub(crate) session_key: TokenKey,
    pub(crate) public: PublicUrl,
    pub(crate) gateway: Gateway,
    pub(crate) live: Arc<Live>,
    pub(crate) visit_rate: VisitRate,
    pub(crate) shutdown: CancellationToken,
}

/// The connection to NATS.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
}

impl App {
    pub(crate) fn broker(&self) -> Result<&Broker, Fault> {
        self.broker.get().ok_or_else(|| Fault::Unavailable("The console is not connected to NATS yet.".into()))
    }

    /// Sends a query to lead-state or webhook-notifier.
    pub(crate) async fn request<Q: Query>(&self, query: &Q) -> Result<Q::Reply, Fault> {
        rpc::request(&self.broker()?.client, query).await.map_err(Fault::from)
    }
}

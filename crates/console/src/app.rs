//! The state that requests share.

use std::sync::{Arc, OnceLock};

use async_nats::{
    Client,
    connection::State,
    jetstream::{self, context::KeyValueError, kv::Store},
};
use contract::{key::ApiKey, rpc::Query, streams::CONSOLE_LOGINS};
use secrets::TokenKey;
use service_kit::{kv::BucketCache, rpc};
use tokio::sync::OnceCell;
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
    /// Empty until it is used.
    logins: OnceCell<Store>,
}

impl Broker {
    pub(crate) fn new(client: Client, js: jetstream::Context) -> Self {
        Self { client, js, logins: OnceCell::new() }
    }

    /// The bucket of links. Opening it is a request, so it stays open.
    pub(crate) async fn logins(&self) -> Result<&Store, KeyValueError> {
        self.logins.get_or_try_init(|| self.js.get_key_value(CONSOLE_LOGINS)).await
    }
}

impl App {
    /// The connection to NATS, unless it is interrupted. The client would hold messages until it is connected again.
    pub(crate) fn broker(&self) -> Result<&Broker, Fault> {
        let unavailable = |text: &str| Fault::Unavailable(format!("{text} Reload the page to try again."));
        let broker = self.broker.get().ok_or_else(|| unavailable("The console is not connected to NATS yet."))?;
        match broker.client.connection_state() {
            State::Connected => Ok(broker),
            State::Pending | State::Disconnected => Err(unavailable("The console has lost its connection to NATS.")),
        }
    }

    /// Sends a query to lead-state or webhook-notifier.
    pub(crate) async fn request<Q: Query>(&self, query: &Q) -> Result<Q::Reply, Fault> {
        rpc::request(&self.broker()?.client, query).await.map_err(Fault::from)
    }
}

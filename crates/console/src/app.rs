//! The state that requests share.

use std::{fmt::Write, sync::OnceLock};

use async_nats::{Client, jetstream};
use contract::{key::ApiKey, rpc::Query};
use secrets::TokenKey;
use service_kit::{kv::BucketCache, rpc};

use crate::{config::PublicUrl, fault::Fault};

#[derive(Debug)]
pub(crate) struct App {
    /// The API keys, by their SHA-256.
    pub(crate) keys: BucketCache<ApiKey>,
    /// Empty until the first connection.
    pub(crate) broker: OnceLock<Broker>,
    pub(crate) session_key: TokenKey,
    pub(crate) public: PublicUrl,
    pub(crate) gateway_url: String,
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

    /// A curl command for the gateway.
    pub(crate) fn curl(&self, path: &str, body: Option<&str>) -> String {
        let mut command = format!("curl {}{path} -H \"Authorization: Bearer $LEADRELAY_API_KEY\"", self.gateway_url);
        if let Some(body) = body {
            let _ = write!(command, " \\\n  --json '{body}'");
        }
        command
    }
}

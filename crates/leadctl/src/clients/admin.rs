//! Queries to lead-state and webhook-notifier over NATS.

use std::time::Duration;

use anyhow::anyhow;
use async_nats::Client;
use clap::Args;
use contract::rpc::{ErrorCode, Query, RpcError};
use serde::Serialize;
use service_kit::{config::NatsConfig, health::Readiness, nats, rpc};

use crate::output;

/// With a longer timeout, a wrong `--nats-url` is reported late.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Options of every command that queries the services.
#[derive(Debug, Args)]
pub(crate) struct Admin {
    #[command(flatten)]
    nats: NatsConfig,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Admin {
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        connect(&self.nats).await
    }

    /// Connects and sends one query.
    pub(crate) async fn request<Q: Query>(&self, query: &Q) -> anyhow::Result<Q::Reply> {
        request(&self.connect().await?, query).await
    }

    /// Sends one query and prints the reply: as JSON, or as `text`.
    pub(crate) async fn show<Q: Query>(&self, query: &Q, text: impl FnOnce(&Q::Reply)) -> anyhow::Result<()>
    where
        Q::Reply: Serialize,
    {
        output::show(self.json, &self.request(query).await?, text)
    }
}

pub(crate) async fn connect(config: &NatsConfig) -> anyhow::Result<Client> {
    connect_within(CONNECT_TIMEOUT, config).await
}

pub(crate) async fn connect_within(limit: Duration, config: &NatsConfig) -> anyhow::Result<Client> {
    match tokio::time::timeout(limit, nats::connect(config, "leadctl", &Readiness::default())).await {
        Ok(connected) => connected,
        Err(_) => {
            let message = format!(
                "cannot connect to NATS at {} within {limit:?}: check that it runs and that --nats-url (or NATS_URL) has the \
                 right address, user and password",
                without_credentials(&config.nats_url)
            );
            Err(RpcError::new(ErrorCode::Unavailable, message).into())
        }
    }
}

pub(crate) async fn request<Q: Query>(client: &Client, query: &Q) -> anyhow::Result<Q::Reply> {
    rpc::request(client, query).await.map_err(|e| explain(e.into()))
}

/// Adds the code to an error, and a hint if no service answered.
pub(crate) fn explain(error: RpcError) -> anyhow::Error {
    let RpcError { status, code, .. } = &error;
    let hint = match (*status, code.as_str()) {
        (503, "unavailable") => "; is lead-state (webhook-notifier for callbacks) running?",
        _ => "",
    };
    let context = format!("error {status} {code}{hint}");
    anyhow!(error).context(context)
}

/// Removes users and passwords from a list of URLs.
fn without_credentials(urls: &str) -> String {
    let bare = |url: &str| match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        _ => url.to_owned(),
    };
    urls.split(',').map(|url| bare(url.trim())).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_not_shown() {
        assert_eq!(without_credentials("nats://u:p@a:1, nats://b:2"), "nats://a:1,nats://b:2");
        assert_eq!(without_credentials("localhost"), "localhost");
    }
}

//! Administration over NATS: how the subcommands reach the services.

use std::time::Duration;

use anyhow::anyhow;
use async_nats::Client;
use clap::Args;
use contract::rpc::RpcError;
use serde::{Serialize, de::DeserializeOwned};
use service_kit::{config::NatsConfig, health::Readiness, nats, rpc};

/// How long connecting may take. Longer keeps an operator waiting for a NATS that is not there.
const CONNECT: Duration = Duration::from_secs(5);

/// What every administrative command takes.
#[derive(Debug, Args)]
pub(crate) struct Admin {
    #[command(flatten)]
    nats: NatsConfig,
    /// Print JSON, for programs.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Admin {
    /// Connects and asks a query.
    pub(crate) async fn call<Q: Serialize, R: DeserializeOwned>(&self, subject: &str, query: &Q) -> anyhow::Result<R> {
        call(&self.connect().await?, subject, query).await
    }

    /// Connects, for more than one query.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        connect(&self.nats).await
    }
}

/// Connects to NATS, or says soon that it is not there.
pub(crate) async fn connect(config: &NatsConfig) -> anyhow::Result<Client> {
    match tokio::time::timeout(CONNECT, nats::connect(config, "leadctl", &Readiness::default())).await {
        Ok(connected) => connected,
        Err(_) => Err(anyhow!(
            "cannot connect to NATS at {} within {CONNECT:?}: it does not run, cannot be reached, or refuses the user; \
             --nats-url or NATS_URL says where it is, with user and password",
            without_secrets(&config.nats_url)
        )),
    }
}

/// Asks a query.
pub(crate) async fn call<Q: Serialize, R: DeserializeOwned>(
    client: &Client,
    subject: &str,
    query: &Q,
) -> anyhow::Result<R> {
    rpc::call(client, subject, query).await.map_err(explain)
}

/// An error with its code, and with what to look at where nobody answered.
pub(crate) fn explain(error: RpcError) -> anyhow::Error {
    let RpcError { status, code, .. } = &error;
    let hint = match (*status, code.as_str()) {
        (503, "unavailable") => "; is lead-state (webhook-notifier for callbacks) running?",
        _ => "",
    };
    let context = format!("refused with {status} {code}{hint}");
    anyhow!(error).context(context)
}

/// A list of URLs without users and passwords.
fn without_secrets(urls: &str) -> String {
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
    fn secrets_are_not_shown() {
        assert_eq!(without_secrets("nats://u:p@a:1, nats://b:2"), "nats://a:1,nats://b:2");
        assert_eq!(without_secrets("localhost"), "localhost");
    }
}

//! The three services and the console as tasks of this process.

use std::time::Duration;

use anyhow::{Context, anyhow};
use async_nats::Client;
use clap::{Args, Parser};
use contract::{
    ObjectId,
    rpc::{ListKeys, ListUpdateDeliveries},
    secret::Secret,
};
use service_kit::{
    config::{HealthConfig, NatsConfig, SecretsConfig},
    health::Readiness,
    lifecycle::Tasks,
    nats, rpc,
};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::up::client::GatewayClient;

/// How long connecting may take. With a longer timeout, a wrong `--nats-url` is reported late.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The sockets that the services of this process listen on.
pub(super) struct Sockets {
    pub(super) gateway: TcpListener,
    pub(super) gateway_url: String,
    pub(super) console: TcpListener,
}

/// The keys of this data directory, or the operator's.
pub(super) struct Keys {
    pub(super) secrets: SecretsConfig,
    /// Seals the sessions of the console.
    pub(super) console: Secret,
}

/// Spawns the services. Each reads its environment variables, as it does when it runs alone.
pub(super) fn spawn(
    tasks: &mut Tasks,
    sockets: Sockets,
    nats: &NatsConfig,
    stream_replicas: u8,
    database_url: &str,
    keys: Keys,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let Keys { secrets, console } = keys;
    let health = || HealthConfig { health_listen: ([127, 0, 0, 1], 0).into() };
    let database = ["--database-url", database_url];

    let mut config: lead_state::Config = config_of(&database)?;
    (config.nats, config.health, config.secrets) = (nats.clone(), health(), secrets.clone());
    config.stream_replicas = stream_replicas;
    tasks.spawn("lead-state", lead_state::run(config, shutdown.clone()));

    let mut config: gateway::Config = config_of(&[])?;
    (config.nats, config.health) = (nats.clone(), health());
    tasks.spawn("gateway", gateway::run_on(sockets.gateway, config, shutdown.clone()));

    let mut config: webhook_notifier::Config = config_of(&database)?;
    (config.nats, config.health, config.secrets) = (nats.clone(), health(), secrets.clone());
    // On a development machine the endpoints are local and speak plain HTTP.
    config.allow_http = true;
    for network in ["127.0.0.0/8", "::1/128"] {
        config.allow_networks.push(network.parse().context("not a network")?);
    }
    tasks.spawn("webhook-notifier", webhook_notifier::run(config, shutdown.clone()));

    let mut config: console::Config = config_of(&[])?;
    (config.nats, config.health, config.key) = (nats.clone(), health(), Some(console));
    config.gateway_url = sockets.gateway_url;
    tasks.spawn("console", console::run_on(sockets.console, config, shutdown.clone()));
    Ok(())
}

#[derive(Parser)]
struct Service<T: Args> {
    #[command(flatten)]
    config: T,
}

/// A service's configuration from these arguments, its environment variables and its defaults.
fn config_of<T: Args>(arguments: &[&str]) -> anyhow::Result<T> {
    let service = Service::try_parse_from(["up"].iter().chain(arguments)).map_err(|e| anyhow!("{e}"))?;
    Ok(service.config)
}

pub(super) async fn connect(config: &NatsConfig) -> anyhow::Result<Client> {
    timeout(CONNECT_TIMEOUT, nats::connect(config, "leadctl", &Readiness::default())).await.unwrap_or_else(|_| {
        Err(anyhow!(
            "cannot connect to NATS within {CONNECT_TIMEOUT:?}: check that it runs and that --nats-url (or NATS_URL) has \
             the right address, user and password"
        ))
    })
}

/// Resolves once all three services answer.
pub(super) async fn ready(gateway_url: &str, client: &Client) -> anyhow::Result<()> {
    let unknown = ObjectId::from_bytes([0; 12]);
    let keys = ListKeys::of_project(unknown);
    let deliveries = ListUpdateDeliveries { project_id: unknown, update_id: unknown };
    let gateway = GatewayClient::new(gateway_url, "unknown");
    loop {
        let lead_state = rpc::request(client, &keys);
        let notifier = rpc::request(client, &deliveries);
        // The gateway rejects an unknown key once it has read all keys.
        let gateway = gateway.get("/api/v1/leads/get");
        let (lead_state, notifier, gateway) = tokio::join!(lead_state, notifier, gateway);
        let keys_loaded = gateway.is_ok_and(|response| response.has_code("invalid_api_key"));
        if lead_state.is_ok() && notifier.is_ok() && keys_loaded {
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
}

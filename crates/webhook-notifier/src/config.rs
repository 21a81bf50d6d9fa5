//! Configuration: flags that are also environment variables.

use std::{net::SocketAddr, time::Duration};

use clap::Args;
use ipnet::IpNet;
use service_kit::{
    config::{DatabaseConfig, HealthConfig, NatsConfig, SecretsConfig},
    retention::Retention,
};

use crate::{callback_health::DisableAfter, core::schedule::Schedule};

const MAX_IN_FLIGHT: u32 = 512;
/// Longer than a restart of the endpoint.
const FAILING_AFTER: Duration = Duration::from_mins(5);
/// A callback that exhausts deliveries all day makes 144 events.
const EXHAUSTED_INTERVAL: Duration = Duration::from_mins(10);
const EVENT_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// Configuration of the webhook-notifier.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// How to reach NATS.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// How to reach Postgres.
    #[command(flatten)]
    pub database: DatabaseConfig,
    /// The keys that callbacks' secrets are sealed with.
    #[command(flatten)]
    pub secrets: SecretsConfig,
    /// Where the health port listens.
    #[command(flatten)]
    pub health: HealthConfig,
    /// Do not bring the database schema up to date at start. The service waits until `leadctl migrate` has done it.
    #[arg(long, env = "NO_MIGRATE")]
    pub no_migrate: bool,
    /// Let callbacks have http:// URLs. Their payloads are then sent unencrypted.
    #[arg(long, env = "ALLOW_HTTP")]
    pub allow_http: bool,
    /// An internal network that callbacks may reach, e.g. 10.20.0.0/16. May be repeated, or separated by commas.
    #[arg(long = "allow-network", env = "ALLOW_NETWORKS", value_delimiter = ',', value_name = "CIDR")]
    pub allow_networks: Vec<IpNet>,
    /// A network that callbacks may not reach, even within the allowed ones. May be repeated, or separated by commas.
    /// The addresses of Postgres, NATS and this machine are never allowed.
    #[arg(long = "deny-network", env = "DENY_NETWORKS", value_delimiter = ',', value_name = "CIDR")]
    pub deny_networks: Vec<IpNet>,
    /// A port that callbacks may use although it belongs to another protocol, e.g. 9092. May be repeated, or separated
    /// by commas.
    #[arg(long = "allow-port", env = "ALLOW_PORTS", value_delimiter = ',', value_name = "PORT")]
    pub allow_ports: Vec<u16>,
    /// A name server to look up callbacks with, instead of those in /etc/resolv.conf, e.g. 10.0.0.53:53. May be
    /// repeated, or separated by commas.
    #[arg(long = "dns-server", env = "DNS_SERVERS", value_delimiter = ',', value_name = "ADDRESS")]
    pub dns_servers: Vec<SocketAddr>,
    /// The delay before each attempt of a delivery, including the first. Each delay is up to a tenth longer.
    /// After the last attempt the delivery is exhausted.
    #[arg(long, env = "RETRY_SCHEDULE", default_value_t, value_name = "DELAYS")]
    pub retry_schedule: Schedule,
    /// How long a callback may fail without a success before it is disabled: a duration, or off. A disabled callback
    /// receives nothing until it is enabled with `leadctl callback enable`.
    #[arg(long, env = "DISABLE_AFTER", default_value_t, value_name = "DURATION")]
    pub disable_after: DisableAfter,
    /// How long a callback fails without a success before callbacks that name callback.failing receive that event.
    #[arg(long, env = "FAILING_AFTER", default_value_t = FAILING_AFTER.into(), value_name = "DURATION")]
    pub failing_after: humantime::Duration,
    /// Minimum time between two delivery.exhausted events about one callback. The later event reports all deliveries
    /// since.
    #[arg(long, env = "EXHAUSTED_INTERVAL", default_value_t = EXHAUSTED_INTERVAL.into(), value_name = "DURATION")]
    pub exhausted_interval: humantime::Duration,
    /// Maximum number of attempts in flight, of all callbacks. A large body counts as several. A project gets at most
    /// half of them, and a callback half of that. A higher maximum allows more slow endpoints in parallel; a lower one
    /// takes less memory.
    #[arg(long, env = "MAX_IN_FLIGHT", default_value_t = MAX_IN_FLIGHT, value_parser = clap::value_parser!(u32).range(8..=65_536))]
    pub max_in_flight: u32,
    /// How long months of the delivery log are kept, at least 62days, or off. Older months without pending deliveries
    /// are dropped.
    #[arg(long, env = "DELIVERY_RETENTION", default_value_t, value_name = "DURATION")]
    pub delivery_retention: Retention,
    /// How long delivery statistics are kept: a duration no shorter than the retention of the delivery log, or off.
    /// Default: as long as the delivery log.
    #[arg(long, env = "STATISTICS_RETENTION", value_name = "DURATION")]
    pub statistics_retention: Option<Retention>,
    /// How long events stay in their stream after they were delivered or recorded. While the stream is more than half
    /// full, they are purged at once.
    #[arg(long, env = "EVENT_RETENTION", default_value_t = EVENT_RETENTION.into(), value_name = "DURATION")]
    pub event_retention: humantime::Duration,
}

//! 1 Accept: the gateway's configuration.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, value_parser};
use service_kit::config::{HealthConfig, NatsConfig};

/// The options of the gateway.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long = "listen", env = "GATEWAY_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// PEM file with the certificate chain, to serve the HTTP API over TLS. It is read again when it changes.
    #[arg(long, env = "GATEWAY_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's private key.
    #[arg(long, env = "GATEWAY_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Longest request body, in bytes. The max_payload of NATS must be a little larger; updates that exceed max_payload
    /// are refused.
    #[arg(long, env = "GATEWAY_MAX_BODY_BYTES", default_value_t = 256 * 1024, value_parser = value_parser!(u32).range(1024..=64 * 1024 * 1024))]
    pub max_body_bytes: u32,
    /// Maximum number of updates that wait for JetStream's ack at once, with a share per project; further updates get
    /// 429 or 503. A higher number compensates for a slow disk, at the cost of latency and of memory for one body each.
    #[arg(long, env = "GATEWAY_MAX_IN_FLIGHT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_in_flight: u32,
    /// Maximum number of connections at once. A further connection replaces the one that has waited longest for its
    /// first request, if any waits. Each connection takes a file descriptor and, depending on the client, up to 128 KiB
    /// and a body.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 8192, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Maximum number of connections at once from one client address (an IPv6 /64 counts as one); further ones are
    /// closed. 0 means no limit, for gateways behind a proxy: there, all clients have the proxy's address.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 1024)]
    pub max_connections_per_address: u32,
    /// Maximum number of clients that follow events at once, with a share per project. Each has a consumer in NATS, and
    /// takes up to 4 MiB if its client is slow.
    #[arg(long, env = "GATEWAY_MAX_LISTENERS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_listeners: u32,
    /// How long a client may take to send the head of a request, and how long an idle connection is kept.
    #[arg(long, env = "GATEWAY_HEADER_TIMEOUT", default_value = "30s")]
    pub header_timeout: humantime::Duration,
    /// How long a client may take to receive a response.
    #[arg(long, env = "GATEWAY_WRITE_TIMEOUT", default_value = "30s")]
    pub write_timeout: humantime::Duration,
    /// Maximum number of updates in 5 seconds at this gateway, for each API key and for the producers of each project;
    /// further updates get 429. 0 means no limit.
    #[arg(long, env = "GATEWAY_UPDATE_RATE", default_value_t = 5000)]
    pub update_rate: u32,
    /// Maximum number of other requests of an API key in 5 seconds at this gateway. 0 means no limit.
    #[arg(long, env = "GATEWAY_OTHER_RATE", default_value_t = 500)]
    pub other_rate: u32,
    /// The work that a project's updates may cause in a second at all gateways together, in MiB that are read, merged,
    /// stored and sent for them. Further updates get 429. 0 means no limit.
    #[arg(long, env = "GATEWAY_WORK_RATE", default_value_t = 16)]
    pub work_rate: u32,
    /// The connection to NATS.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// The health endpoints.
    #[command(flatten)]
    pub health: HealthConfig,
}

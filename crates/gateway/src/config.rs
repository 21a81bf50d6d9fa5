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
    /// Longest request body, in bytes. NATS must accept a little more than this (max_payload); larger updates are
    /// refused.
    #[arg(long, env = "GATEWAY_MAX_BODY_BYTES", default_value_t = 256 * 1024, value_parser = value_parser!(u32).range(1024..=64 * 1024 * 1024))]
    pub max_body_bytes: u32,
    /// Maximum number of updates that wait for JetStream's ack at once, with a share per project; further ones get 429
    /// or 503. More make up for a slower disk, at the cost of memory (a body each) and latency.
    #[arg(long, env = "GATEWAY_MAX_IN_FLIGHT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_in_flight: u32,
    /// Maximum number of connections at once; the next one takes the place of the one that waited longest for its first
    /// request, if there is one. Each is a file descriptor and, depending on the client, up to 128 KiB and a body.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 8192, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Maximum number of connections at once from one client address (an IPv6 /64 counts as one); further ones are
    /// closed. 0 is no limit, for gateways behind a proxy, whose address all clients have.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 1024)]
    pub max_connections_per_address: u32,
    /// Maximum number of clients that follow events at once, with a share per project. Each is a consumer in NATS and
    /// holds up to 4 MiB if its client is slow.
    #[arg(long, env = "GATEWAY_MAX_LISTENERS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_listeners: u32,
    /// How long a client may take to send the head of a request, and how long an idle connection is kept.
    #[arg(long, env = "GATEWAY_HEADER_TIMEOUT", default_value = "30s")]
    pub header_timeout: humantime::Duration,
    /// How long a client may take to receive a response.
    #[arg(long, env = "GATEWAY_WRITE_TIMEOUT", default_value = "30s")]
    pub write_timeout: humantime::Duration,
    /// Maximum number of updates of an API key, and of a project's producers, in 5 seconds at this gateway; further
    /// ones get 429. 0 is no limit.
    #[arg(long, env = "GATEWAY_UPDATE_RATE", default_value_t = 5000)]
    pub update_rate: u32,
    /// Maximum number of other requests of an API key in 5 seconds at this gateway. 0 is no limit.
    #[arg(long, env = "GATEWAY_OTHER_RATE", default_value_t = 500)]
    pub other_rate: u32,
    /// The work that a project's updates may cause in a second at all gateways, in MiB: what is read, merged, stored
    /// and sent for them. Further ones get 429. 0 is no limit.
    #[arg(long, env = "GATEWAY_WORK_RATE", default_value_t = 16)]
    pub work_rate: u32,
    /// The connection to NATS.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// The health endpoints.
    #[command(flatten)]
    pub health: HealthConfig,
}

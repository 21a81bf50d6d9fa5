//! 1 Accept: the gateway's configuration.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, value_parser};
use service_kit::config::{HealthConfig, NatsConfig};

/// What the gateway is told at its start.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long = "listen", env = "GATEWAY_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// A file with the certificate chain to serve the HTTP API with over TLS, in PEM. It is read again when it changes.
    #[arg(long, env = "GATEWAY_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// A file with the certificate's private key, in PEM.
    #[arg(long, env = "GATEWAY_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Longest request body, in bytes. NATS must take a little more than this (its max_payload); what it does not take
    /// is refused.
    #[arg(long, env = "GATEWAY_MAX_BODY_BYTES", default_value_t = 256 * 1024, value_parser = value_parser!(u32).range(1024..=64 * 1024 * 1024))]
    pub max_body_bytes: u32,
    /// Most updates that may wait for JetStream's ack at once; past it clients are told 503. More rides out a slower
    /// disk, at the cost of memory (a body each) and of waiting longer for the answer.
    #[arg(long, env = "GATEWAY_MAX_IN_FLIGHT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_in_flight: u32,
    /// Most connections at once; further ones wait in the kernel's queue. Each is a file descriptor and, where a client
    /// makes it so, up to 128 KiB and a body.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS", default_value_t = 8192, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Most connections at once from one client address (an IPv6 /64 counts as one); further ones are closed. 0 is no
    /// limit, for gateways behind a proxy, whose address all clients share.
    #[arg(long, env = "GATEWAY_MAX_CONNECTIONS_PER_ADDRESS", default_value_t = 1024)]
    pub max_connections_per_address: u32,
    /// Most clients that follow events at once; a single API key gets at most a quarter of it. Each is a consumer in NATS
    /// and holds, where its client is slow, up to 4 MiB.
    #[arg(long, env = "GATEWAY_MAX_LISTENERS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_listeners: u32,
    /// How long a client may take to send a request's head; how long an idle connection is kept.
    #[arg(long, env = "GATEWAY_HEADER_TIMEOUT", default_value = "30s")]
    pub header_timeout: humantime::Duration,
    /// How long a client may take to take an answer.
    #[arg(long, env = "GATEWAY_WRITE_TIMEOUT", default_value = "30s")]
    pub write_timeout: humantime::Duration,
    /// Most updates that an API key may make in 5 seconds, at this gateway; past it the answer is 429. 0 is no limit.
    #[arg(long, env = "GATEWAY_UPDATE_RATE", default_value_t = 5000)]
    pub update_rate: u32,
    /// Most other requests that an API key may make in 5 seconds, at this gateway. 0 is no limit.
    #[arg(long, env = "GATEWAY_OTHER_RATE", default_value_t = 500)]
    pub other_rate: u32,
    /// Where NATS is.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// Where health is answered.
    #[command(flatten)]
    pub health: HealthConfig,
}

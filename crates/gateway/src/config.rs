//! 1 Accept: the gateway's configuration.

use std::net::SocketAddr;

use clap::{Args, value_parser};
use service_kit::config::{HealthConfig, NatsConfig};

/// What the gateway is told at its start.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Address of the HTTP API.
    #[arg(long = "listen", env = "GATEWAY_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Longest request body, in bytes. NATS must take a little more than this (its max_payload); what it does not take
    /// is refused.
    #[arg(long, env = "GATEWAY_MAX_BODY_BYTES", default_value_t = 256 * 1024, value_parser = value_parser!(u32).range(1024..=64 * 1024 * 1024))]
    pub max_body_bytes: u32,
    /// Most updates that may wait for JetStream's ack at once; past it clients are told 503. More rides out a slower
    /// disk, at the cost of memory (a body each) and of waiting longer for the answer.
    #[arg(long, env = "GATEWAY_MAX_IN_FLIGHT", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_in_flight: u32,
    /// Where NATS is.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// Where health is answered.
    #[command(flatten)]
    pub health: HealthConfig,
}

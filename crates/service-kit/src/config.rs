//! Configuration shared by the services: flags that are also environment variables.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};

/// How to reach NATS.
#[derive(Debug, Clone, Args)]
pub struct NatsConfig {
    /// Where NATS listens, with user and password if it wants them; several servers of a cluster separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true)]
    pub nats_url: String,
    /// A credentials file (JWT and seed) for NATS.
    #[arg(long, env = "NATS_CREDS")]
    pub nats_creds: Option<PathBuf>,
    /// A file of CA certificates that NATS's certificate is checked against, for tls:// URLs.
    #[arg(long, env = "NATS_CA")]
    pub nats_ca: Option<PathBuf>,
}

/// How to reach Postgres.
#[derive(Clone, Args)]
pub struct DatabaseConfig {
    /// Where Postgres listens: postgres://user:password@host:port/database.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
    /// Most connections to Postgres that this process holds.
    #[arg(long, env = "DATABASE_CONNECTIONS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(3..=200))]
    pub database_connections: u32,
}

/// Leaves out the password.
impl std::fmt::Debug for DatabaseConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatabaseConfig")
            .field("database_connections", &self.database_connections)
            .finish_non_exhaustive()
    }
}

/// Where health and readiness are answered.
#[derive(Debug, Clone, Args)]
pub struct HealthConfig {
    /// Address of the health port: /healthz and /readyz. Port 0 takes a free one.
    #[arg(long, env = "HEALTH_LISTEN", default_value = "127.0.0.1:0")]
    pub health_listen: SocketAddr,
}

/// How to log.
#[derive(Debug, Clone, Args)]
pub struct LogConfig {
    /// How log lines look. auto: for people in a terminal, JSON otherwise.
    #[arg(long, env = "LOG_FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
    /// What is logged, e.g. info or lead_state=debug,info.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_filter: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people in a terminal, JSON otherwise.
    Auto,
    /// For people.
    Human,
    /// A JSON object a line.
    Json,
}

//! Configuration shared by the services: flags that are also environment variables.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use contract::secret::Secret;
use secrets::SealingKeys;
use tracing_subscriber::filter::Targets;

pub use crate::secret_files::parse;

/// How to reach NATS.
#[derive(Debug, Clone, Args)]
pub struct NatsConfig {
    /// The URL of NATS, with user and password if needed; the servers of a cluster separated by commas.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true)]
    pub nats_url: String,
    /// The password of the user in the URL, if the URL contains none.
    #[arg(long, env = "NATS_PASSWORD", hide_env_values = true)]
    pub nats_password: Option<Secret>,
    /// A credentials file (JWT and seed) for NATS.
    #[arg(long, env = "NATS_CREDS")]
    pub nats_creds: Option<PathBuf>,
    /// A file of CA certificates for tls:// URLs. By default the system's.
    #[arg(long, env = "NATS_CA")]
    pub nats_ca: Option<PathBuf>,
    /// A file with this program's certificate, if NATS requires one.
    #[arg(long, env = "NATS_CERT", requires = "nats_key")]
    pub nats_cert: Option<PathBuf>,
    /// A file with the private key of that certificate.
    #[arg(long, env = "NATS_KEY", requires = "nats_cert")]
    pub nats_key: Option<PathBuf>,
}

impl NatsConfig {
    /// NATS at this URL, without other settings.
    pub fn at(nats_url: impl Into<String>) -> Self {
        Self {
            nats_url: nats_url.into(),
            nats_password: None,
            nats_creds: None,
            nats_ca: None,
            nats_cert: None,
            nats_key: None,
        }
    }
}

/// How to reach Postgres.
#[derive(Clone, Args)]
pub struct DatabaseConfig {
    /// The URL of Postgres: postgres://user:password@host:port/database. Add ?sslmode=verify-full&sslrootcert=ca.pem
    /// for TLS with a verified certificate.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
    /// Maximum number of connections of this process to Postgres.
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

/// The keys that callbacks' secrets are sealed with at rest.
#[derive(Debug, Clone, Default, Args)]
pub struct SecretsConfig {
    /// The key that seals and opens: the base64 of 32 random bytes. `leadctl secrets new-key` generates one.
    #[arg(long, env = "SECRETS_KEY", hide_env_values = true, value_name = "KEY")]
    pub secrets_key: Option<Secret>,
    /// Keys from before rotations, which only open, separated by commas.
    #[arg(long, env = "SECRETS_KEYS_OLD", hide_env_values = true, value_delimiter = ',', value_name = "KEYS")]
    pub secrets_keys_old: Vec<Secret>,
}

impl SecretsConfig {
    /// Reads the keys.
    ///
    /// # Errors
    /// The present key is missing, or one of the keys is invalid. The error does not quote them.
    pub fn keys(&self) -> anyhow::Result<SealingKeys> {
        let is_set = |key: &&Secret| !key.expose().trim().is_empty();
        let Some(present) = self.secrets_key.as_ref().filter(is_set) else {
            bail!(
                "SECRETS_KEY is not set; it seals the secrets of callbacks. Generate one with `leadctl secrets new-key` or \
                 `openssl rand -base64 32`, and give the same key to lead-state and webhook-notifier"
            );
        };
        let old = self.secrets_keys_old.iter().filter(is_set).map(Secret::expose);
        SealingKeys::parse(present.expose(), old).context(
            "SECRETS_KEY or one of SECRETS_KEYS_OLD is not a key; generate one with `leadctl secrets new-key` or \
             `openssl rand -base64 32`",
        )
    }
}

/// The health port.
#[derive(Debug, Clone, Args)]
pub struct HealthConfig {
    /// Address of the health port: /healthz, /readyz and /metrics. Port 0 takes a free one.
    #[arg(long, env = "HEALTH_LISTEN", default_value = "127.0.0.1:0")]
    pub health_listen: SocketAddr,
}

/// Logging.
#[derive(Debug, Clone, Args)]
pub struct LogConfig {
    /// The format of log lines. auto: readable text in a terminal, JSON otherwise.
    #[arg(long, env = "LOG_FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
    /// Which log events are printed, e.g. info or lead_state=debug,info.
    // The NATS client would log each message that a full subscription drops.
    #[arg(long, env = "RUST_LOG", default_value = "info,async_nats=warn")]
    pub log_filter: Targets,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Readable text in a terminal, JSON otherwise.
    Auto,
    /// Readable text.
    Human,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_invalid_keys_are_reported_but_not_quoted() {
        let config = |present: Option<&str>, old: &[&str]| SecretsConfig {
            secrets_key: present.map(Secret::from),
            secrets_keys_old: old.iter().copied().map(Secret::from).collect(),
        };
        let one = secrets::new_sealing_key([1; 32]);
        assert!(config(Some(&one), &[]).keys().is_ok());
        // An empty variable counts as unset.
        assert!(config(Some(&one), &[""]).keys().is_ok());
        for missing in [config(None, &[]), config(Some(" "), &[])] {
            let error = missing.keys().unwrap_err().to_string();
            assert!(error.contains("leadctl secrets new-key") && error.contains("openssl rand -base64 32"), "{error}");
        }
        for wrong in [config(Some("t0psecret"), &[]), config(Some(&one), &["t0psecret"])] {
            let error = format!("{:#} {wrong:?}", wrong.keys().unwrap_err());
            assert!(error.contains("base64 of 32 random bytes") && !error.contains("t0psecret"), "{error}");
        }
    }
}

//! Arguments that several subcommands share.

use clap::Args;
use contract::{ObjectId, Timestamp};
use service_kit::clock;

use crate::clients::{admin::Admin, gateway::GatewayClient};

/// Options of commands that are about one project.
#[derive(Debug, Args)]
pub(crate) struct InProject {
    /// The project.
    #[arg(long = "project", value_name = "ID")]
    pub(crate) project_id: ObjectId,
    #[command(flatten)]
    pub(crate) admin: Admin,
}

/// Options of commands that use the HTTP API.
#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    /// URL of the gateway.
    #[arg(long, env = "LEADRELAY_GATEWAY_URL", default_value = "http://127.0.0.1:8080")]
    gateway_url: String,
    /// The API key.
    #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true)]
    api_key: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl GatewayArgs {
    pub(crate) fn client(&self) -> anyhow::Result<GatewayClient> {
        GatewayClient::new(&self.gateway_url, &self.api_key)
    }
}

/// Parses a time, e.g. `2026-01-12T04:55:59Z` or `2026-01-12 04:55:59`.
pub(crate) fn parse_time(text: &str) -> Result<Timestamp, String> {
    humantime::parse_rfc3339_weak(text).map(Timestamp::from).map_err(|e| e.to_string())
}

/// Parses a time, or an age such as `1d`.
pub(crate) fn parse_since(text: &str) -> Result<Timestamp, String> {
    if let Ok(age) = humantime::parse_duration(text) {
        return Ok(clock::now().minus(age));
    }
    text.parse().map_err(|_| "must be a time such as 2026-01-12T04:55:59Z, or an age such as 1d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Timestamp = Timestamp::from_millis(1_768_193_759_000);

    #[test]
    fn times_are_parsed() {
        assert_eq!(parse_time("2026-01-12T04:55:59Z"), Ok(TIME));
        assert_eq!(parse_time("2026-01-12 04:55:59"), Ok(TIME));
        assert!(parse_time("yesterday").is_err());
    }

    #[test]
    fn times_and_ages_are_parsed() {
        assert_eq!(parse_since("2026-01-12T04:55:59Z"), Ok(TIME));
        let since = parse_since("1h").unwrap();
        let age = clock::now().millis() - since.millis();
        assert!((3_600_000..3_660_000).contains(&age), "{age}");
        assert!(parse_since("yesterday").is_err());
    }
}

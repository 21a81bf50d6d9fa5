//! Sends commands that are in the log once the gateway answers, and reports their outcomes.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use clap::Args;
use contract::{ObjectId, rpc::UpdateStatus};
use http_api::UpdateAccepted;
use serde::Serialize;

use crate::{arguments::GatewayArgs, clients::gateway::GatewayResponse, exit_status::ExitStatus, output};

/// How long to wait for the outcome without --wait, in seconds.
const DEFAULT_WAIT: u64 = 5;
/// The longest wait that the gateway accepts, in seconds.
const MAX_WAIT: u64 = 30;

#[derive(Debug, Args)]
pub(crate) struct Sending {
    /// Wait this many seconds for the outcome, 30 without a number; exit with 5 if it failed, 7 if it is still pending.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "30",
        value_parser = clap::value_parser!(u64).range(1..=MAX_WAIT)
    )]
    wait: Option<u64>,
    /// Makes it safe to repeat the command: within a day, one key sends it only once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    pub(crate) gateway: GatewayArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SentUpdate {
    update_id: ObjectId,
    status: UpdateStatus,
    error: Option<String>,
    warnings: Vec<String>,
}

impl Sending {
    pub(crate) async fn post(self, path: &str, request: &impl Serialize) -> anyhow::Result<ExitCode> {
        let (headers, longer) = self.headers();
        let response = self.gateway.client()?.post(path, request, &headers, longer).await?;
        self.report(&response)
    }

    pub(crate) async fn delete(self, path: &str) -> anyhow::Result<ExitCode> {
        let (headers, longer) = self.headers();
        let response = self.gateway.client()?.delete(path, &headers, longer).await?;
        self.report(&response)
    }

    /// The headers, and how long the response may wait for the outcome.
    pub(crate) fn headers(&self) -> (BTreeMap<&'static str, String>, Duration) {
        let seconds = self.wait.unwrap_or(DEFAULT_WAIT);
        let mut headers = BTreeMap::from([("prefer", format!("wait={seconds}"))]);
        headers.extend(self.idempotency_key.as_ref().map(|key| ("idempotency-key", quoted(key))));
        (headers, Duration::from_secs(seconds))
    }

    /// Prints the outcome of an accepted update or call event. With --wait, a failure or timeout decides the exit code.
    pub(crate) fn report(&self, response: &GatewayResponse) -> anyhow::Result<ExitCode> {
        let UpdateAccepted { update_id, warnings, outcome, .. } = response.json()?;
        let status = match &outcome {
            None => UpdateStatus::Pending,
            Some(outcome) if outcome.success => UpdateStatus::Succeeded,
            Some(_) => UpdateStatus::Failed,
        };
        let sent = SentUpdate { update_id, status, error: outcome.and_then(|outcome| outcome.error), warnings };
        output::show(self.gateway.json, &sent, |SentUpdate { error, warnings, .. }| {
            output::say(format_args!("{update_id} {status}"));
            error.iter().for_each(|error| output::field("error", error));
            warnings.iter().for_each(|warning| output::field("warning", warning));
        })?;
        let waits = self.wait.is_some();
        Ok(match status {
            UpdateStatus::Failed if waits => ExitStatus::UpdateFailed.into(),
            UpdateStatus::Pending if waits => ExitStatus::TimedOut.into(),
            _ => ExitCode::SUCCESS,
        })
    }
}

/// A string as in RFC 8941, 3.3.3.
fn quoted(key: &str) -> String {
    format!("\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idempotency_keys_are_quoted() {
        assert_eq!(quoted(r#"a"\"#), r#""a\"\\""#);
    }
}

//! `leadctl doctor`: finds what is wrong with a live installation, and advises how to repair it.
//!
//! The doctor examines NATS and Postgres directly, and the services whose health ports are given. It changes nothing.

mod check;
mod database;
mod services;
mod streams;

use std::process::ExitCode;

use clap::Args;
use contract::rpc::{GetRecovery, RecoveryStatus};
use serde::Serialize;
use service_kit::{config::NatsConfig, nats, version::ServerVersion};

use self::check::{Check, State};
use crate::{
    clients::admin,
    exit_status::ExitStatus,
    output::{self, escape::escaped},
};

/// Check a live installation: connections, versions, stream settings, schemas, backlogs, clocks, callbacks and dead letters;
/// show what is wrong and how to repair it. Changes nothing. Exits with 0 if all checks pass, 8 if one failed, 9 if none
/// failed but there are warnings.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  leadctl doctor\n  leadctl doctor --nats-monitor http://nats:8222 \
                        --health http://gateway:8081 --health http://lead-state:8081")]
pub(crate) struct Doctor {
    #[command(flatten)]
    nats: NatsConfig,
    /// Postgres, as postgres://user:password@host:port/database. The user must be able to read both schemas.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Monitoring port of a NATS server, to check that it syncs before it acks; can be repeated or comma-separated.
    #[arg(long, env = "NATS_MONITOR", value_delimiter = ',', value_name = "URL")]
    nats_monitor: Vec<String>,
    /// Health port of a service, to check its version, clock and readiness; can be repeated or comma-separated.
    #[arg(long, env = "LEADRELAY_HEALTH", value_delimiter = ',', value_name = "URL")]
    health: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    state: State,
    checks: Vec<Check>,
}

impl Doctor {
    /// Runs all checks. A server that cannot be reached is a failed check, not an error.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let checks = self.examine().await;
        let state = checks.iter().map(|check| check.state).max().unwrap_or(State::Ok);
        let report = Report { state, checks };
        output::show(self.json, &report, show)?;
        Ok(match state {
            State::Ok | State::Unknown => ExitCode::SUCCESS,
            State::Warning => ExitStatus::CheckWarning.into(),
            State::Failed => ExitStatus::CheckFailed.into(),
        })
    }

    async fn examine(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let client = admin::connect(&self.nats).await;
        match &client {
            Ok(client) => {
                let version = client.server_info().version;
                let server = ServerVersion::parse(&version);
                checks.push(nats_version(&version, server));
                checks.extend(streams::examine(&nats::jetstream(client), server).await);
                checks.push(streams::clock(client).await);
                checks.push(recovery(client).await);
                checks.extend(services::registered(client).await);
            }
            Err(e) => checks.push(Check::failed("nats", format!("{e:#}"), "start NATS, or correct --nats-url")),
        }
        checks.extend(services::monitored(&self.nats_monitor).await);
        checks.extend(database::examine(&self.database_url, client.as_ref().ok()).await);
        checks.extend(services::healthy(&self.health).await);
        checks
    }
}

fn nats_version(version: &str, server: ServerVersion) -> Check {
    match server.limitations().as_slice() {
        [] => Check::ok("nats version", version),
        lacks => {
            Check::warning("nats version", format!("{version}: {}", lacks.join("; ")), "upgrade NATS to 2.15 or later")
        }
    }
}

/// Whether lead-state answers and has not halted.
async fn recovery(client: &async_nats::Client) -> Check {
    let check = "log, ledger and events";
    match admin::request(client, &GetRecovery {}).await {
        Ok(RecoveryStatus { halted: None, .. }) => Check::ok(check, "consistent"),
        Ok(RecoveryStatus { halted: Some(halted), .. }) => Check::failed(
            check,
            format!("halted: {}: {}", halted.reason, halted.text),
            format!("leadctl recover {}", halted.remedy),
        ),
        Err(e) => Check::failed(check, format!("{e:#}"), "start lead-state; its log says what it waits for"),
    }
}

fn show(report: &Report) {
    let mark = |state| match state {
        State::Ok => "ok",
        State::Unknown => "?",
        State::Warning => "warning",
        State::Failed => "FAILED",
    };
    let rows: Vec<_> = report
        .checks
        .iter()
        .map(|check| [mark(check.state).to_owned(), check.check.clone(), check.finding.clone()])
        .collect();
    output::say(output::table(None, &rows));
    let mut advised = report.checks.iter().filter(|check| check.state > State::Ok).peekable();
    if advised.peek().is_some() {
        output::say("");
    }
    for check in advised {
        if let Some(advice) = &check.advice {
            output::say(format_args!("{}: {}\n  {}", check.check, escaped(&check.finding), escaped(advice)));
        }
    }
    output::say(match report.state {
        State::Ok | State::Unknown => "\nHEALTHY",
        State::Warning => "\nHEALTHY, with warnings",
        State::Failed => "\nNOT HEALTHY",
    });
}

//! `leadctl doctor`: finds what is wrong with a live installation, and advises how to repair it.
//!
//! The doctor examines NATS and Postgres directly, and the services whose health ports are given. It changes nothing.

mod audits;
mod check;
mod database;
mod replicas;
mod services;
mod streams;

use std::{process::ExitCode, time::Duration};

use anyhow::anyhow;
use async_nats::{Client, jetstream};
use clap::Args;
use contract::rpc::{GetRecovery, RecoveryStatus};
use serde::Serialize;
use service_kit::{config::NatsConfig, version::ServerVersion};
use tokio::time::{Instant, timeout, timeout_at};

use self::{
    check::{Check, State},
    services::Instance,
};
use crate::{
    clients::admin,
    exit_status::ExitStatus,
    output::{self, escape::escaped},
};

/// How long all checks may take: the doctor answers within 10 s, whatever hangs.
const DEADLINE: Duration = Duration::from_secs(9);
/// How long the connection to NATS may take. The checks need the rest.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long JetStream may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long lead-state may take to answer.
const QUERY_TIMEOUT: Duration = Duration::from_secs(3);

/// Check a live installation: connections, versions, stream settings, schemas, backlogs, clocks, callbacks and dead
/// letters; show what is wrong and how to repair it. Changes nothing. Exits with 0 if all checks pass, 8 if one failed,
/// 9 if none failed but there are warnings.
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

    /// Examines all parts at the same time, until the deadline: a part that does not answer is a finding.
    async fn examine(&self) -> Vec<Check> {
        let deadline = Instant::now() + DEADLINE;
        let broker = match admin::connect_within(CONNECT_TIMEOUT, &self.nats).await {
            Ok(client) => Ok(Broker::probe(client).await),
            Err(e) => Err(Check::failed("nats", format!("{e:#}"), "start NATS, or correct --nats-url")),
        };
        let js = broker.as_ref().ok().and_then(|broker| broker.js.as_ref().ok());
        let database = "see pg_stat_activity: what do sessions wait for?";
        let groups = tokio::join!(
            examined("nats", deadline, "see the logs of nats-server", async {
                match &broker {
                    Ok(broker) => broker.examine().await,
                    Err(check) => vec![check.clone()],
                }
            }),
            examined(
                "nats monitoring",
                deadline,
                "see the logs of nats-server",
                services::monitored(&self.nats_monitor)
            ),
            examined("postgres", deadline, database, database::examine(&self.database_url, js)),
            examined("services", deadline, "see the logs of the services", services::healthy(&self.health)),
        );
        [groups.0, groups.1, groups.2, groups.3].concat()
    }
}

/// The checks of one part; one failed check if they do not end in time.
async fn examined(
    part: &str,
    deadline: Instant,
    advice: &str,
    examine: impl Future<Output = Vec<Check>>,
) -> Vec<Check> {
    let checks = timeout_at(deadline, examine).await;
    checks.unwrap_or_else(|_| vec![Check::failed(part, "the checks did not end in time", advice)])
}

/// A connection to NATS, and the services that answer there.
struct Broker {
    client: Client,
    instances: Vec<Instance>,
    /// JetStream, or why it does not answer.
    js: Result<jetstream::Context, Check>,
}

impl Broker {
    async fn probe(client: Client) -> Self {
        let js = jetstream::ContextBuilder::new().timeout(ANSWER_TIMEOUT).build(client.clone());
        let (instances, answers) = tokio::join!(services::registered(&client), streams::jetstream_answers(&js));
        Self { client, instances, js: answers.map(|()| js) }
    }

    async fn examine(&self) -> Vec<Check> {
        let version = self.client.server_info().version;
        let server = ServerVersion::parse(&version);
        let streams = async {
            match &self.js {
                Ok(js) => streams::examine(js, server, &services::configured_replicas(&self.instances)).await,
                Err(check) => vec![check.clone()],
            }
        };
        let clock = async {
            match &self.js {
                Ok(_) => vec![streams::clock(&self.client).await],
                Err(_) => Vec::new(),
            }
        };
        let audits = async {
            match &self.js {
                Ok(js) => audits::examine(js).await,
                Err(_) => Vec::new(),
            }
        };
        let (streams, clock, recovery, audits) = tokio::join!(streams, clock, recovery(&self.client), audits);
        let version = nats_version(&version, server);
        [vec![version], streams, clock, vec![recovery], audits, services::present(&self.instances)].concat()
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
async fn recovery(client: &Client) -> Check {
    let check = "log, ledger and events";
    let answer = timeout(QUERY_TIMEOUT, admin::request(client, &GetRecovery {})).await;
    match answer.unwrap_or_else(|_| Err(anyhow!("lead-state does not answer within {QUERY_TIMEOUT:?}"))) {
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

//! `leadctl doctor`: 1 to 8: what is wrong with a live installation, and how to mend it.
//!
//! It looks at NATS and Postgres itself, and asks the services as far as it is told where they are. What it finds is judged by
//! pure functions; it changes nothing.

mod database;
mod services;
mod streams;

use std::{process::ExitCode, time::Duration};

use clap::Args;
use contract::{
    Timestamp,
    rpc::{GetRecovery, RECOVERY_GET, RecoveryStatus},
};
use serde::Serialize;
use service_kit::{config::NatsConfig, nats, version::ServerVersion};

use crate::{admin, exit::Examined, output};

/// Clocks that differ by more than this are worth a word: times in answers and webhooks do not fit together.
const SKEW_NOTED: f64 = 2.0;
/// Clocks that differ by more than this do harm: receivers of webhooks refuse signatures that are minutes off, and keys and
/// calls expire at the wrong time.
const SKEW_HARMFUL: f64 = 30.0;

/// Check a live installation: connections, versions, settings of the streams, schema, lag, clocks, callbacks, dead letters;
/// say what is wrong and how to mend it. Changes nothing. Ends with 0 when nothing is wrong, 8 when something is, 9 when
/// something should be looked at.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  leadctl doctor\n  leadctl doctor --nats-monitor http://nats:8222 \
                        --health http://gateway:8081 --health http://lead-state:8081")]
pub(crate) struct Doctor {
    #[command(flatten)]
    nats: NatsConfig,
    /// Where Postgres listens: postgres://user:password@host:port/database. The user must be able to read both schemas.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// The monitoring port of a NATS server, to see whether it syncs before it acks; several times, or separated by commas.
    #[arg(long, env = "NATS_MONITOR", value_delimiter = ',', value_name = "URL")]
    nats_monitor: Vec<String>,
    /// The health port of a service, to see its version, its clock and whether it is ready; several times, or separated by
    /// commas.
    #[arg(long, env = "LEADRELAY_HEALTH", value_delimiter = ',', value_name = "URL")]
    health: Vec<String>,
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// As it should be.
    Ok,
    /// It could not be seen, and nothing says that it is wrong.
    Unknown,
    /// Somebody should look.
    Warning,
    /// It must be mended.
    Wrong,
}

/// What was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    what: String,
    state: State,
    found: String,
    /// How to mend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), state: State::Ok, found: found.into(), mend: None }
    }

    fn not_ok(state: State, what: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what: what.into(), state, found: found.into(), mend: Some(mend.into()) }
    }

    fn wrong(what: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::not_ok(State::Wrong, what, found, mend)
    }

    fn warning(what: impl Into<String>, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::not_ok(State::Warning, what, found, mend)
    }
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    state: State,
    checks: Vec<Check>,
}

impl Doctor {
    /// Looks at everything; what cannot be reached is a finding.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let checks = self.examine().await;
        let state = checks.iter().map(|check| check.state).max().unwrap_or(State::Ok);
        let report = Report { state, checks };
        if self.json {
            output::json(&report)?;
        } else {
            show(&report);
        }
        Ok(match state {
            State::Ok | State::Unknown => ExitCode::SUCCESS,
            State::Warning => Examined::Doubtful.into(),
            State::Wrong => Examined::Wrong.into(),
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
            Err(e) => checks.push(Check::wrong("nats", format!("{e:#}"), "start NATS, or say where it is")),
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

/// Whether lead-state answers, and goes on.
async fn recovery(client: &async_nats::Client) -> Check {
    let what = "log, ledger and events";
    match admin::call::<_, RecoveryStatus>(client, RECOVERY_GET, &GetRecovery {}).await {
        Ok(RecoveryStatus { halted: None, .. }) => Check::ok(what, "fit together"),
        Ok(RecoveryStatus { halted: Some(halted), .. }) => Check::wrong(
            what,
            format!("halted: {}: {}", halted.reason, halted.text),
            format!("leadctl recover {}", halted.remedy),
        ),
        Err(e) => Check::wrong(what, format!("{e:#}"), "start lead-state; its log says what it waits for"),
    }
}

/// Judges a clock by what it said between two of our own times. `grain` is how coarse it tells the time, in seconds.
fn skew(whose: &str, asked: Timestamp, said: Timestamp, answered: Timestamp, grain: f64) -> Check {
    let what = format!("clock of {whose}");
    let seconds = |at: Timestamp| at.millis() as f64 / 1000.0;
    // It said so some time in between.
    let (early, late) = (seconds(said) - seconds(answered), seconds(said) + grain - seconds(asked));
    let least = if early > 0.0 { early } else { (-late).max(0.0) };
    let found = format!(
        "differs by {} s from this machine's",
        if least < 1.0 { "less than 1".into() } else { format!("{least:.0}") }
    );
    let mend = "have both machines synchronise their clocks (NTP)";
    if least > SKEW_HARMFUL {
        Check::wrong(what, found, mend)
    } else if least > SKEW_NOTED {
        Check::warning(what, found, mend)
    } else {
        Check::ok(what, found)
    }
}

/// A lag, judged.
fn lag(what: &str, messages: u64, oldest: Option<Duration>, mend: &str) -> Check {
    /// Longer than a restart takes.
    const LONG: Duration = Duration::from_secs(60);
    let found = match (messages, oldest) {
        (0, _) => "nothing waits".to_owned(),
        (_, None) => format!("{messages} wait"),
        (_, Some(since)) => format!("{messages} wait, the oldest for {} s", since.as_secs()),
    };
    match oldest {
        Some(since) if messages > 0 && since > LONG => Check::wrong(what, found, mend),
        _ => Check::ok(what, found),
    }
}

fn show(report: &Report) {
    let mark = |state| match state {
        State::Ok => "ok",
        State::Unknown => "?",
        State::Warning => "look",
        State::Wrong => "WRONG",
    };
    let rows: Vec<_> = report
        .checks
        .iter()
        .map(|check| [mark(check.state).to_owned(), check.what.clone(), check.found.clone()])
        .collect();
    output::say(output::table(None, &rows));
    let mut mended = report.checks.iter().filter(|check| check.state > State::Ok).peekable();
    if mended.peek().is_some() {
        output::say("");
    }
    for check in mended {
        if let Some(mend) = &check.mend {
            output::say(format_args!("{}: {}\n  {mend}", check.what, check.found));
        }
    }
    output::say(match report.state {
        State::Ok | State::Unknown => "\nHEALTHY",
        State::Warning => "\nHEALTHY, but look at the above",
        State::Wrong => "\nNOT HEALTHY",
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_wrong_only_by_what_the_way_there_and_back_cannot_explain() {
        let at = Timestamp::from_millis;
        let state = |asked, said, answered, grain| skew("x", at(asked), at(said), at(answered), grain).state;
        assert_eq!(state(0, 50, 100, 0.0), State::Ok);
        assert_eq!(state(0, 0, 60_000, 0.0), State::Ok, "a slow way says nothing");
        assert_eq!(state(0, 5_000, 100, 0.0), State::Warning);
        assert_eq!(state(100_000, 60_000, 100_100, 0.0), State::Wrong);
        assert_eq!(state(2_900, 0, 3_000, 1.0), State::Ok, "it tells whole seconds");
        assert_eq!(state(100_000, 95_000, 100_100, 1.0), State::Warning);
    }

    #[test]
    fn only_what_waits_for_long_is_wrong() {
        let state = |messages, seconds: Option<u64>| lag("x", messages, seconds.map(Duration::from_secs), "m").state;
        assert_eq!(state(0, None), State::Ok);
        assert_eq!(state(1000, Some(3)), State::Ok);
        assert_eq!(state(1, Some(61)), State::Wrong);
    }
}

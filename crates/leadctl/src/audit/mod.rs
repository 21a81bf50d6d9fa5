//! `leadctl audit`: checks that every update is accounted for, from the log to the last delivery.
//!
//! The audit reads Postgres and NATS directly. Since both change meanwhile, the order prevents false alarms: first the
//! ack floor of webhook-notifier; then a snapshot of both schemas, whose deliveries are therefore no older than the
//! acks; then the streams, which contain everything that the snapshot can refer to. Later messages count as pending.

mod counts;
mod invariants;
mod messages;
mod partitions;
pub(crate) mod report;
mod scope;
mod snapshot;
mod streams;

use std::process::ExitCode;

use anyhow::Context;
use async_nats::Client;
use clap::Args;
use contract::{ObjectId, Timestamp, audit::AuditRecord, streams::LEAD_EVENTS};
use service_kit::{
    audits::record_audit,
    clock,
    config::NatsConfig,
    nats,
    postgres::{Session, until_lost},
};

use self::{
    counts::COUNTS,
    invariants::INVARIANTS,
    report::{CheckedInvariant, Report},
    scope::Scope,
    snapshot::Snapshot,
};
use crate::{
    arguments::parse_time,
    clients::{admin, postgres},
    output::{self, progress::Progress},
};

/// Violations shown per invariant, without --json.
const MAX_SHOWN: i64 = 10;

/// Check that every update is accounted for: accepted = succeeded + failed + pending; per callback, announced =
/// delivered + exhausted + pending + parked; the ledger in the order of the log. Reads Postgres and NATS directly,
/// changes nothing but the record of its verdict, which `leadctl doctor` and the console show, and can run at any time.
/// Exits with 0 if all invariants hold, 1 if one is violated, 2 if the audit could not run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  leadctl audit\n  leadctl audit --since 1h --project 6b0426971c73026dafa27e40\n  \
                        leadctl audit --from 2026-01-12T00:00:00Z --to 2026-01-13T00:00:00Z --json")]
pub(crate) struct Audit {
    /// Only updates logged within this time, e.g. 1h.
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["from", "to"])]
    since: Option<humantime::Duration>,
    /// Only updates logged at or after this time, e.g. 2026-01-12T04:55:59Z.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    from: Option<Timestamp>,
    /// Only updates logged before this time.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    to: Option<Timestamp>,
    /// Only this project.
    #[arg(long)]
    project: Option<ObjectId>,
    #[command(flatten)]
    nats: NatsConfig,
    /// Postgres, as postgres://user:password@host:port/database. The user must be able to read both schemas and to
    /// create temporary tables.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Print JSON, with all violations.
    #[arg(long)]
    json: bool,
}

impl Audit {
    /// Runs the audit. If it cannot run, prints the reason and returns 2.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let began_at = clock::now();
        let scope = Scope {
            from: self.from.or(self.since.map(|since| began_at.minus(since.into()))),
            to: self.to,
            project_id: self.project,
        };
        match self.audit(scope).await {
            Ok((client, report)) => {
                output::show(self.json, &report, Report::show)?;
                record(&client, &report.record(scope, began_at, clock::now())).await;
                Ok(if report.clean { ExitCode::SUCCESS } else { ExitCode::from(1) })
            }
            // No verdict is recorded: the previous one stays, with its time.
            Err(e) => {
                output::note(format_args!("the audit could not run: {e:#}"));
                Ok(ExitCode::from(2))
            }
        }
    }

    async fn audit(&self, scope: Scope) -> anyhow::Result<(Client, Report)> {
        let client = admin::connect(&self.nats).await?;
        let pool = postgres::pool(&self.database_url)?;
        let session = postgres::connect(&pool).await?;
        let report = tokio::select! {
            report = self.compare(&client, session, scope) => report?,
            lost = until_lost(&pool) => return Err(lost).context("Postgres was lost during the audit"),
        };
        Ok((client, report))
    }

    async fn compare(&self, client: &Client, session: Session, scope: Scope) -> anyhow::Result<Report> {
        let js = nats::jetstream(client);
        let mut progress = Progress::start();

        let events = streams::open(&js, LEAD_EVENTS).await?;
        let acked = streams::acked(&events).await?;
        let mut snapshot = Snapshot::take(session, scope).await?;
        let bounds = streams::read(&js, events, acked, &mut snapshot, scope, &mut progress).await?;
        progress.step("reading the ledger and the deliveries");
        snapshot.prepare(bounds).await?;

        let limit = (!self.json).then_some(MAX_SHOWN);
        let mut invariants = Vec::new();
        for invariant in INVARIANTS.into_iter().chain(COUNTS) {
            progress.step(invariant.statement);
            let (count, violations) = snapshot.violations(invariant, limit).await?;
            let (name, statement) = (invariant.name, invariant.statement);
            invariants.push(CheckedInvariant { invariant: name, statement, count, violations });
        }
        let unaccounted = invariants.iter().find(|checked| checked.invariant == "unaccounted");
        let unaccounted = unaccounted.map_or(0, |checked| checked.count);
        let report = Report {
            clean: invariants.iter().all(|checked| checked.count == 0),
            checkpoint: snapshot.checkpoint.clone(),
            updates: snapshot.count_updates(unaccounted).await?,
            callbacks: snapshot.count_deliveries().await?,
            parked: snapshot.count_parked().await?,
            invariants,
            unchecked: snapshot.unchecked().await?,
        };
        Ok(report)
    }
}

/// Records a verdict. A failure to record it hides nothing, because the verdict is printed and decides the exit code.
async fn record(client: &Client, verdict: &AuditRecord) {
    match record_audit(&nats::jetstream(client), verdict).await {
        Ok(true) => {}
        Ok(false) => output::note(
            "this verdict was not recorded: the last audit of a range found violations outside this one. Run the audit without a \
             range, or for theirs; `leadctl doctor` shows them",
        ),
        Err(e) => output::note(format_args!(
            "this verdict could not be recorded, so `leadctl doctor` and the console show an older one: {e:#}"
        )),
    }
}

//! `leadctl audit`: 1 to 8: whether the account of every update adds up.
//!
//! It reads Postgres and NATS itself, and asks no service. What moves meanwhile must give no false alarm, so the order
//! is: what the webhook-notifier acked; then a snapshot of both schemas, so that deliveries are no older than the acks;
//! then the streams, which hold all that the snapshot can know of. What came after the snapshot is pending.

mod store;
mod streams;

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use async_nats::jetstream::{self, stream::Stream};
use clap::Args;
use contract::{
    ObjectId, Timestamp,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, NOTIFIER_CONSUMER},
    subject,
};
use serde::Serialize;
use service_kit::{clock, config::NatsConfig, nats};
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

use self::store::{Checkpoint, LAWS, Offender, Scope, Seen, Snapshot, Told, Undecided, Updates};
use crate::{
    admin, output,
    progress::Progress,
    reading::{CHUNK, Reading},
};

/// How long to wait for Postgres.
const CONNECT: Duration = Duration::from_secs(10);
/// How many offenders of a law are named, unless all are asked for.
const NAMED: i64 = 10;

/// Check that the account of every update adds up: accepted = succeeded + failed + pending; per callback, announced =
/// delivered + exhausted + pending; the ledger in the order of the log. Reads Postgres and NATS directly, changes nothing,
/// and may run at any time. Ends with 0 when all is well, 1 when something is not, 2 when it could not look.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  leadctl audit\n  leadctl audit --since 1h --project 6b0426971c73026dafa27e40\n  \
                        leadctl audit --from 2026-01-12T00:00:00Z --to 2026-01-13T00:00:00Z --json")]
pub(crate) struct Audit {
    /// Only updates that were logged within this time, e.g. 1h.
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["from", "to"])]
    since: Option<humantime::Duration>,
    /// Only updates that were logged at or after this time, e.g. 2026-01-12T04:55:59Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    from: Option<Timestamp>,
    /// Only updates that were logged before this time.
    #[arg(long, value_name = "TIME", value_parser = time)]
    to: Option<Timestamp>,
    /// Only this project.
    #[arg(long)]
    project: Option<ObjectId>,
    #[command(flatten)]
    nats: NatsConfig,
    /// Where Postgres listens: postgres://user:password@host:port/database. The user must be able to read both schemas and
    /// to make temporary tables.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Print JSON, for programs: every offender by name.
    #[arg(long)]
    json: bool,
}

/// A time as people and programs write it.
pub(crate) fn time(text: &str) -> Result<Timestamp, String> {
    humantime::parse_rfc3339_weak(text).map(Timestamp::from).map_err(|e| e.to_string())
}

/// What the audit found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    clean: bool,
    checkpoint: Option<Checkpoint>,
    updates: Updates,
    callbacks: Vec<Told>,
    laws: Vec<Finding>,
    undecided: Vec<Undecided>,
}

/// How a law fared.
#[derive(Debug, Serialize)]
struct Finding {
    law: &'static str,
    says: &'static str,
    count: i64,
    offenders: Vec<Offender>,
}

impl Audit {
    /// Audits; what kept it from looking is told, and is no error of the program.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.audit().await {
            Ok(report) => {
                let code = if report.clean { ExitCode::SUCCESS } else { ExitCode::from(1) };
                if self.json {
                    output::json(&report)?;
                } else {
                    show(&report);
                }
                Ok(code)
            }
            Err(e) => {
                eprintln!("leadctl: could not audit: {e:#}");
                Ok(ExitCode::from(2))
            }
        }
    }

    async fn audit(&self) -> anyhow::Result<Report> {
        let scope = Scope {
            from: self.from.or(self.since.map(|since| clock::now().minus(since.into()))),
            to: self.to,
            project_id: self.project,
        };
        let client = admin::connect(&self.nats).await?;
        let js = nats::jetstream(&client);
        let connection = connect(&self.database_url).await?;
        let mut progress = Progress::start();

        let events = stream(&js, LEAD_EVENTS).await?;
        let acked = acked(&events).await?;
        let mut snapshot = Snapshot::take(connection, scope).await?;
        let seen = read(&js, events, acked, &mut snapshot, scope, &mut progress).await?;
        progress.step("reading the ledger and the deliveries");
        snapshot.prepare(seen).await?;

        let limit = (!self.json).then_some(NAMED);
        let mut laws = Vec::new();
        for law in &LAWS {
            progress.step(law.says);
            let (count, offenders) = snapshot.offenders(law, limit).await?;
            laws.push(Finding { law: law.name, says: law.says, count, offenders });
        }
        let unaccounted = laws.iter().find(|finding| finding.law == "unaccounted").map_or(0, |finding| finding.count);
        let report = Report {
            clean: laws.iter().all(|finding| finding.count == 0),
            checkpoint: snapshot.checkpoint.clone(),
            updates: snapshot.updates(unaccounted).await?,
            callbacks: snapshot.told().await?,
            laws,
            undecided: snapshot.undecided().await?,
        };
        snapshot.close().await?;
        Ok(report)
    }
}

async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    let connecting = timeout(CONNECT, PgConnection::connect(url)).await;
    connecting
        .with_context(|| format!("Postgres does not answer within {CONNECT:?}"))?
        .context("cannot connect to Postgres; --database-url or DATABASE_URL says where it is")
}

async fn stream(js: &jetstream::Context, name: &'static str) -> anyhow::Result<Stream> {
    js.get_stream(name).await.with_context(|| format!("cannot find the stream {name}; lead-state makes it"))
}

/// The last event that the webhook-notifier acked, like all before it.
async fn acked(events: &Stream) -> anyhow::Result<u64> {
    use async_nats::jetstream::{ErrorCode, context::ConsumerInfoErrorKind};
    match events.consumer_info(NOTIFIER_CONSUMER).await {
        Ok(consumer) => Ok(consumer.ack_floor.stream_sequence),
        // No webhook-notifier was ever here.
        Err(e) if e.kind() == ConsumerInfoErrorKind::NotFound => Ok(0),
        Err(e) => match e.kind() {
            ConsumerInfoErrorKind::JetStream(e) if e.error_code() == ErrorCode::CONSUMER_NOT_FOUND => Ok(0),
            _ => Err(e).context("cannot read how far the webhook-notifier is"),
        },
    }
}

/// Reads the streams into the snapshot.
async fn read(
    js: &jetstream::Context,
    events: Stream,
    acked: u64,
    snapshot: &mut Snapshot,
    scope: Scope,
    progress: &mut Progress,
) -> anyhow::Result<Seen> {
    let log = stream(js, LEAD_COMMANDS).await?;
    let state = &log.cached_info().state;
    let log_last = state.last_sequence;
    let log_whole = state.messages == 0 || state.messages == log_last + 1 - state.first_sequence;
    let identity = contract::streams::identity(log.cached_info());
    let log_is_ours = snapshot.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.stream_created_at == identity);
    let subjects = |all: &str, prefix: &str| scope.project_id.map_or(all.to_owned(), |id| format!("{prefix}.{id}.>"));

    let mut chunk = Vec::with_capacity(CHUNK);
    let reading = Reading {
        stream: &log,
        last: log_last,
        from: scope.from,
        subjects: subjects(subject::ALL_COMMANDS, "leads.cmd"),
        headers_only: false,
    };
    reading
        .run(progress, async |message| {
            if scope.holds(message.logged_at) {
                chunk.push(streams::entry(&message));
            }
            if chunk.len() == CHUNK {
                snapshot.put_entries(&chunk).await?;
                chunk.clear();
            }
            Ok(())
        })
        .await?;
    snapshot.put_entries(&chunk).await?;
    let log_first = log.get_info().await.context("cannot read the state of the log")?.state.first_sequence;

    let mut events = events;
    let last = events.info().await.context("cannot read the state of the events")?.state.last_sequence;
    let mut chunk = Vec::with_capacity(CHUNK);
    // From an update's logging on, its event may come at any time.
    let reading = Reading {
        stream: &events,
        last,
        from: scope.from,
        subjects: subjects(subject::ALL_EVENTS, "leads.evt"),
        headers_only: true,
    };
    reading
        .run(progress, async |message| {
            chunk.extend(streams::event(&message));
            if chunk.len() == CHUNK {
                snapshot.put_events(&chunk).await?;
                chunk.clear();
            }
            Ok(())
        })
        .await?;
    snapshot.put_events(&chunk).await?;
    let events_first = events.get_info().await.context("cannot read the state of the events")?.state.first_sequence;

    let letters = stream(js, LEAD_DEAD_LETTERS).await?;
    let state = &letters.cached_info().state;
    let letters_whole = state.messages == state.last_sequence;
    let mut chunk = Vec::with_capacity(CHUNK);
    let reading = Reading {
        stream: &letters,
        last: state.last_sequence,
        from: scope.from,
        subjects: subject::ALL_DEAD_LETTERS.into(),
        headers_only: true,
    };
    reading
        .run(progress, async |message| {
            chunk.extend(streams::letter(&message, &scope));
            if chunk.len() == CHUNK {
                snapshot.put_letters(&chunk).await?;
                chunk.clear();
            }
            Ok(())
        })
        .await?;
    snapshot.put_letters(&chunk).await?;
    // Purged is what was acked: but perhaps only after the snapshot was taken.
    let events_overtaken = events_first > acked + 1;
    Ok(Seen { log_is_ours, log_first, log_last, log_whole, letters_whole, acked, events_first, events_overtaken })
}

fn show(report: &Report) {
    let Updates { accepted, succeeded, failed, pending, held, duplicates, dead_letters } = report.updates;
    output::say(format_args!("{:>10} accepted", accepted));
    for (count, what) in [(succeeded, "succeeded"), (failed, "failed"), (pending, "pending")] {
        output::say(format_args!("{count:>10}   {what}"));
    }
    if held > 0 {
        output::say(format_args!("{held:>10}     of these held during calls"));
    }
    output::say(format_args!("{duplicates:>10} duplicates, applied once"));
    output::say(format_args!("{dead_letters:>10} dead letters"));
    if !report.callbacks.is_empty() {
        output::say("");
        output::say(format_args!(
            "{:<24}  {:>10} {:>10} {:>10} {:>10}  name",
            "callback", "announced", "delivered", "exhausted", "pending"
        ));
    }
    for Told { callback_id, name, announced, delivered, exhausted, pending } in &report.callbacks {
        let name = name.as_deref().unwrap_or("(removed)");
        output::say(format_args!(
            "{callback_id}  {announced:>10} {delivered:>10} {exhausted:>10} {pending:>10}  {name}"
        ));
    }
    output::say("");
    for Undecided { law, count, why } in &report.undecided {
        output::say(format_args!("undecided  {law}: {count}: {why}"));
    }
    for Finding { law, says, count, offenders } in report.laws.iter().filter(|finding| finding.count > 0) {
        output::say(format_args!("OFFENDED  {law}: {count} against: {says}"));
        for Offender { id, fault } in offenders {
            output::say(format_args!("  {id}  {fault}"));
        }
        if *count > offenders.len() as i64 {
            output::say(format_args!("  and {} more; --json names all", *count - offenders.len() as i64));
        }
    }
    let broken = report.laws.iter().filter(|finding| finding.count > 0).count();
    match broken {
        0 => output::say(format_args!("CLEAN: {} laws hold", report.laws.len())),
        _ => output::say(format_args!("NOT CLEAN: {broken} of {} laws are broken", report.laws.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(time("2026-01-12T04:55:59Z"), Ok(Timestamp::from_millis(1_768_193_759_000)));
        assert_eq!(time("2026-01-12 04:55:59"), Ok(Timestamp::from_millis(1_768_193_759_000)));
        assert!(time("yesterday").is_err());
    }
}

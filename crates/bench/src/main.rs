//! How fast Leadrelay is, as ratios to floors that are taken in the same run.
//!
//! [`stack`] starts a real NATS, a real Postgres and the release services; [`driver`] plays clients and endpoints from a
//! process of its own ([`load`], [`receiver`]); [`floors`] are the least code that does a part's job; [`meter`] counts
//! processor time and memory; [`scenarios`] put them together, and [`report`] tells.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use tokio::runtime::{self, Runtime};

mod driver;
mod environment;
mod floors;
mod latency;
mod load;
mod meter;
mod plot;
mod receiver;
mod report;
mod scenarios;
mod stack;

use crate::{floors::Floor, report::Report, scenarios::Plan};

/// The floors run in this process, so they need the allocator of the services that are compared with them.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures how fast Leadrelay is on this machine, against floors that are taken in the same run.
///
/// A run takes everything that the machine has, for minutes; nothing else should run beside it.
#[derive(Debug, Parser)]
#[command(
    after_help = "Examples:\n  cargo run --release -p bench -- all\n  cargo run --release -p bench -- gateway --seconds 5 --runs 1\n  cargo run --release -p bench -- e2e --json e2e.json"
)]
struct Cli {
    /// What to measure.
    #[arg(value_enum, default_value_t = Scenario::All)]
    scenario: Scenario,
    /// How long a run of a scenario measures; of e2e, fifteen times as long.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Commands or retries that wait in backlog, and leads in scale, whose ledger has five times as many.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Runs of each scenario; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    runs: u32,
    /// Write everything that was measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    part: Option<Part>,
}

/// A part of the bench that it starts as a process of its own.
#[derive(Debug, Clone, clap::Subcommand)]
enum Part {
    /// Plays clients and endpoints.
    #[command(hide = true)]
    Driver,
    /// Runs a floor.
    #[command(hide = true, subcommand)]
    Floor(Floor),
    /// Draw what `--json` wrote: rates.svg and latency.svg.
    Plot {
        /// What `--json` wrote.
        file: PathBuf,
        /// Where the drawings go.
        dir: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Updates accepted by the gateway, with the lead-state service stopped.
    Gateway,
    /// Updates applied from a full log.
    Apply,
    /// Webhooks delivered from a full stream of events.
    Deliver,
    /// HTTP in, webhook out, everything recorded.
    E2e,
    /// From POST to webhook at a low and at a moderate rate.
    Latency,
    /// A million commands in the log; a million retries in Postgres.
    Backlog,
    /// Few leads and an empty ledger, many leads and a large one.
    Scale,
    /// Five hundred callbacks on hosts of their own, a tenth of them hanging.
    Hosts,
    /// All of these.
    All,
    /// Two minutes of what has a floor; fails where a ratio is lower than noise explains.
    Smoke,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.part.clone() {
        // One thread: it takes least of what is to be measured.
        Some(Part::Driver) => runtime::Builder::new_current_thread().enable_all().build()?.block_on(driver::run()),
        Some(Part::Floor(floor)) => Runtime::new()?.block_on(floor.run()),
        Some(Part::Plot { file, dir }) => plot::draw(&Report::read(&file)?, &dir),
        None => Runtime::new()?.block_on(measure(&cli)),
    }
}

async fn measure(cli: &Cli) -> anyhow::Result<()> {
    scenarios::progress("the services are built, which takes minutes the first time");
    // With the bench itself, as its dependencies say.
    test_support::build(&["bench", "gateway", "lead-state", "webhook-notifier"]);
    let mut report = Report::default();
    {
        let (nats, postgres) = tokio::try_join!(stack::nats(false), stack::postgres())?;
        report.environment = environment::environment(&nats, &postgres).await?;
    }
    let measured = run(cli, &mut report).await;
    // What was measured is told even where the rest failed.
    println!("{}", report.table());
    if let Some(path) = &cli.json {
        report.write(path)?;
    }
    measured
}

async fn run(cli: &Cli, report: &mut Report) -> anyhow::Result<()> {
    let plan = Plan { lasting: Duration::from_secs(cli.seconds), runs: cli.runs, size: cli.size };
    if cli.scenario == Scenario::Smoke {
        return scenarios::smoke::run(report).await;
    }
    let wanted = |scenario| cli.scenario == scenario || cli.scenario == Scenario::All;
    if wanted(Scenario::Gateway) {
        scenarios::gateway::run(&plan, report).await.context("gateway")?;
    }
    if wanted(Scenario::Apply) {
        scenarios::apply::run(&plan, report).await.context("apply")?;
    }
    if wanted(Scenario::Deliver) {
        scenarios::deliver::run(&plan, report).await.context("deliver")?;
    }
    if wanted(Scenario::E2e) {
        scenarios::e2e::run(&plan, report).await.context("e2e")?;
    }
    if wanted(Scenario::Latency) {
        scenarios::latency::run(&plan, report).await.context("latency")?;
    }
    if wanted(Scenario::Backlog) {
        scenarios::backlog::run(&plan, report).await.context("backlog")?;
    }
    if wanted(Scenario::Scale) {
        scenarios::scale::run(&plan, report).await.context("scale")?;
    }
    if wanted(Scenario::Hosts) {
        scenarios::hosts::run(&plan, report).await.context("hosts")?;
    }
    Ok(())
}

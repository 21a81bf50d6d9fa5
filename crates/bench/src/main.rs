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
mod floors;
mod latency;
mod load;
mod meter;
mod receiver;
mod report;
mod scenarios;
mod stack;

use crate::{floors::Floor, report::Report, scenarios::Plan};

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
    /// How long a run of a scenario measures.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
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
    /// All of these.
    All,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.part.clone() {
        // One thread: it takes least of what is to be measured.
        Some(Part::Driver) => runtime::Builder::new_current_thread().enable_all().build()?.block_on(driver::run()),
        Some(Part::Floor(floor)) => Runtime::new()?.block_on(floor.run()),
        None => Runtime::new()?.block_on(measure(&cli)),
    }
}

async fn measure(cli: &Cli) -> anyhow::Result<()> {
    let plan = Plan { lasting: Duration::from_secs(cli.seconds), runs: cli.runs };
    let mut report = Report::default();
    let wanted = |scenario| cli.scenario == scenario || cli.scenario == Scenario::All;
    if wanted(Scenario::Gateway) {
        scenarios::gateway::run(&plan, &mut report).await.context("gateway")?;
    }
    if wanted(Scenario::Apply) {
        scenarios::apply::run(&plan, &mut report).await.context("apply")?;
    }
    if wanted(Scenario::Deliver) {
        scenarios::deliver::run(&plan, &mut report).await.context("deliver")?;
    }
    if wanted(Scenario::E2e) {
        scenarios::e2e::run(&plan, &mut report).await.context("e2e")?;
    }
    if wanted(Scenario::Latency) {
        scenarios::latency::run(&plan, &mut report).await.context("latency")?;
    }
    println!("{}", report.table());
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

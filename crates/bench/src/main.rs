//! Measures how fast Leadrelay is, as ratios to floors measured in the same run.
//!
//! [`stack`] starts a real NATS, a real Postgres and the release services; [`driver`] is a separate process that plays
//! clients ([`load`]) and endpoints ([`receiver`]); [`floors`] contains the least code that does the same job as a
//! service; [`meter`] measures CPU time and memory; [`scenarios`] combines them, and [`report`] prints the results.

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
mod protocol;
mod receiver;
mod report;
mod scenarios;
mod stack;

use crate::{floors::Floor, report::Report, scenarios::Plan};

/// The floors run in this program, so they need the allocator of the services that are compared with them.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measure how fast Leadrelay is on this machine, compared with floors measured in the same run.
///
/// A run uses all cores for minutes; stop other work first.
#[derive(Debug, Parser)]
#[command(
    after_help = "Examples:\n  cargo run --profile dist -p bench -- all\n  cargo run --profile dist -p bench -- gateway --seconds 5 --runs 1\n  cargo run --profile dist -p bench -- e2e --json e2e.json"
)]
struct Cli {
    /// What to measure.
    #[arg(value_enum, default_value_t = Scenario::All)]
    scenario: Scenario,
    /// Seconds that a run of a scenario measures; e2e runs 12 times as long.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Retries in the backlog scenario, which has half as many commands; leads in the scenarios scale and console, with
    /// five times as many updates.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Runs of each scenario; the table shows the median.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    runs: u32,
    /// Write all figures, the environment and the raw results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Play clients and endpoints; the bench starts this itself.
    #[command(hide = true)]
    Driver,
    /// Run a floor; the bench starts this itself.
    #[command(hide = true, subcommand)]
    Floor(Floor),
    /// Draw rates.svg and latency.svg from the file that `--json` wrote.
    Plot {
        /// The file that `--json` wrote.
        file: PathBuf,
        /// The directory for the drawings.
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
    /// HTTP in, webhook received, everything recorded.
    E2e,
    /// Rate, CPU and latency with 8, 32, 64 and 256 clients.
    Connections,
    /// Latency from POST to webhook at 100 and at 1000 updates per second.
    Latency,
    /// Half a million commands in the log; a million retries in Postgres.
    Backlog,
    /// Updates applied with few leads and an empty ledger, and with many leads and a large ledger.
    Scale,
    /// 500 callbacks on their own hosts, a tenth of which never answer.
    Hosts,
    /// All of the above.
    All,
    /// Ways to publish to JetStream, on one server and on three replicas; no service takes part.
    Publish,
    /// Two installations with half of the load each, against one with all of it.
    Cells,
    /// Results of calls of 2 KiB, against updates of the same length.
    Activities,
    /// Every page of the console and every list of the HTTP API, with a million leads, five million updates and five
    /// million deliveries.
    Console,
    /// The scenarios with floors for two minutes; fails if a ratio is lower than noise explains.
    Smoke,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command.clone() {
        // One thread, so that the driver uses as little as possible of the CPU that is measured.
        Some(Command::Driver) => runtime::Builder::new_current_thread().enable_all().build()?.block_on(driver::run()),
        Some(Command::Floor(floor)) => Runtime::new()?.block_on(floor.run()),
        Some(Command::Plot { file, dir }) => plot::draw(&Report::read(&file)?, &dir),
        None => Runtime::new()?.block_on(measure(&cli)),
    }
}

async fn measure(cli: &Cli) -> anyhow::Result<()> {
    scenarios::progress("building the services, which takes minutes the first time");
    // Together with the bench, so that shared dependencies have the same features and are built once.
    let mut packages = vec!["bench", "gateway", "lead-state", "webhook-notifier"];
    if cli.scenario == Scenario::Console {
        packages.push("console");
    }
    test_support::build(&packages);
    let mut report = Report::default();
    {
        let (nats, postgres) = tokio::try_join!(stack::nats(false), stack::postgres())?;
        report.environment = environment::environment(&nats, &postgres).await?;
    }
    let measured = run(cli, &mut report).await;
    // If a scenario failed, the figures of the others are still printed.
    println!("{}", report.table());
    if let Some(path) = &cli.json {
        report.write(path)?;
    }
    measured
}

async fn run(cli: &Cli, report: &mut Report) -> anyhow::Result<()> {
    let plan = Plan { duration: Duration::from_secs(cli.seconds), runs: cli.runs, size: cli.size };
    let apart =
        [Scenario::All, Scenario::Publish, Scenario::Cells, Scenario::Activities, Scenario::Console, Scenario::Smoke];
    let all = Scenario::value_variants().iter().filter(|scenario| !apart.contains(scenario));
    let selected = if cli.scenario == Scenario::All { all.copied().collect() } else { vec![cli.scenario] };
    for scenario in selected {
        let result = match scenario {
            Scenario::Gateway => scenarios::gateway::run(&plan, report).await,
            Scenario::Apply => scenarios::apply::run(&plan, report).await,
            Scenario::Deliver => scenarios::deliver::run(&plan, report).await,
            Scenario::E2e => scenarios::e2e::run(&plan, report).await,
            Scenario::Latency => scenarios::latency::run(&plan, report).await,
            Scenario::Backlog => scenarios::backlog::run(&plan, report).await,
            Scenario::Scale => scenarios::scale::run(&plan, report).await,
            Scenario::Hosts => scenarios::hosts::run(&plan, report).await,
            Scenario::Publish => scenarios::publish::run(&plan, report).await,
            Scenario::Connections => scenarios::connections::run(&plan, report).await,
            Scenario::Cells => scenarios::cells::run(&plan, report).await,
            Scenario::Activities => scenarios::activities::run(&plan, report).await,
            Scenario::Console => scenarios::console::run(&plan, report).await,
            Scenario::Smoke => scenarios::smoke::run(report).await,
            Scenario::All => Ok(()),
        };
        result.with_context(|| format!("the scenario {scenario:?} failed"))?;
    }
    Ok(())
}

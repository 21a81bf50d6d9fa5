//! The scenarios: each starts a stack, measures Leadrelay and the floor alternately, and adds the figures to the
//! report.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    process::Stdio,
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tokio::process::{Child, Command};

use crate::{
    meter::Usages,
    report::{Report, Target},
    stack::nats_can_sync,
};

pub(crate) mod activities;
pub(crate) mod apply;
pub(crate) mod backlog;
pub(crate) mod cells;
pub(crate) mod connections;
pub(crate) mod console;
pub(crate) mod deliver;
pub(crate) mod e2e;
pub(crate) mod gateway;
pub(crate) mod hosts;
pub(crate) mod latency;
pub(crate) mod publish;
pub(crate) mod scale;
pub(crate) mod smoke;

/// The options of all scenarios.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) duration: Duration,
    pub(crate) runs: u32,
    /// The number of waiting commands or retries, or of leads.
    pub(crate) size: u64,
}

impl Plan {
    /// The runs of a scenario; prints each to standard error when it starts.
    pub(crate) fn runs(&self, what: &str) -> impl Iterator<Item = u32> {
        (1..=self.runs).inspect(move |run| progress(&format!("{what}, run {run} of {}", self.runs)))
    }
}

/// Prints the current step to standard error, with the time since the start of the bench.
pub(crate) fn progress(what: &str) {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let seconds = START.elapsed().as_secs();
    eprintln!("[{:>2}:{:02}] {what}", seconds / 60, seconds % 60);
}

/// Maximum memory of a service, in MiB.
const MAX_MEMORY: f64 = 64.0;
/// Memory that grows less counts as constant, in MiB.
const MAX_GROWTH: f64 = MAX_MEMORY / 10.0;
const SERVICES: [&str; 3] = ["gateway", "lead-state", "webhook-notifier"];

/// The peak and the growth of each service's memory in each run of a scenario.
#[derive(Debug, Default)]
pub(crate) struct MemoryUsage(BTreeMap<&'static str, [Vec<f64>; 2]>);

impl MemoryUsage {
    /// Adds a run; ignores services that were stopped.
    pub(crate) fn add(&mut self, usages: &Usages) {
        for (name, usage) in usages.iter().filter(|(name, usage)| SERVICES.contains(name) && usage.memory > 0.0) {
            let [peaks, growths] = self.0.entry(*name).or_default();
            peaks.push(usage.memory);
            growths.push(usage.growth);
        }
    }

    pub(crate) fn report(self, scenario: &str, report: &mut Report) {
        for (name, [peaks, growths]) in self.0 {
            report.figure(scenario, format!("memory of {name}"), "MiB", peaks, Target::AtMost(MAX_MEMORY));
            let what = format!("memory of {name}, growth from the second quarter to the last");
            report.figure(scenario, what, "MiB", growths, Target::AtMost(MAX_GROWTH));
        }
    }
}

/// Updates per second where latencies are compared. On two busy cores any additional work would delay every update, so
/// this is low enough to leave them idle time.
const MODERATE_RATE: u32 = 500;
/// Such runs are this many times longer, so that one pause of the machine does not determine the p99.
const LATENCY_RUN_FACTOR: u32 = 2;

/// Whether nats-server can sync before it acks; otherwise the report names the scenario as not measured.
async fn sync_is_measurable(scenario: &str, report: &mut Report) -> anyhow::Result<bool> {
    let can_sync = nats_can_sync().await?;
    if !can_sync {
        report.unmeasured(format!("{scenario}, synced before every ack: needs nats-server 2.10 or later"));
    }
    Ok(can_sync)
}

fn floor_command(arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("floor").args(arguments).kill_on_drop(true);
    Ok(command)
}

/// Runs a floor that prints its rate.
async fn run_floor(arguments: &[&str]) -> anyhow::Result<f64> {
    let output = floor_command(arguments)?.stderr(Stdio::inherit()).output().await?;
    ensure!(output.status.success(), "the floor {} failed", arguments[0]);
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("the floor {} printed {text:?} instead of a rate", arguments[0]))
}

/// Starts a floor that is a server, and waits until it listens.
async fn start_floor(arguments: &[&str], address: SocketAddr) -> anyhow::Result<Child> {
    let child = floor_command(arguments)?.spawn()?;
    for _ in 0..500 {
        if tokio::net::TcpStream::connect(address).await.is_ok() {
            return Ok(child);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("the floor {} does not listen", arguments[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::ResourceUsage;

    #[test]
    fn memory_is_reported_of_running_services_only() {
        let usage = |memory, growth| ResourceUsage { cpu: 1.0, memory, growth };
        let mut memory = MemoryUsage::default();
        memory.add(&BTreeMap::from([
            ("gateway", usage(0.0, 0.0)),
            ("lead-state", usage(30.0, 7.0)),
            ("postgres", usage(300.0, 100.0)),
        ]));
        let mut report = Report::default();
        memory.report("apply", &mut report);
        let figures: Vec<_> = report.figures.iter().map(|figure| (figure.what.as_str(), figure.met)).collect();
        let growth = "memory of lead-state, growth from the second quarter to the last";
        assert_eq!(figures, [("memory of lead-state", Some(true)), (growth, Some(false))]);
    }
}

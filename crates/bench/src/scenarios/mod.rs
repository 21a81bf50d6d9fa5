//! The scenarios: each starts what it needs, measures ours and the floor in turns, and reports.

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
    meter::Taken,
    report::{Report, Target},
};

pub(crate) mod apply;
pub(crate) mod backlog;
pub(crate) mod deliver;
pub(crate) mod e2e;
pub(crate) mod gateway;
pub(crate) mod hosts;
pub(crate) mod latency;
pub(crate) mod scale;
pub(crate) mod smoke;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// How long a run measures.
    pub(crate) lasting: Duration,
    /// How many runs there are.
    pub(crate) runs: u32,
    /// How much waits, or is there already, where that is what matters.
    pub(crate) size: u64,
}

impl Plan {
    /// The runs of a scenario, each told on standard error when it begins.
    pub(crate) fn runs(&self, what: &str) -> impl Iterator<Item = u32> {
        (1..=self.runs).inspect(move |run| progress(&format!("{what}, run {run} of {}", self.runs)))
    }
}

/// Says on standard error what is done now, and how long the bench has run.
pub(crate) fn progress(what: &str) {
    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let seconds = BEGUN.elapsed().as_secs();
    eprintln!("[{:>2}:{:02}] {what}", seconds / 60, seconds % 60);
}

/// What our services may take, in MiB.
const MEMORY: f64 = 64.0;
/// By how much they may grow and count as flat, in MiB: a tenth of what they may take.
const GROWTH: f64 = MEMORY / 10.0;
const SERVICES: [&str; 3] = ["gateway", "lead-state", "webhook-notifier"];

/// The memory of our services over the runs of a scenario: the most that each took, and by how much it grew.
#[derive(Debug, Default)]
pub(crate) struct Memory(BTreeMap<&'static str, [Vec<f64>; 2]>);

impl Memory {
    /// Notes a run, of those services that were there.
    pub(crate) fn note(&mut self, taken: &BTreeMap<&'static str, Taken>) {
        for (name, taken) in taken.iter().filter(|(name, taken)| SERVICES.contains(name) && taken.memory > 0.0) {
            let [peaks, growths] = self.0.entry(*name).or_default();
            peaks.push(taken.memory);
            growths.push(taken.growth);
        }
    }

    pub(crate) fn tell(self, scenario: &str, report: &mut Report) {
        for (name, [peaks, growths]) in self.0 {
            report.figure(scenario, format!("memory of {name}"), "MiB", peaks, Target::AtMost(MEMORY));
            let what = format!("memory of {name}, growth from the second quarter to the last");
            report.figure(scenario, what, "MiB", growths, Target::AtMost(GROWTH));
        }
    }
}

/// Updates a second where the latencies of two states are compared: so few that two slow cores are not busy with them alone.
/// Where they are, whatever more there is to do makes all wait.
const CALM: u32 = 500;
/// How much longer such runs are than others, for a pause of the machine must not be a hundredth of them.
const LONGER: u32 = 2;

fn floor_command(arguments: &[String]) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("floor").args(arguments).kill_on_drop(true);
    Ok(command)
}

/// Runs a floor that prints its rate.
async fn floor(arguments: &[String]) -> anyhow::Result<f64> {
    let output = floor_command(arguments)?.stderr(Stdio::inherit()).output().await?;
    ensure!(output.status.success(), "the floor {} failed", arguments[0]);
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("the floor {} said {text:?}", arguments[0]))
}

/// Starts a floor that serves, and waits until it listens.
async fn serving_floor(arguments: &[String], address: SocketAddr) -> anyhow::Result<Child> {
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

    #[test]
    fn memory_is_of_our_services_that_were_there() {
        let taken = |memory, growth| Taken { cpu: 1.0, memory, growth };
        let mut memory = Memory::default();
        memory.note(&BTreeMap::from([
            ("gateway", taken(0.0, 0.0)),
            ("lead-state", taken(30.0, 7.0)),
            ("postgres", taken(300.0, 100.0)),
        ]));
        let mut report = Report::default();
        memory.tell("apply", &mut report);
        let told: Vec<_> = report.figures.iter().map(|figure| (figure.what.as_str(), figure.met)).collect();
        let growth = "memory of lead-state, growth from the second quarter to the last";
        assert_eq!(told, [("memory of lead-state", Some(true)), (growth, Some(false))]);
    }
}

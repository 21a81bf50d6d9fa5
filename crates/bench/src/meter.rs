//! CPU time and memory of processes, as the kernel counts them.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);
/// `getconf CLK_TCK`, 100 on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process to measure; with `tree`, together with its children.
#[derive(Debug, Clone)]
pub(crate) struct MeasuredProcess {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
    pub(crate) tree: bool,
}

/// What a process used while the meter ran.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ResourceUsage {
    /// Seconds of CPU time.
    pub(crate) cpu: f64,
    /// The peak of memory in MiB: resident, or for a tree the sum of the proportional shares at the end.
    pub(crate) memory: f64,
    /// The peak of the last quarter of the time minus the peak of the second quarter.
    pub(crate) growth: f64,
}

/// The usage of each process by its name.
pub(crate) type Usages = BTreeMap<&'static str, ResourceUsage>;

/// A running measurement.
#[derive(Debug)]
pub(crate) struct Meter {
    processes: Vec<MeasuredProcess>,
    cpu: Vec<f64>,
    start: Instant,
    samples: Arc<Mutex<Vec<Vec<f64>>>>,
    _sampling: AbortOnDropHandle<()>,
}

impl Meter {
    pub(crate) fn start(processes: Vec<MeasuredProcess>) -> Self {
        let cpu = processes.iter().map(cpu).collect();
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (sampled, output) = (processes.clone(), samples.clone());
        let sampling = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                // The shares of a tree are expensive to compute, so they are read only once, at the end.
                let memory = |process: &MeasuredProcess| if process.tree { 0.0 } else { resident(process.pid) };
                let sample = sampled.iter().map(memory).collect();
                output.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                tokio::time::sleep(SAMPLE_INTERVAL).await;
            }
        }));
        Self { processes, cpu, start: Instant::now(), samples, _sampling: sampling }
    }

    /// The usage of each process by name, and the seconds that the meter ran.
    pub(crate) fn stop(self) -> (Usages, f64) {
        let seconds = self.start.elapsed().as_secs_f64();
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let usages = self.processes.iter().zip(&self.cpu).enumerate().map(|(index, (process, cpu_before))| {
            let series: Vec<f64> = samples.iter().map(|sample| sample[index]).collect();
            let peak = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
            let quarter = series.len() / 4;
            let memory = if process.tree { proportional_share(process.pid) } else { peak(&series) };
            let growth = peak(&series[3 * quarter..]) - peak(&series[quarter..2 * quarter]);
            (process.name, ResourceUsage { cpu: cpu(process) - cpu_before, memory, growth })
        });
        (usages.collect(), seconds)
    }
}

/// Seconds of CPU time since the process was started; for a tree including exited children.
fn cpu(process: &MeasuredProcess) -> f64 {
    let seconds = |pid, with_exited_children: bool| -> f64 {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0.0 };
        // After the name in parentheses: utime, stime, cutime and cstime are fields 14 to 17.
        let Some((_, fields)) = stat.rsplit_once(") ") else { return 0.0 };
        let fields = fields.split(' ').skip(11).take(if with_exited_children { 4 } else { 2 });
        fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND
    };
    let children = if process.tree { children(process.pid) } else { vec![] };
    seconds(process.pid, process.tree) + children.into_iter().map(|pid| seconds(pid, true)).sum::<f64>()
}

fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// A value of `/proc/PID/FILE`, which is in KiB, in MiB.
fn read_mib(pid: u32, file: &str, name: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

fn resident(pid: u32) -> f64 {
    read_mib(pid, "status", "VmRSS:")
}

fn proportional_share(pid: u32) -> f64 {
    let pids = children(pid).into_iter().chain([pid]);
    pids.map(|pid| read_mib(pid, "smaps_rollup", "Pss:")).sum()
}

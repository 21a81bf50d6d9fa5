//! What processes take: processor time and memory, as the kernel counts them.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

/// How often memory is looked at.
const EVERY: Duration = Duration::from_millis(200);
/// The kernel's ticks in a second: `getconf CLK_TCK`, 100 on every Linux.
const TICKS: f64 = 100.0;

/// A process to look at; with `tree` also all its children.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
    pub(crate) tree: bool,
}

/// What a process took while a meter ran.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Taken {
    /// Seconds of processor time.
    pub(crate) cpu: f64,
    /// The most memory that it held at once, in MiB: resident, or with children the sum of their proportional shares.
    pub(crate) memory: f64,
    /// The same over the last quarter of the time less that over the second: growth.
    pub(crate) growth: f64,
}

/// A running measurement.
#[derive(Debug)]
pub(crate) struct Meter {
    subjects: Vec<Subject>,
    cpu: Vec<f64>,
    begun: Instant,
    samples: Arc<Mutex<Vec<Vec<f64>>>>,
    _sampling: AbortOnDropHandle<()>,
}

impl Meter {
    pub(crate) fn start(subjects: Vec<Subject>) -> Self {
        let cpu = subjects.iter().map(cpu).collect();
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (watched, kept) = (subjects.clone(), samples.clone());
        let sampling = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                // Shares of trees are dear to compute: they are looked at once, at the end.
                let sample = watched.iter().map(|subject| if subject.tree { 0.0 } else { resident(subject.pid) });
                let sample = sample.collect();
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                tokio::time::sleep(EVERY).await;
            }
        }));
        Self { subjects, cpu, begun: Instant::now(), samples, _sampling: sampling }
    }

    /// What each took, by name; and the seconds that the meter ran.
    pub(crate) fn stop(self) -> (BTreeMap<&'static str, Taken>, f64) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = self.subjects.iter().zip(&self.cpu).enumerate().map(|(place, (subject, before))| {
            let series: Vec<f64> = samples.iter().map(|sample| sample[place]).collect();
            let peak = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
            let quarter = series.len() / 4;
            let memory = if subject.tree { share(subject.pid) } else { peak(&series) };
            let growth = peak(&series[3 * quarter..]) - peak(&series[quarter..2 * quarter]);
            (subject.name, Taken { cpu: cpu(subject) - before, memory, growth })
        });
        (taken.collect(), seconds)
    }
}

/// Seconds of processor time that a subject has taken since it was started, ended children included.
fn cpu(subject: &Subject) -> f64 {
    let of = |pid, ended: bool| -> f64 {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0.0 };
        // After the name in parentheses: utime, stime, cutime and cstime are fields 14 to 17.
        let Some((_, fields)) = stat.rsplit_once(") ") else { return 0.0 };
        let fields = fields.split(' ').skip(11).take(if ended { 4 } else { 2 });
        fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS
    };
    if !subject.tree {
        return of(subject.pid, false);
    }
    of(subject.pid, true) + children(subject.pid).into_iter().map(|pid| of(pid, true)).sum::<f64>()
}

/// A process's children.
fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// A value in KiB of one of a process's files, in MiB.
fn mib(pid: u32, file: &str, name: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// The resident memory of a process, in MiB.
pub(crate) fn resident(pid: u32) -> f64 {
    mib(pid, "status", "VmRSS:")
}

fn share(pid: u32) -> f64 {
    let pids = children(pid).into_iter().chain([pid]);
    pids.map(|pid| mib(pid, "smaps_rollup", "Pss:")).sum()
}

//! A child process that never outlives its owner.
//!
//! The child is started by a shell script (`supervise.sh`) that forks a watcher and then executes the program. The
//! watcher reads a pipe whose other end only the owner holds. When the owner drops the [`Process`], exits or is killed
//! with SIGKILL, the pipe closes; the watcher then stops the child and removes its temporary directory. The child has
//! its own process group: Ctrl-C in a terminal reaches only the owner, which decides the order of the shutdown.

use crate::{
    error::{During, Error},
    user::User,
};
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin},
    time::{Instant, sleep, timeout, timeout_at},
};

const SUPERVISE: &str = include_str!("supervise.sh");

/// Pause between two readiness probes. A shorter pause finds the child ready sooner and takes CPU from it.
const PROBE_INTERVAL: Duration = Duration::from_millis(20);

/// The part of a log that goes into an error.
const TAIL_BYTES: u64 = 4 * 1024;
const TAIL_LINES: usize = 30;

/// A signal for a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: for Postgres, disconnect all clients and shut down cleanly.
    Int,
    /// SIGTERM: shut down.
    Term,
    /// SIGQUIT: for Postgres, stop at once without a checkpoint; the next start recovers.
    Quit,
    /// SIGKILL: cannot be caught.
    Kill,
    /// SIGSTOP: freeze; cannot be caught.
    Stop,
    /// SIGCONT: resume after [`Signal::Stop`].
    Cont,
}

impl Signal {
    /// The name for `kill -s`.
    fn name(self) -> &'static str {
        match self {
            Self::Int => "INT",
            Self::Term => "TERM",
            Self::Quit => "QUIT",
            Self::Kill => "KILL",
            Self::Stop => "STOP",
            Self::Cont => "CONT",
        }
    }

    fn number(self) -> rustix::process::Signal {
        use rustix::process::Signal as Number;
        match self {
            Self::Int => Number::INT,
            Self::Term => Number::TERM,
            Self::Quit => Number::QUIT,
            Self::Kill => Number::KILL,
            Self::Stop => Number::STOP,
            Self::Cont => Number::CONT,
        }
    }
}

/// What a probe found out about a child that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It is ready.
    Ready,
    /// It is not ready.
    NotReady,
    /// It recovers its data. That takes longer for more data, and would begin again after a stop.
    Recovering,
}

impl From<bool> for Probe {
    fn from(is_ready: bool) -> Self {
        if is_ready { Self::Ready } else { Self::NotReady }
    }
}

/// How a child is run and stopped.
#[derive(Clone, Debug)]
pub struct ChildOptions<'a> {
    /// Its name in errors.
    pub name: &'a str,
    /// The file for its standard output and standard error.
    pub log: &'a Path,
    /// The user it runs as; by default the caller.
    pub user: Option<User>,
    /// The signals that stop it after its owner has ended, one per `grace_period`; SIGKILL is the last one.
    pub signals: &'a [Signal],
    /// How long it may take to stop after a signal.
    pub grace_period: Duration,
    /// The directory that is removed after owner and child have ended.
    pub cleanup_dir: Option<&'a Path>,
}

/// The log of a child since its start. The file may contain logs of earlier starts.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    start: u64,
}

impl Log {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole log.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn text(&self) -> io::Result<String> {
        self.last(u64::MAX)
    }

    /// Its last lines, for an error message.
    pub fn tail(&self) -> String {
        match self.last(TAIL_BYTES) {
            Ok(text) => {
                let lines: Vec<&str> = text.lines().collect();
                lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
            }
            Err(error) => format!("({}: {error})", self.path.display()),
        }
    }

    fn last(&self, bytes: u64) -> io::Result<String> {
        let mut file = File::open(&self.path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(self.start.max(end.saturating_sub(bytes))))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// A running child, or one that has ended. Dropping it stops it, in the background.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: u32,
    /// The watcher stops the child when this pipe closes.
    watcher_pipe: Option<ChildStdin>,
    grace_period: Duration,
    log: Log,
}

impl Process {
    /// Starts the program with the arguments, environment and working directory of `command`. Its other settings
    /// (standard streams, user) are ignored.
    ///
    /// If the program does not exist, the child exits with 127.
    ///
    /// # Errors
    /// The log cannot be written, or the process cannot be started.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn spawn(command: &Command, options: &ChildOptions<'_>) -> Result<Self, Error> {
        let log = File::options()
            .append(true)
            .create(true)
            .open(options.log)
            .during(|| format!("opening the log {}", options.log.display()))?;
        let start = log.metadata().map_or(0, |metadata| metadata.len());
        let signals: Vec<&str> = options.signals.iter().map(|signal| signal.name()).collect();

        let starting = || format!("starting {}", options.name);
        let mut supervised = Command::new("/bin/sh");
        supervised.args(["-c", SUPERVISE, options.name, &signals.join(" ")]);
        supervised.arg((options.grace_period.as_millis() / 100).to_string());
        supervised.arg(options.cleanup_dir.unwrap_or(Path::new("")));
        supervised.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => supervised.env(key, value),
                None => supervised.env_remove(key),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            supervised.current_dir(dir);
        }
        if let Some(user) = options.user {
            user.apply(&mut supervised);
        }
        supervised.process_group(0).stdin(Stdio::piped()).stdout(log.try_clone().during(starting)?).stderr(log);

        let mut child = tokio::process::Command::from(supervised).spawn().during(starting)?;
        let pid = child.id().expect("a child that was not waited for has a pid");
        let watcher_pipe = child.stdin.take();
        Ok(Self {
            name: options.name.to_owned(),
            child,
            pid,
            watcher_pipe,
            grace_period: options.grace_period,
            log: Log { path: options.log.to_owned(), start },
        })
    }

    /// The pid of the program, also after it has ended.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the watcher still runs; it removes the temporary directory.
    pub(crate) fn is_watched(&self) -> bool {
        self.watcher_pipe.is_some()
    }

    /// Waits until `probe` finds the child ready. The deadline begins again after each [`Probe::Recovering`].
    ///
    /// # Errors
    /// [`Error::Died`] as soon as the child has ended, [`Error::NotReady`] after `deadline`, both with the log's end.
    pub async fn ready<P: Into<Probe>>(&mut self, deadline: Duration, probe: impl AsyncFn() -> P) -> Result<(), Error> {
        tokio::select! {
            biased;
            status = self.child.wait() => {
                let status = status.during(|| format!("waiting for {}", self.name))?;
                self.end_watcher().await;
                Err(Error::Died { name: self.name.clone(), status, log: self.log.tail() })
            }
            is_ready = becomes_ready(deadline, probe) => if is_ready {
                Ok(())
            } else {
                Err(Error::NotReady { name: self.name.clone(), deadline, log: self.log.tail() })
            },
        }
    }

    /// Resolves when the child has ended. Cancel-safe.
    ///
    /// # Errors
    /// The system cannot wait for it.
    pub async fn exited(&mut self) -> Result<ExitStatus, Error> {
        let status = self.child.wait().await.during(|| format!("waiting for {}", self.name))?;
        self.end_watcher().await;
        Ok(status)
    }

    /// Sends a signal, unless the child is known to have ended.
    ///
    /// # Errors
    /// The system cannot signal.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        // Until the child is waited for, its pid cannot be reused.
        let Some(pid) = self.child.id() else { return Ok(()) };
        send(pid, signal).during(|| format!("sending SIG{} to {}", signal.name(), self.name))
    }

    /// Sends the signals one after the other, and finally SIGKILL, until the child has ended.
    ///
    /// # Errors
    /// The system cannot signal or wait.
    pub async fn stop(&mut self, signals: &[Signal]) -> Result<ExitStatus, Error> {
        for signal in signals {
            self.signal(*signal)?;
            // A frozen child gets the signal only after it is resumed.
            self.signal(Signal::Cont)?;
            if let Ok(status) = timeout(self.grace_period, self.exited()).await {
                return status;
            }
        }
        self.signal(Signal::Kill)?;
        self.exited().await
    }

    /// The child's log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Ends the watcher: the child has ended, and its pid may be reused.
    async fn end_watcher(&mut self) {
        if let Some(mut watcher_pipe) = self.watcher_pipe.take() {
            // Writing fails only if the watcher has ended already.
            let _ = watcher_pipe.write_all(b"\n").await;
        }
    }
}

/// Probes until the child is ready; returns false if the deadline passes first.
async fn becomes_ready<P: Into<Probe>>(deadline: Duration, probe: impl AsyncFn() -> P) -> bool {
    let mut end = Instant::now() + deadline;
    loop {
        match timeout_at(end, probe()).await.map_or(Probe::NotReady, Into::into) {
            Probe::Ready => return true,
            Probe::Recovering => end = Instant::now() + deadline,
            Probe::NotReady if Instant::now() >= end => return false,
            Probe::NotReady => {}
        }
        sleep(PROBE_INTERVAL).await;
    }
}

pub(crate) fn send(pid: u32, signal: Signal) -> io::Result<()> {
    let Some(pid) = raw(pid) else { return Ok(()) };
    match rustix::process::kill_process(pid, signal.number()) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => Ok(other?),
    }
}

fn raw(pid: u32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Stops a server that an earlier owner left running: the process whose pid is on the first line of `pid_file`, if its
/// command line contains `mark`. If the pid now belongs to another program, only the file is removed: otherwise the
/// server that is about to start would mistake that program for an instance of itself.
///
/// # Errors
/// The process cannot be signalled, or survives SIGKILL.
pub(crate) async fn clear_leftover(
    pid_file: &Path,
    mark: &str,
    signals: &[Signal],
    grace_period: Duration,
) -> Result<(), Error> {
    let Ok(text) = fs::read_to_string(pid_file) else { return Ok(()) };
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse().ok()) else { return Ok(()) };
    let ours = || command_line(pid).is_some_and(|line| line.contains(mark));
    for signal in signals.iter().chain([&Signal::Kill, &Signal::Kill]) {
        if !ours() {
            break;
        }
        send(pid, *signal).during(|| format!("stopping the leftover process {pid}"))?;
        send(pid, Signal::Cont).during(|| format!("stopping the leftover process {pid}"))?;
        let deadline = Instant::now() + grace_period;
        while ours() && Instant::now() < deadline {
            sleep(PROBE_INTERVAL).await;
        }
    }
    if ours() {
        return Err(Error::Command {
            command: format!("kill -s KILL {pid}"),
            output: "the process still runs".to_owned(),
        });
    }
    let taken = raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
    if taken && pid_file.exists() {
        fs::remove_file(pid_file).during(|| format!("removing {}", pid_file.display()))?;
    }
    Ok(())
}

/// The command line of a process; `None` if it does not exist or is a zombie.
fn command_line(pid: u32) -> Option<String> {
    let line = if Path::new("/proc/self/cmdline").exists() {
        String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).ok()?).replace('\0', " ")
    } else {
        let output = Command::new("ps").args(["-o", "command=", "-p", &pid.to_string()]).output().ok()?;
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    (!line.trim().is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_time_of_a_recovery_does_not_count_toward_the_deadline() {
        let (deadline, recovery) = (Duration::from_millis(60), Duration::from_millis(300));
        let started = Instant::now();
        let recovering = async || if started.elapsed() < recovery { Probe::Recovering } else { Probe::NotReady };

        assert!(!becomes_ready(deadline, recovering).await);
        assert!(started.elapsed() >= recovery);
        assert!(becomes_ready(deadline, async || true).await);
        assert!(!becomes_ready(deadline, async || std::future::pending::<bool>().await).await);
    }
}

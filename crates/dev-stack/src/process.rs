//! A child process that never outlives its owner.
//!
//! The child is started through a few lines of shell (`supervise.sh`) that become the program itself and leave a
//! watcher behind, on a pipe whose other end only the owner holds. When the owner drops the [`Process`], exits or is
//! killed with SIGKILL, the pipe closes and the watcher stops the child and removes what it was told to. The child is
//! in a process group of its own: a terminal's Ctrl-C reaches the owner alone, which decides the order of the end.

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
    time::{Instant, sleep, timeout},
};

const SUPERVISE: &str = include_str!("supervise.sh");

/// How often an unready child is asked again. Shorter finds it ready sooner and burns the processor it starts on.
const PROBE_INTERVAL: Duration = Duration::from_millis(20);

/// How much of a log goes into an error.
const TAIL_BYTES: u64 = 4 * 1024;
const TAIL_LINES: usize = 30;

/// The signals a child is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: for Postgres, disconnect everybody and shut down cleanly.
    Int,
    /// SIGTERM: end in order.
    Term,
    /// SIGQUIT: for Postgres, end at once without a checkpoint; the next start recovers.
    Quit,
    /// SIGKILL: end now, uncaught.
    Kill,
    /// SIGSTOP: freeze, uncaught.
    Stop,
    /// SIGCONT: go on after [`Signal::Stop`].
    Cont,
}

impl Signal {
    /// As `kill -s` calls it.
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

/// How a child is kept.
#[derive(Clone, Debug)]
pub struct Keep<'a> {
    /// What errors call it.
    pub name: &'a str,
    /// The file its standard output and standard error are appended to.
    pub log: &'a Path,
    /// The user it runs as, when not the caller's own.
    pub user: Option<User>,
    /// The signals that stop it when its owner is gone, each tried for `patience`; SIGKILL is the last in any case.
    pub signals: &'a [Signal],
    /// How long it may take to end after a signal.
    pub patience: Duration,
    /// The directory that goes when the owner is gone and the child has ended.
    pub litter: Option<&'a Path>,
}

/// What a child has printed since it was started. The file may hold more, of earlier ones.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    start: u64,
}

impl Log {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of it.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn text(&self) -> io::Result<String> {
        self.last(u64::MAX)
    }

    /// Its last lines, for an error message.
    #[must_use]
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
    /// Open for as long as the watcher shall leave the child alone.
    leash: Option<ChildStdin>,
    patience: Duration,
    log: Log,
}

impl Process {
    /// Starts the program with the arguments, environment and working directory of `command`; its other settings
    /// (standard streams, user) are this function's business.
    ///
    /// A program that does not exist shows as an exit status of 127.
    ///
    /// # Errors
    /// When the log cannot be written or the system starts no more processes.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn spawn(command: &Command, keep: &Keep<'_>) -> Result<Self, Error> {
        let log = File::options()
            .append(true)
            .create(true)
            .open(keep.log)
            .during(|| format!("opening the log {}", keep.log.display()))?;
        let start = log.metadata().map_or(0, |metadata| metadata.len());
        let signals: Vec<&str> = keep.signals.iter().map(|signal| signal.name()).collect();

        let starting = || format!("starting {}", keep.name);
        let mut supervised = Command::new("/bin/sh");
        supervised.args(["-c", SUPERVISE, keep.name, &signals.join(" ")]);
        supervised.arg((keep.patience.as_millis() / 100).to_string());
        supervised.arg(keep.litter.unwrap_or(Path::new("")));
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
        if let Some(user) = keep.user {
            user.apply(&mut supervised);
        }
        supervised.process_group(0).stdin(Stdio::piped()).stdout(log.try_clone().during(starting)?).stderr(log);

        let mut child = tokio::process::Command::from(supervised).spawn().during(starting)?;
        let pid = child.id().expect("a child that nobody waited for has a pid");
        let leash = child.stdin.take();
        Ok(Self {
            name: keep.name.to_owned(),
            child,
            pid,
            leash,
            patience: keep.patience,
            log: Log { path: keep.log.to_owned(), start },
        })
    }

    /// The pid of the program itself; after its end, the one it had.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether a watcher still stands by, which will remove the litter.
    pub(crate) fn is_watched(&self) -> bool {
        self.leash.is_some()
    }

    /// Waits until `probe` says yes.
    ///
    /// # Errors
    /// [`Error::Died`] as soon as the child has ended, [`Error::NotReady`] after `deadline`, both with the log's end.
    pub async fn ready(&mut self, deadline: Duration, probe: impl AsyncFn() -> bool) -> Result<(), Error> {
        let probing = async {
            while !probe().await {
                sleep(PROBE_INTERVAL).await;
            }
        };
        tokio::select! {
            biased;
            status = self.child.wait() => {
                let status = status.during(|| format!("waiting for {}", self.name))?;
                self.disarm().await;
                Err(Error::Died { name: self.name.clone(), status, log: self.log.tail() })
            }
            () = probing => Ok(()),
            () = sleep(deadline) => Err(Error::NotReady { name: self.name.clone(), deadline, log: self.log.tail() }),
        }
    }

    /// Resolves when the child ends; at once when it has ended already. May be dropped and called again.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub async fn exited(&mut self) -> Result<ExitStatus, Error> {
        let status = self.child.wait().await.during(|| format!("waiting for {}", self.name))?;
        self.disarm().await;
        Ok(status)
    }

    /// Sends a signal. Does nothing when the child is known to have ended.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        // While nobody waited for it, its pid cannot belong to another.
        let Some(pid) = self.child.id() else { return Ok(()) };
        send(pid, signal).during(|| format!("sending SIG{} to {}", signal.name(), self.name))
    }

    /// Sends the signals one after the other, and SIGKILL at last, until the child has ended.
    ///
    /// # Errors
    /// When the system refuses to signal or to wait.
    pub async fn stop(&mut self, signals: &[Signal]) -> Result<ExitStatus, Error> {
        for signal in signals {
            self.signal(*signal)?;
            // A frozen child would see the signal only when it goes on.
            self.signal(Signal::Cont)?;
            if let Ok(status) = timeout(self.patience, self.exited()).await {
                return status;
            }
        }
        self.signal(Signal::Kill)?;
        self.exited().await
    }

    /// What it prints.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Sends the watcher home: there is nothing left to stop, and the pid may soon be another's.
    async fn disarm(&mut self) {
        if let Some(mut leash) = self.leash.take() {
            // It fails only when the watcher is gone already.
            let _ = leash.write_all(b"\n").await;
        }
    }
}

fn send(pid: u32, signal: Signal) -> io::Result<()> {
    let Some(pid) = raw(pid) else { return Ok(()) };
    match rustix::process::kill_process(pid, signal.number()) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => Ok(other?),
    }
}

fn raw(pid: u32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Stops what an earlier owner left running: the process whose pid is on the first line of `pid_file`, if its command
/// line contains `mark`. A pid that became another program's is left alone and the file removed, lest the program
/// about to start mistakes it for one of its own.
///
/// # Errors
/// When the leftover cannot be signalled, or survives even SIGKILL.
pub(crate) async fn clear_leftover(
    pid_file: &Path,
    mark: &str,
    signals: &[Signal],
    patience: Duration,
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
        let deadline = Instant::now() + patience;
        while ours() && Instant::now() < deadline {
            sleep(PROBE_INTERVAL).await;
        }
    }
    if ours() {
        return Err(Error::Command { command: format!("kill -s KILL {pid}"), output: "it still runs".to_owned() });
    }
    let taken = raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
    if taken && pid_file.exists() {
        fs::remove_file(pid_file).during(|| format!("removing {}", pid_file.display()))?;
    }
    Ok(())
}

/// The command line of a process; `None` when there is no such process, or only its zombie.
fn command_line(pid: u32) -> Option<String> {
    let line = if Path::new("/proc/self/cmdline").exists() {
        String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).ok()?).replace('\0', " ")
    } else {
        let output = Command::new("ps").args(["-o", "command=", "-p", &pid.to_string()]).output().ok()?;
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    (!line.trim().is_empty()).then_some(line)
}

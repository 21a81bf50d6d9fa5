//! A program under test, as a child process.

use crate::http_client;
use dev_stack::{
    Error,
    process::{ChildOptions, Process, Signal},
};
use std::{
    path::Path,
    process::{Command, ExitStatus},
    time::Duration,
};
use tempfile::TempDir;

/// How long a service may take to drain before it is killed, and the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running program, or one that has ended. It goes with this value, and with the test process.
#[derive(Debug)]
pub struct Service {
    process: Process,
    command: Command,
    name: String,
    dir: TempDir,
}

impl Service {
    /// Starts the program, with the test's environment and what `command` adds to it. What it prints goes to
    /// [`Service::log`].
    ///
    /// # Panics
    /// When it cannot be started; and outside a Tokio runtime.
    #[must_use]
    pub fn spawn(name: &str, command: Command) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self { process: start(name, &command, dir.path()), command, name: name.to_owned(), dir }
    }

    /// Waits until the URL answers with a status of 2xx.
    ///
    /// # Panics
    /// With the end of its log, when the service ends before, or the deadline passes.
    pub async fn wait_for_http(&mut self, url: &str, deadline: Duration) {
        let client = http_client();
        let probe = async || client.get(url).send().await.is_ok_and(|response| response.status().is_success());
        expect(self.process.ready(deadline, probe).await);
    }

    /// Waits for a line with `text` in what the program has printed since its last start, and returns the line.
    ///
    /// # Panics
    /// With the end of its log, when the service ends before, or the deadline passes.
    pub async fn wait_for_log(&mut self, text: &str, deadline: Duration) -> String {
        let log = self.process.log().clone();
        let line = || {
            let log = log.text().ok()?;
            // Only whole lines: the rest of the last one may still be on its way.
            let whole = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            whole.into_iter().find(|line| line.contains(text)).map(str::to_owned)
        };
        expect(self.process.ready(deadline, async || line().is_some()).await);
        line().expect("a line that was there a moment ago")
    }

    /// Ends it with SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// When the system refuses.
    pub async fn kill9(&mut self) {
        expect(self.process.stop(&[]).await);
    }

    /// Asks it to end with SIGTERM and waits until it has; SIGKILL after 30 s shows in the status.
    ///
    /// # Panics
    /// When the system refuses.
    pub async fn terminate(&mut self) -> ExitStatus {
        expect(self.process.stop(&[Signal::Term]).await)
    }

    /// Starts it again with the same arguments and environment, after it ended; one that runs is terminated first.
    ///
    /// # Panics
    /// When it cannot be started.
    pub async fn restart(&mut self) {
        self.terminate().await;
        self.process = start(&self.name, &self.command, self.dir.path());
    }

    /// Stops its clock: it holds its connections and does nothing, until [`Service::thaw`].
    ///
    /// # Panics
    /// When the system refuses.
    pub fn freeze(&self) {
        expect(self.process.signal(Signal::Stop));
    }

    /// Lets it go on after [`Service::freeze`].
    ///
    /// # Panics
    /// When the system refuses.
    pub fn thaw(&self) {
        expect(self.process.signal(Signal::Cont));
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When the system cannot wait for it.
    pub async fn exited(&mut self) -> ExitStatus {
        expect(self.process.exited().await)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its pid; after its end, the one it had.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has printed since its last start.
    ///
    /// # Panics
    /// When the log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log().text().expect("the log of the service")
    }
}

fn start(name: &str, command: &Command, dir: &Path) -> Process {
    let log = dir.join("log");
    let options = ChildOptions {
        name,
        log: &log,
        user: None,
        // A test that is over has no use for an orderly end.
        signals: &[],
        grace_period: PATIENCE,
        cleanup_dir: Some(dir),
    };
    expect(Process::spawn(command, &options))
}

fn expect<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

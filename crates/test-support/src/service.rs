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

/// How long a service may take to drain before it is killed.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program that runs or has ended. It is killed when this value is dropped, and with the test process.
#[derive(Debug)]
pub struct Service {
    process: Process,
    command: Command,
    name: String,
    dir: TempDir,
}

impl Service {
    /// Starts the program, in the test's environment with what `command` adds. Its output is in [`Service::log`].
    pub fn spawn(name: &str, command: Command) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self { process: start(name, &command, dir.path()), command, name: name.to_owned(), dir }
    }

    /// Waits until the URL answers with a status of 2xx. Panics with the end of the log if the program ends first.
    pub async fn wait_for_http(&mut self, url: &str, deadline: Duration) {
        let client = http_client();
        let probe = async || client.get(url).send().await.is_ok_and(|response| response.status().is_success());
        expect(self.process.ready(deadline, probe).await);
    }

    /// Waits for a line with `text` in the output since the last start, and returns the line.
    pub async fn wait_for_log(&mut self, text: &str, deadline: Duration) -> String {
        let log = self.process.log().clone();
        let line = || {
            let log = log.text().ok()?;
            // Only whole lines: the last one may be incomplete.
            let whole = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            whole.into_iter().find(|line| line.contains(text)).map(str::to_owned)
        };
        expect(self.process.ready(deadline, async || line().is_some()).await);
        line().expect("a line that was there a moment ago")
    }

    /// Ends it with SIGKILL and waits until it has ended.
    pub async fn kill9(&mut self) {
        expect(self.process.stop(&[]).await);
    }

    /// Ends it with SIGTERM and waits until it has ended; after 30 s with SIGKILL, which the status shows.
    pub async fn terminate(&mut self) -> ExitStatus {
        expect(self.process.stop(&[Signal::Term]).await)
    }

    /// Starts it again with the same arguments and environment; if it runs, it is terminated first.
    pub async fn restart(&mut self) {
        self.terminate().await;
        self.process = start(&self.name, &self.command, self.dir.path());
    }

    /// Suspends it (SIGSTOP): it keeps its connections and does nothing until [`Service::thaw`].
    pub fn freeze(&self) {
        expect(self.process.signal(Signal::Stop));
    }

    /// Continues it after [`Service::freeze`].
    pub fn thaw(&self) {
        expect(self.process.signal(Signal::Cont));
    }

    /// Waits until it ends by itself.
    pub async fn exited(&mut self) -> ExitStatus {
        expect(self.process.exited().await)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its pid; after its end, the last one.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its output since the last start.
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
        // An orderly end is of no use when a test is over.
        signals: &[],
        grace_period: PATIENCE,
        cleanup_dir: Some(dir),
    };
    expect(Process::spawn(command, &options))
}

fn expect<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

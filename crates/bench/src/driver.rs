//! The driver: a separate process that plays the clients and the callbacks' endpoints.
//!
//! It reads one [`DriverCommand`] per line from its standard input and answers each with one line of JSON on its
//! standard output.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::{
    load,
    protocol::{DriverCommand, Load, Posted, Received},
    receiver::{Receiver, Tally},
};

/// Runs the driver until its standard input ends.
pub(crate) async fn run() -> anyhow::Result<()> {
    let tally = Arc::new(Tally::new());
    let receiver = Receiver::new(tally.clone());
    let mut commands = BufReader::new(tokio::io::stdin()).lines();
    let mut out = tokio::io::stdout();
    while let Some(line) = commands.next_line().await? {
        let command = serde_json::from_str(&line).with_context(|| format!("not a driver command: {line}"))?;
        let mut answer = match command {
            DriverCommand::Listen(addresses) => serde_json::to_string(&receiver.listen(addresses).await?)?,
            DriverCommand::Hang(addresses) => serde_json::to_string(&receiver.hang(&addresses))?,
            DriverCommand::Post(load) => serde_json::to_string(&load::post(load, &tally).await?)?,
            DriverCommand::Reset => serde_json::to_string(&tally.reset())?,
            DriverCommand::Await(updates, timeout) => {
                let deadline = Instant::now() + timeout;
                while tally.updates() < updates && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                serde_json::to_string(&tally.received())?
            }
        };
        answer.push('\n');
        out.write_all(answer.as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}

/// A running driver process.
#[derive(Debug)]
pub(crate) struct Driver {
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Driver {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("driver")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the driver")?;
        let commands = child.stdin.take().context("the driver has no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("the driver has no standard output")?).lines();
        Ok(Self { child, commands, answers })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    async fn send<T: DeserializeOwned>(&mut self, command: &DriverCommand) -> anyhow::Result<T> {
        let mut line = serde_json::to_string(command)?;
        line.push('\n');
        self.commands.write_all(line.as_bytes()).await.context("the driver has exited")?;
        match self.answers.next_line().await? {
            Some(line) => {
                serde_json::from_str(&line).with_context(|| format!("unexpected answer of the driver: {line}"))
            }
            None => bail!("the driver exited during {command:?}"),
        }
    }

    /// Listens on an unused port.
    pub(crate) async fn listen(&mut self) -> anyhow::Result<SocketAddr> {
        let addresses = self.listen_on(vec![SocketAddr::from(([127, 0, 0, 1], 0))]).await?;
        addresses.into_iter().next().context("the driver returned no address")
    }

    pub(crate) async fn listen_on(&mut self, addresses: Vec<SocketAddr>) -> anyhow::Result<Vec<SocketAddr>> {
        self.send(&DriverCommand::Listen(addresses)).await
    }

    pub(crate) async fn hang(&mut self, addresses: Vec<SocketAddr>) -> anyhow::Result<()> {
        self.send(&DriverCommand::Hang(addresses)).await
    }

    /// Posts updates; fails if one is refused.
    pub(crate) async fn post(&mut self, load: Load) -> anyhow::Result<Posted> {
        let posted: Posted = self.send(&DriverCommand::Post(load)).await?;
        if let Some(refusal) = &posted.refusal {
            bail!("{} requests were refused, the first with: {refusal}", posted.refused);
        }
        Ok(posted)
    }

    pub(crate) async fn reset(&mut self) -> anyhow::Result<()> {
        self.send(&DriverCommand::Reset).await
    }

    /// Waits until this many updates are received or the timeout has passed.
    pub(crate) async fn received(&mut self, updates: u64, timeout: Duration) -> anyhow::Result<Received> {
        self.send(&DriverCommand::Await(updates, timeout)).await
    }
}

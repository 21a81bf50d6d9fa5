//! The scenarios: each starts what it needs, measures ours and the floor in turns, and reports.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use async_nats::jetstream;
use futures::{StreamExt, TryStreamExt};
use tokio::process::{Child, Command};

pub(crate) mod apply;
pub(crate) mod deliver;
pub(crate) mod e2e;
pub(crate) mod gateway;
pub(crate) mod latency;

/// How many publishes may be unacked while a stream is filled.
const PIPELINED: usize = 2048;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// How long a run measures.
    pub(crate) lasting: Duration,
    /// How many runs there are.
    pub(crate) runs: u32,
}

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

/// Publishes messages, many at once.
async fn fill(
    js: &jetstream::Context,
    messages: impl Iterator<Item = jetstream::message::OutboundMessage>,
) -> anyhow::Result<()> {
    futures::stream::iter(messages)
        .map(|message| service_kit::publish::publish(js, message))
        .buffered(PIPELINED)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(())
}

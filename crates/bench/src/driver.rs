//! The driver: a process of its own that plays the clients and the callbacks' endpoints.
//!
//! It takes one [`Order`] a line on its standard input and answers each with one line on its standard output.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::{
    latency::Latency,
    load::{self, Load, Posted},
    receiver::{Book, Receiver},
};

/// What the driver is told to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Listen on these addresses; answers with the addresses.
    Listen(Vec<SocketAddr>),
    /// Never answer on these addresses from now on.
    Hang(Vec<SocketAddr>),
    /// Post updates; answers with [`Posted`].
    Post(Load),
    /// Forget what was received.
    Reset,
    /// Wait until so many updates were received or this time has passed; answers with [`Received`].
    Await(u64, Duration),
}

/// What was received since the last reset.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Received {
    /// Webhooks, those that came again included.
    pub(crate) webhooks: u64,
    /// Updates that were heard of.
    pub(crate) updates: u64,
    /// Seconds from the first webhook to the last.
    pub(crate) seconds: f64,
    /// From the time at which the update was to be posted to its webhook.
    pub(crate) latency: Latency,
}

/// Runs the driver until its standard input ends.
pub(crate) async fn run() -> anyhow::Result<()> {
    let book = Arc::new(Book::new());
    let mut receiver = Receiver::new(book.clone());
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut out = tokio::io::stdout();
    while let Some(line) = orders.next_line().await? {
        let order = serde_json::from_str(&line).with_context(|| format!("not an order: {line}"))?;
        let mut answer = match order {
            Order::Listen(addresses) => serde_json::to_string(&receiver.listen(addresses).await?)?,
            Order::Hang(addresses) => {
                receiver.hang(&addresses);
                "null".into()
            }
            Order::Post(load) => serde_json::to_string(&load::post(load, &book).await?)?,
            Order::Reset => {
                book.reset();
                "null".into()
            }
            Order::Await(updates, patience) => {
                let deadline = Instant::now() + patience;
                while book.updates() < updates && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                serde_json::to_string(&book.received())?
            }
        };
        answer.push('\n');
        out.write_all(answer.as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}

/// A running driver.
#[derive(Debug)]
pub(crate) struct Driver {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Driver {
    /// Starts one.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("driver")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the driver")?;
        let orders = child.stdin.take().context("the driver has no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("the driver has no standard output")?).lines();
        Ok(Self { child, orders, answers })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    async fn order<T: DeserializeOwned>(&mut self, order: &Order) -> anyhow::Result<T> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.orders.write_all(line.as_bytes()).await.context("the driver is gone")?;
        match self.answers.next_line().await? {
            Some(line) => serde_json::from_str(&line).with_context(|| format!("the driver's answer: {line}")),
            None => bail!("the driver ended: {order:?}"),
        }
    }

    /// Listens on an address that is free.
    pub(crate) async fn listen(&mut self) -> anyhow::Result<SocketAddr> {
        let addresses = self.listen_on(vec![SocketAddr::from(([127, 0, 0, 1], 0))]).await?;
        addresses.into_iter().next().context("no address")
    }

    pub(crate) async fn listen_on(&mut self, addresses: Vec<SocketAddr>) -> anyhow::Result<Vec<SocketAddr>> {
        self.order(&Order::Listen(addresses)).await
    }

    pub(crate) async fn hang(&mut self, addresses: Vec<SocketAddr>) -> anyhow::Result<()> {
        self.order(&Order::Hang(addresses)).await
    }

    pub(crate) async fn post(&mut self, load: Load) -> anyhow::Result<Posted> {
        let posted: Posted = self.order(&Order::Post(load)).await?;
        if let Some(refusal) = &posted.refusal {
            bail!("{} of the requests were refused, the first with: {refusal}", posted.refused);
        }
        Ok(posted)
    }

    pub(crate) async fn reset(&mut self) -> anyhow::Result<()> {
        self.order(&Order::Reset).await
    }

    pub(crate) async fn received(&mut self, updates: u64, patience: Duration) -> anyhow::Result<Received> {
        self.order(&Order::Await(updates, patience)).await
    }
}

//! What it costs to publish to JetStream: single messages, atomic batches, and several updates in one message, on one
//! server and on three replicas, with and without sync before ack. No service takes part; the figures are what
//! docs/adr/0050-publish-waiting-commands-as-one-message.md rests on. Not a part of `all`.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use async_nats::{
    Client, HeaderMap,
    jetstream::{
        self,
        message::PublishMessage,
        publish::PublishAck,
        stream::{Config, StorageType},
    },
};
use bytes::Bytes;
use contract::headers;
use dev_stack::{LocalNats, NatsOptions};
use futures::future::try_join_all;

use super::{Plan, progress, sync_is_measurable};
use crate::{
    meter::{MeasuredProcess, Meter},
    report::{Report, median},
};

const SCENARIO: &str = "publish";
const STREAM: &str = "PUBLISHED";
/// The bytes of an update.
const UPDATE_BYTES: usize = 500;
/// Updates per group.
const GROUPS: [usize; 2] = [16, 256];
/// The names of servers, for the meter.
const SERVERS: [&str; 3] = ["nats-1", "nats-2", "nats-3"];

/// How a group of updates is published. The next group begins after the acks of the last one.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// One message at a time.
    InTurn,
    /// One message per update, all in flight.
    Pipelined(usize),
    /// One atomic batch with a message per update (ADR-50 of NATS).
    AtomicBatch(usize),
    /// One message with all updates.
    OneMessage(usize),
}

impl Way {
    fn all() -> impl Iterator<Item = Self> {
        let of_groups =
            GROUPS.into_iter().flat_map(|n| [Self::Pipelined(n), Self::AtomicBatch(n), Self::OneMessage(n)]);
        std::iter::once(Self::InTurn).chain(of_groups)
    }

    fn updates(self) -> usize {
        match self {
            Self::InTurn => 1,
            Self::Pipelined(updates) | Self::AtomicBatch(updates) | Self::OneMessage(updates) => updates,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InTurn => f.write_str("one message at a time"),
            Self::Pipelined(updates) => write!(f, "{updates} messages in flight"),
            Self::AtomicBatch(updates) => write!(f, "atomic batches of {updates}"),
            Self::OneMessage(updates) => write!(f, "{updates} updates in one message"),
        }
    }
}

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let can_sync = sync_is_measurable(SCENARIO, report).await?;
    for replicas in [1, SERVERS.len()] {
        for sync in [false, true].into_iter().filter(|sync| can_sync || !sync) {
            measure(plan, report, replicas, sync).await?;
        }
    }
    Ok(())
}

async fn measure(plan: &Plan, report: &mut Report, replicas: usize, sync: bool) -> anyhow::Result<()> {
    let options = NatsOptions { sync, ..NatsOptions::default() };
    let servers = match replicas {
        1 => vec![LocalNats::start(options, &dev_stack::quiet).await?],
        _ => LocalNats::start_cluster(replicas, options, &dev_stack::quiet).await?,
    };
    let publishing = Publishing::start(&servers).await?;
    let synced = if sync { "synced" } else { "not synced" };
    for way in Way::all() {
        let what = format!("{replicas} {}, {synced}, {way}", if replicas == 1 { "replica" } else { "replicas" });
        let (mut rates, mut latencies, mut costs) = (Vec::new(), Vec::new(), Vec::new());
        for run in 1..=plan.runs {
            progress(&format!("{what}, run {run} of {}", plan.runs));
            let Published { updates, times, cpu, seconds } = publishing.run(way, plan.duration).await?;
            rates.push(updates as f64 / seconds);
            latencies.push(median(&times));
            costs.push(cpu * 1000.0 / updates as f64);
        }
        report.figure(SCENARIO, format!("{what}: updates"), "/s", rates, None);
        report.figure(SCENARIO, format!("{what}: median time until the ack"), "ms", latencies, None);
        report.figure(SCENARIO, format!("{what}: CPU of the servers per 1000 updates"), "s", costs, None);
    }
    Ok(())
}

struct Published {
    updates: usize,
    /// Milliseconds from sending a group to its last ack.
    times: Vec<f64>,
    cpu: f64,
    seconds: f64,
}

/// A stream on some servers.
struct Publishing<'a> {
    servers: &'a [LocalNats],
    client: Client,
    js: jetstream::Context,
}

impl<'a> Publishing<'a> {
    async fn start(servers: &'a [LocalNats]) -> anyhow::Result<Self> {
        let client = servers.first().context("a server")?.connect().await?;
        let js = service_kit::nats::jetstream(&client);
        let stream = Config {
            name: STREAM.to_owned(),
            subjects: vec![STREAM.to_owned()],
            storage: StorageType::File,
            num_replicas: servers.len(),
            allow_atomic_publish: true,
            max_bytes: 1 << 30,
            ..Config::default()
        };
        js.create_stream(stream).await.context("nats-server 2.12 or later is needed, for atomic batches")?;
        Ok(Self { servers, client, js })
    }

    async fn run(&self, way: Way, duration: Duration) -> anyhow::Result<Published> {
        let processes = SERVERS.iter().zip(self.servers);
        let processes = processes.map(|(name, server)| MeasuredProcess { name, pid: server.pid(), tree: false });
        let meter = Meter::start(processes.collect());
        let (start, mut updates, mut times) = (Instant::now(), 0, Vec::new());
        while start.elapsed() < duration {
            let begun = Instant::now();
            self.publish(way).await?;
            times.push(begun.elapsed().as_secs_f64() * 1000.0);
            updates += way.updates();
        }
        let (usages, seconds) = meter.stop();
        Ok(Published { updates, times, cpu: usages.values().map(|usage| usage.cpu).sum(), seconds })
    }

    /// Publishes a group, and waits until it is acked.
    async fn publish(&self, way: Way) -> anyhow::Result<()> {
        match way {
            Way::InTurn => self.acked(UPDATE_BYTES).await?,
            Way::Pipelined(updates) => {
                try_join_all((0..updates).map(|_| self.acked(UPDATE_BYTES))).await?;
            }
            Way::AtomicBatch(updates) => self.publish_batch(updates).await?,
            Way::OneMessage(updates) => self.acked(UPDATE_BYTES * updates).await?,
        }
        Ok(())
    }

    /// Publishes a message of this size with an id of its own.
    async fn acked(&self, bytes: usize) -> anyhow::Result<()> {
        let message = PublishMessage::build()
            .payload(payload(bytes))
            .message_id(format!("{:032x}", rand::random::<u128>()))
            .outbound_message(STREAM);
        service_kit::publish::publish(&self.js, message).await?;
        Ok(())
    }

    async fn publish_batch(&self, updates: usize) -> anyhow::Result<()> {
        let batch = format!("{:016x}", rand::random::<u64>());
        let headers = |place: usize| {
            let mut map = HeaderMap::new();
            map.insert(async_nats::header::NATS_MESSAGE_ID, format!("{:032x}", rand::random::<u128>()));
            map.insert(headers::BATCH_ID, batch.as_str());
            map.insert(headers::BATCH_SEQUENCE, place.to_string());
            map
        };
        for place in 1..updates {
            self.client.publish_with_headers(STREAM, headers(place), payload(UPDATE_BYTES)).await?;
        }
        let mut last = headers(updates);
        last.insert(headers::BATCH_COMMIT, "1");
        let answer = self.client.request_with_headers(STREAM, last, payload(UPDATE_BYTES)).await?;
        let ack: PublishAck = serde_json::from_slice(&answer.payload)
            .with_context(|| format!("no ack of a batch: {}", String::from_utf8_lossy(&answer.payload)))?;
        ensure!(ack.batch_size == Some(updates as u64), "the server did not store the batch as one: {ack:?}");
        Ok(())
    }
}

fn payload(bytes: usize) -> Bytes {
    static ZEROS: [u8; 1 << 18] = [b'0'; 1 << 18];
    Bytes::from_static(&ZEROS[..bytes])
}

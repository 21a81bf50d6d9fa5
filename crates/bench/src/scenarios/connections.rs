//! How rate, latency and CPU depend on the number of clients, with and without a sync before every ack.

use serde_json::json;

use super::{Plan, sync_is_measurable};
use crate::{
    protocol::{Load, Pace},
    report::{Report, Target},
    stack::{Stack, TIMEOUT},
};

pub(crate) const NAME: &str = "connections";
/// Clients, each with one request at a time, and the updates per second to reach with them, synced before every ack.
const CONNECTIONS: [(usize, f64); 4] = [(8, 3_500.0), (32, 7_500.0), (64, 9_000.0), (256, 11_000.0)];
/// The clients with which the rate with JetStream's default, and the CPU, are judged.
const JUDGED: usize = 64;
/// Updates per second to reach with [`JUDGED`] clients and JetStream's default.
const RATE: f64 = 13_000.0;
/// Seconds of CPU per 1000 updates with [`JUDGED`] clients, at most: with JetStream's default, and synced.
const CPU: [f64; 2] = [0.125, 0.16];
/// Updates in flight from POST to webhook.
const WINDOW: usize = 4000;
/// Runs are this many times longer than other scenarios', so that one checkpoint of Postgres does not decide.
const RUN_FACTOR: u32 = 2;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    measure(plan, report, false).await?;
    if sync_is_measurable(NAME, report).await? {
        measure(plan, report, true).await?;
    }
    Ok(())
}

/// Measures the numbers of clients one after the other, in each run.
async fn measure(plan: &Plan, report: &mut Report, sync: bool) -> anyhow::Result<()> {
    let durability = if sync { "synced before every ack" } else { "JetStream's default" };
    let mut stack = Stack::start(sync, 100_000).await?;
    let mut figures = CONNECTIONS.map(|_| [vec![], vec![], vec![]]);
    for _ in plan.runs(&format!("{NAME}, {durability}")) {
        for ((connections, _), [rates, cpu, latencies]) in CONNECTIONS.into_iter().zip(&mut figures) {
            let load = stack.load(plan.duration * RUN_FACTOR);
            let load = Load { connections, pace: Pace::Window(WINDOW), ..load };
            let meter = stack.meter();
            let (posted, received) = stack.post_and_receive(load).await?;
            let (usage, _) = meter.stop();
            stack.wait_until_announced(TIMEOUT).await?;
            let seconds: f64 = usage.iter().filter(|(name, _)| **name != "driver").map(|(_, usage)| usage.cpu).sum();
            rates.push(posted.rate());
            cpu.push(seconds / received.updates as f64 * 1000.0);
            latencies.push(posted.latency.p50);
            let detail = json!({"sync": sync, "connections": connections, "posted": posted, "received": received, "usage": usage});
            report.detail(NAME, detail)?;
        }
    }
    for ((connections, synced_rate), [rates, cpu, latencies]) in CONNECTIONS.into_iter().zip(figures) {
        let is_judged = connections == JUDGED;
        let rate = if sync { Some(synced_rate) } else { is_judged.then_some(RATE) };
        let at = format!("{connections} connections, {durability}");
        report.figure(NAME, &at, "/s", rates, rate.map(Target::AtLeast));
        let at_most = is_judged.then_some(Target::AtMost(CPU[usize::from(sync)]));
        report.figure(NAME, format!("{at}: CPU per 1000 updates, ours + NATS + Postgres"), "s", cpu, at_most);
        report.figure(NAME, format!("{at}: POST to answer, p50"), "ms", latencies, None);
    }
    Ok(())
}

//! How rate, latency and CPU depend on the number of clients, with and without a sync before every ack.

use serde_json::json;

use super::{Plan, sync_is_measurable};
use crate::{
    protocol::{Load, Pace},
    report::Report,
    stack::{Stack, TIMEOUT},
};

pub(crate) const NAME: &str = "connections";
/// Clients, each with one request at a time.
const CONNECTIONS: [usize; 4] = [8, 32, 64, 256];
/// Updates in flight from POST to webhook.
const WINDOW: usize = 4000;
/// Runs are this many times longer than other scenarios', so that one checkpoint of Postgres does not decide.
const RUN_FACTOR: u32 = 3;

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
        for (connections, [rates, cpu, latencies]) in CONNECTIONS.into_iter().zip(&mut figures) {
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
    for (connections, [rates, cpu, latencies]) in CONNECTIONS.into_iter().zip(figures) {
        let at = format!("{connections} connections, {durability}");
        report.figure(NAME, &at, "/s", rates, None);
        report.figure(NAME, format!("{at}: CPU per 1000 updates, ours + NATS + Postgres"), "s", cpu, None);
        report.figure(NAME, format!("{at}: POST to answer, p50"), "ms", latencies, None);
    }
    Ok(())
}

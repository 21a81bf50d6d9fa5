//! End to end: HTTP in, webhook received, everything recorded.

use std::{collections::BTreeMap, time::Instant};

use serde_json::json;

use super::{MemoryUsage, Plan, apply, deliver, gateway, sync_is_measurable};
use crate::{
    protocol::{Load, Pace},
    report::{Report, Target, median},
    stack::{Stack, TIMEOUT},
};

pub(crate) const NAME: &str = "e2e";
pub(crate) const RATIO: &str = "ratio to the floors of gateway, apply and deliver, one after the other";
/// Updates in flight from POST to webhook.
const WINDOW: usize = 4000;
/// Runs are this many times longer than other scenarios', so that growing queues and memory become visible.
const RUN_FACTOR: u32 = 12;
/// With sync only the rate matters, so runs are shorter.
const SYNCED_RUN_FACTOR: u32 = 5;
/// Maximum memory of nats-server, in MiB; growth by up to a tenth of it counts as none.
const NATS_MEMORY: f64 = 200.0;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let default = measure(plan, report, false).await?;
    if sync_is_measurable(NAME, report).await? {
        let synced = measure(plan, report, true).await?;
        report.figure(NAME, "synced before every ack, ratio to JetStream's default", "x", vec![synced / default], None);
    }
    Ok(())
}

/// Measures with or without sync before every ack; returns the rate.
pub(crate) async fn measure(plan: &Plan, report: &mut Report, sync: bool) -> anyhow::Result<f64> {
    let durability = if sync { "synced before every ack" } else { "JetStream's default" };
    let (mut rates, mut cpu, mut latency) = (vec![], vec![], vec![]);
    let mut shares = BTreeMap::<_, Vec<f64>>::new();
    let (mut nats, mut nats_growth, mut postgres) = (vec![], vec![], vec![]);
    let (mut memory, mut written) = (MemoryUsage::default(), [vec![], vec![], vec![]]);
    for _ in plan.runs(&format!("{NAME}, {durability}")) {
        let mut stack = Stack::start(sync, 100_000).await?;
        let before = stack.written_bytes().await?;
        let duration = plan.duration * if sync { SYNCED_RUN_FACTOR } else { RUN_FACTOR };
        let load = Load { connections: 256, pace: Pace::Window(WINDOW), ..stack.load(duration) };
        let (meter, start) = (stack.meter(), Instant::now());
        let (posted, received) = stack.post_and_receive(load).await?;
        let seconds = start.elapsed().as_secs_f64();
        let (usage, _) = meter.stop();
        stack.wait_until_announced(TIMEOUT).await?;
        let recorded = stack.count(deliver::DELIVERED).await? as f64;
        let after = stack.written_bytes().await?;
        let updates = received.updates as f64;
        report.detail(
            NAME,
            json!({"sync": sync, "posted": posted, "received": received, "recorded": recorded, "usage": usage, "seconds": seconds}),
        )?;
        rates.push(updates / seconds);
        latency.push(received.latency.p50);
        let without_driver = usage.iter().filter(|(name, _)| **name != "driver");
        cpu.push(without_driver.clone().map(|(_, usage)| usage.cpu).sum::<f64>() / updates * 1000.0);
        for (name, usage) in without_driver {
            shares.entry(*name).or_default().push(usage.cpu / updates * 1000.0);
        }
        memory.add(&usage);
        nats.push(usage["nats-server"].memory);
        nats_growth.push(usage["nats-server"].growth);
        postgres.push(usage["postgres"].memory);
        for ((written, after), before) in written.iter_mut().zip(after).zip(before) {
            written.push((after - before) / updates);
        }
    }
    let target = Target::AtLeast(if sync { 11_000.0 } else { 13_000.0 });
    let what = format!("HTTP in, webhook received, recorded; {durability}");
    let rate = report.figure(NAME, what, "/s", rates, target);
    if let Some(floor) = combined_floor(report).filter(|_| !sync) {
        report.figure(NAME, RATIO, "x", vec![rate / floor], None);
    }
    let target = Target::AtMost(if sync { 0.16 } else { 0.125 });
    report.figure(NAME, "CPU per 1000 updates, ours + NATS + Postgres", "s", cpu, target);
    for (name, share) in shares {
        report.figure(NAME, format!("  {name}"), "s", share, None);
    }
    report.figure(NAME, format!("POST to webhook p50 with {WINDOW} on their way"), "ms", latency, None);
    memory.report(NAME, report);
    report.figure(NAME, "memory of nats-server", "MiB", nats, Target::AtMost(NATS_MEMORY));
    let what = "memory of nats-server, growth from the second quarter to the last";
    report.figure(NAME, what, "MiB", nats_growth, Target::AtMost(NATS_MEMORY / 10.0));
    report.figure(NAME, "memory of postgres", "MiB", postgres, None);
    for (what, written) in ["of Postgres' write-ahead log", "of the command log", "of the events"].iter().zip(written) {
        report.figure(NAME, format!("bytes {what} per update"), "B", vec![median(&written)], None);
    }
    Ok(rate)
}

/// The rate at which the three floors would process updates one after the other on shared cores; `None` unless all
/// three were measured.
fn combined_floor(report: &Report) -> Option<f64> {
    let floors = [(gateway::NAME, gateway::FLOOR), (apply::NAME, apply::FLOOR), (deliver::NAME, deliver::FLOOR)];
    let seconds = floors.iter().map(|(scenario, what)| Some(1.0 / report.median(scenario, what)?));
    Some(1.0 / seconds.sum::<Option<f64>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_combines_the_floors_of_all_three_services() {
        let mut report = Report::default();
        report.figure(gateway::NAME, gateway::FLOOR, "/s", vec![40_000.0], None);
        report.figure(apply::NAME, apply::FLOOR, "/s", vec![40_000.0], None);
        assert_eq!(combined_floor(&report), None);
        report.figure(deliver::NAME, deliver::FLOOR, "/s", vec![20_000.0], None);
        assert_eq!(combined_floor(&report).map(f64::round), Some(10_000.0));
    }
}

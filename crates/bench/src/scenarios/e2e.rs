//! End to end: HTTP in, webhook received, everything recorded.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{Memory, Plan, apply, deliver, gateway};
use crate::{
    load::{Load, Pace},
    report::{Report, Target, median},
    stack::Stack,
};

pub(crate) const NAME: &str = "e2e";
pub(crate) const RATIO: &str = "ratio to the floors of gateway, apply and deliver, one after the other";
/// How many updates are between a client and its webhook.
const WINDOW: usize = 4000;
/// How many times longer than other scenarios a run is: whatever builds up is to be seen.
const TIMES: u32 = 15;
/// The same where the server syncs: what builds up is the same, so half as long is enough to know the price.
const TIMES_SYNCED: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let default = one(plan, report, false).await?;
    if !crate::stack::nats_syncs().await? {
        report.unmeasured("e2e, synced before every ack: this nats-server cannot, 2.10 or later can");
        return Ok(());
    }
    let synced = one(plan, report, true).await?;
    report.figure(NAME, "synced before every ack, ratio to JetStream's default", "x", vec![synced / default], None);
    Ok(())
}

/// Measures with or without a sync before every ack; returns the rate.
pub(crate) async fn one(plan: &Plan, report: &mut Report, sync: bool) -> anyhow::Result<f64> {
    let how = if sync { "synced before every ack" } else { "JetStream's default" };
    let (mut rates, mut cpu, mut latency) = (vec![], vec![], vec![]);
    let (mut shares, mut servers) = (BTreeMap::<_, Vec<f64>>::new(), BTreeMap::<_, Vec<f64>>::new());
    let (mut memory, mut written) = (Memory::default(), [vec![], vec![], vec![]]);
    for _ in plan.runs(&format!("{NAME}, {how}")) {
        let mut stack = Stack::start(sync, 100_000).await?;
        let before = stack.written().await?;
        let (meter, begun) = (stack.meter(), Instant::now());
        let lasting = plan.lasting * if sync { TIMES_SYNCED } else { TIMES };
        let load = Load { connections: 256, pace: Pace::Window(WINDOW), ..stack.load(lasting) };
        let posted = stack.driver.post(load).await?;
        let received = stack.driver.received(posted.accepted, PATIENCE).await?;
        let took = begun.elapsed().as_secs_f64();
        let (taken, _) = meter.stop();
        stack.settled(PATIENCE).await?;
        let recorded = stack.count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'").await? as f64;
        let after = stack.written().await?;
        let updates = received.updates as f64;
        report.detail(
            NAME,
            json!({"sync": sync, "posted": posted, "received": received, "recorded": recorded, "taken": taken, "seconds": took}),
        )?;
        rates.push(updates / took);
        latency.push(received.latency.p50);
        let ours = taken.iter().filter(|(name, _)| **name != "driver");
        cpu.push(ours.clone().map(|(_, taken)| taken.cpu).sum::<f64>() / updates * 1000.0);
        for (name, taken) in ours {
            shares.entry(*name).or_default().push(taken.cpu / updates * 1000.0);
        }
        memory.note(&taken);
        for server in ["nats-server", "postgres"] {
            servers.entry(server).or_default().push(taken[server].memory);
        }
        for (place, written) in written.iter_mut().enumerate() {
            written.push((after[place] - before[place]) / updates);
        }
    }
    let least = if sync { 8_000.0 } else { 10_000.0 };
    let what = format!("HTTP in, webhook received, recorded; {how}");
    let rate = report.figure(NAME, what, "/s", rates, Target::AtLeast(least));
    if let Some(floor) = floor(report).filter(|_| !sync) {
        report.figure(NAME, RATIO, "x", vec![rate / floor], None);
    }
    let most = (!sync).then_some(Target::AtMost(0.20));
    report.figure(NAME, "CPU per 1000 updates, ours + NATS + Postgres", "s", cpu, most);
    for (name, share) in shares {
        report.figure(NAME, format!("  {name}"), "s", share, None);
    }
    report.figure(NAME, format!("POST to webhook p50 with {WINDOW} on their way"), "ms", latency, None);
    memory.tell(NAME, report);
    for (server, memory) in servers {
        report.figure(NAME, format!("memory of {server}"), "MiB", memory, None);
    }
    for (what, written) in ["of Postgres' write-ahead log", "of the command log", "of the events"].iter().zip(written) {
        report.figure(NAME, format!("bytes {what} per update"), "B", vec![median(&written)], None);
    }
    Ok(rate)
}

/// What the floors would do if each update went through one after the other, on the cores that they share: none of them
/// leaves another anything. Only where all three were taken.
fn floor(report: &Report) -> Option<f64> {
    let floors = [(gateway::NAME, gateway::FLOOR), (apply::NAME, apply::FLOOR), (deliver::NAME, deliver::FLOOR)];
    let seconds = floors.iter().map(|(scenario, what)| Some(1.0 / report.median(scenario, what)?));
    Some(1.0 / seconds.sum::<Option<f64>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_of_all_three() {
        let mut report = Report::default();
        report.figure(gateway::NAME, gateway::FLOOR, "/s", vec![40_000.0], None);
        report.figure(apply::NAME, apply::FLOOR, "/s", vec![40_000.0], None);
        assert_eq!(floor(&report), None);
        report.figure(deliver::NAME, deliver::FLOOR, "/s", vec![20_000.0], None);
        assert_eq!(floor(&report).map(f64::round), Some(10_000.0));
    }
}

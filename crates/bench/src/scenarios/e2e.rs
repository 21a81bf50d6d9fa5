//! End to end: HTTP in, webhook received, everything recorded.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Plan;
use crate::{
    load::{Load, Pace},
    report::{Report, Target, median},
    stack::Stack,
};

const NAME: &str = "e2e";
/// How many updates are between a client and its webhook.
const WINDOW: usize = 2000;
/// How many times longer than other scenarios a run is: whatever builds up is to be seen.
const TIMES: u32 = 6;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    for sync in [false, true] {
        let how = if sync { "synced before every ack" } else { "JetStream's default" };
        if sync && !crate::stack::nats_syncs().await? {
            println!("  this nats-server cannot sync before it acks: 2.10 or later can");
            continue;
        }
        one(plan, report, sync, how).await?;
    }
    Ok(())
}

async fn one(plan: &Plan, report: &mut Report, sync: bool, how: &str) -> anyhow::Result<()> {
    let (mut rates, mut cpu, mut latency) = (vec![], vec![], vec![]);
    let mut shares = std::collections::BTreeMap::<_, Vec<f64>>::new();
    let (mut memory, mut written) = (vec![], [vec![], vec![], vec![]]);
    for _ in 0..plan.runs {
        let mut stack = Stack::start(sync, 100_000).await?;
        let before = stack.written().await?;
        let (meter, begun) = (stack.meter(), Instant::now());
        let load = Load { pace: Pace::Window(WINDOW), ..stack.load(plan.lasting * TIMES) };
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
        let services = ["gateway", "lead-state", "webhook-notifier"];
        memory.push(services.iter().map(|name| taken[name].memory).fold(0.0, f64::max));
        for (place, written) in written.iter_mut().enumerate() {
            written.push((after[place] - before[place]) / updates);
        }
    }
    let least = if sync { 8_000.0 } else { 10_000.0 };
    report.figure(NAME, format!("HTTP in, webhook received, recorded; {how}"), "/s", rates, Target::AtLeast(least));
    let most = (!sync).then_some(Target::AtMost(0.20));
    report.figure(NAME, "CPU per 1000 updates, ours + NATS + Postgres", "s", cpu, most);
    for (name, share) in shares {
        report.figure(NAME, format!("  {name}"), "s", share, None);
    }
    report.figure(NAME, format!("POST to webhook p50 with {WINDOW} on their way"), "ms", latency, None);
    report.figure(NAME, "memory of the largest service", "MiB", memory, Target::AtMost(64.0));
    for (what, written) in ["of Postgres' write-ahead log", "of the command log", "of the events"].iter().zip(written) {
        report.figure(NAME, format!("bytes {what} per update"), "B", vec![median(&written)], None);
    }
    Ok(())
}

//! Two installations on one machine, each with half of the projects, against one with all of them: what it costs to
//! spread projects over cells (docs/SCALING.md), and that a cell which hangs does not delay the other.

use std::time::Duration;

use serde_json::json;

use super::{MODERATE_RATE, Plan};
use crate::{
    meter::Usages,
    protocol::{Load, Pace, Posted, Received},
    report::Report,
    stack::{Stack, TIMEOUT},
};

pub(crate) const NAME: &str = "cells";
/// Clients in all, each with one request at a time.
const CONNECTIONS: usize = 64;
/// Updates in flight from POST to webhook, in all.
const WINDOW: usize = 4000;
/// Runs are this many times longer than other scenarios', so that one checkpoint of Postgres does not decide.
const RUN_FACTOR: u32 = 3;

type Measured = (Posted, Received, Usages);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (mut one, mut other) = tokio::try_join!(Stack::start(false, 100_000), Stack::start(false, 100_000))?;
    let duration = plan.duration * RUN_FACTOR;
    let (mut one_cell, mut two_cells) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in plan.runs(NAME) {
        let alone = measure(&mut one, CONNECTIONS, Pace::Window(WINDOW), duration).await?;
        let half = Pace::Window(WINDOW / 2);
        let (first, second) = tokio::try_join!(
            measure(&mut one, CONNECTIONS / 2, half, duration),
            measure(&mut other, CONNECTIONS / 2, half, duration)
        )?;
        add_rate(&mut one_cell, report, &[alone])?;
        add_rate(&mut two_cells, report, &[first, second])?;
    }
    let mut medians = Vec::new();
    for (name, [rates, cpu]) in [("one cell", one_cell), ("two cells", two_cells)] {
        medians.push(report.figure(NAME, format!("{name}, {CONNECTIONS} clients in all"), "/s", rates, None));
        report.figure(NAME, format!("{name}: CPU per 1000 updates, ours + NATS + Postgres"), "s", cpu, None);
    }
    report.figure(NAME, "two cells, ratio to one", "x", vec![medians[1] / medians[0]], None);
    isolation(plan, report, &mut one, &mut other).await
}

/// The latency of one cell while the other works, and while the other's lead-state and webhook-notifier hang.
async fn isolation(plan: &Plan, report: &mut Report, one: &mut Stack, other: &mut Stack) -> anyhow::Result<()> {
    let pace = Pace::Rate(MODERATE_RATE / 2);
    let (mut beside, mut hanging) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in plan.runs(&format!("{NAME}, one of which hangs")) {
        let (first, _) = tokio::try_join!(
            measure(one, CONNECTIONS, pace, plan.duration),
            measure(other, CONNECTIONS, pace, plan.duration)
        )?;
        add_latency(&mut beside, &first.1);
        other.lead_state.freeze();
        other.notifier.freeze();
        // The other cell's updates wait in its log until its services go on.
        let load = Load { pace, ..other.load(plan.duration) };
        let (first, posted) =
            tokio::try_join!(measure(one, CONNECTIONS, pace, plan.duration), other.driver.post(load))?;
        other.notifier.thaw();
        other.lead_state.thaw();
        other.driver.received(posted.expected, TIMEOUT).await?;
        other.wait_until_announced(TIMEOUT).await?;
        add_latency(&mut hanging, &first.1);
    }
    let rate = MODERATE_RATE / 2;
    for (beside_what, [p50, p99]) in [("beside a cell that works", beside), ("beside a cell that hangs", hanging)] {
        report.figure(NAME, format!("{rate}/s {beside_what}: POST to webhook, p50"), "ms", p50, None);
        report.figure(NAME, format!("{rate}/s {beside_what}: POST to webhook, p99"), "ms", p99, None);
    }
    Ok(())
}

fn add_latency([p50, p99]: &mut [Vec<f64>; 2], received: &Received) {
    p50.push(received.latency.p50);
    p99.push(received.latency.p99);
}

/// Posts to a cell and waits until all updates are delivered and announced.
async fn measure(stack: &mut Stack, connections: usize, pace: Pace, duration: Duration) -> anyhow::Result<Measured> {
    let load = Load { connections, pace, ..stack.load(duration) };
    let meter = stack.meter();
    let (posted, received) = stack.post_and_receive(load).await?;
    let (usage, _) = meter.stop();
    stack.wait_until_announced(TIMEOUT).await?;
    Ok((posted, received, usage))
}

/// Adds the rate of all cells together, and the CPU time of their services and servers per 1000 updates.
fn add_rate([rates, cpu]: &mut [Vec<f64>; 2], report: &mut Report, cells: &[Measured]) -> anyhow::Result<()> {
    let servers = cells.iter().flat_map(|(.., usage)| usage).filter(|(name, _)| **name != "driver");
    let updates: u64 = cells.iter().map(|(_, received, _)| received.updates).sum();
    cpu.push(servers.map(|(_, usage)| usage.cpu).sum::<f64>() / updates as f64 * 1000.0);
    rates.push(cells.iter().map(|(posted, ..)| posted.rate()).sum());
    let detail = |(posted, received, usage): &Measured| json!({"posted": posted, "received": received, "usage": usage});
    report.detail(NAME, json!({"cells": cells.iter().map(detail).collect::<Vec<_>>()}))
}

//! Updates accepted per second on 64 connections, each with one request at a time.

use std::{net::SocketAddr, time::Duration};

use serde_json::json;
use test_support::free_port;

use super::{MemoryUsage, Plan, start_floor};
use crate::{
    protocol::Load,
    report::{Report, Target},
    stack::Stack,
};

pub(crate) const NAME: &str = "gateway";
pub(crate) const FLOOR: &str = "floor: hyper, parses and publishes";
pub(crate) const RATIO: &str = "accepted, ratio to the floor";

/// Longer than the time after which a gateway considers a lead-state without progress stalled.
const OUTAGE_NOTICED: Duration = Duration::from_secs(3);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    stack.lead_state.terminate().await;
    stack.notifier.terminate().await;
    // The gateway bounds unapplied work until it finds that nothing is applied.
    stack.driver.post(stack.load(OUTAGE_NOTICED)).await?;
    let (mut ours, mut floors, mut cpu, mut memory) = (vec![], vec![], vec![], MemoryUsage::default());
    for run in plan.runs(NAME) {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let arguments = ["gateway", &stack.nats.url(), &address.to_string(), &format!("floor{run}")];
        let mut server = start_floor(&arguments, address).await?;
        let floor = stack.driver.post(Load { gateway: address, ..stack.load(plan.duration) }).await?;
        server.kill().await?;

        let meter = stack.meter();
        let posted = stack.driver.post(stack.load(plan.duration)).await?;
        let (usage, seconds) = meter.stop();
        report.detail(NAME, json!({"floor": floor, "posted": posted, "usage": usage, "seconds": seconds}))?;
        ours.push(posted.rate());
        floors.push(floor.rate());
        memory.add(&usage);
        cpu.push(usage["gateway"].cpu / posted.accepted as f64 * 1000.0);
    }
    report.comparison(NAME, "/s", (FLOOR, floors), ("accepted", ours), (RATIO, Target::AtLeast(0.8)));
    report.figure(NAME, "CPU of the gateway per 1000", "s", cpu, None);
    memory.report(NAME, report);
    Ok(())
}

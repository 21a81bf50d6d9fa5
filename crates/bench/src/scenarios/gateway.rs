//! 1 Accept: updates accepted in a second, 64 connections, a request at a time on each.

use std::net::SocketAddr;

use serde_json::json;
use test_support::free_port;

use super::{Memory, Plan, serving_floor};
use crate::{
    load::Load,
    report::{Report, Target},
    stack::Stack,
};

pub(crate) const NAME: &str = "gateway";
pub(crate) const FLOOR: &str = "floor: hyper, parses and publishes";
pub(crate) const RATIO: &str = "accepted, ratio to the floor";

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    stack.lead_state.terminate().await;
    stack.notifier.terminate().await;
    let (mut ours, mut floors, mut ratios, mut cpu) = (vec![], vec![], vec![], vec![]);
    let mut memory = Memory::default();
    for run in plan.runs(NAME) {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let arguments = ["gateway", &stack.nats.url(), &address.to_string(), &format!("floor{run}")].map(str::to_owned);
        let mut server = serving_floor(&arguments, address).await?;
        let floor = stack.driver.post(Load { to: address, ..stack.load(plan.lasting) }).await?;
        server.kill().await?;

        let meter = stack.meter();
        let posted = stack.driver.post(stack.load(plan.lasting)).await?;
        let (taken, seconds) = meter.stop();
        report.detail(NAME, json!({"floor": floor, "posted": posted, "taken": taken, "seconds": seconds}))?;
        ours.push(posted.rate());
        floors.push(floor.rate());
        ratios.push(posted.rate() / floor.rate());
        memory.note(&taken);
        cpu.push(taken["gateway"].cpu / posted.accepted as f64 * 1000.0);
    }
    report.figure(NAME, FLOOR, "/s", floors, None);
    report.figure(NAME, "accepted", "/s", ours, None);
    report.figure(NAME, RATIO, "x", ratios, Target::AtLeast(0.85));
    report.figure(NAME, "CPU of the gateway per 1000", "s", cpu, None);
    memory.tell(NAME, report);
    Ok(())
}

//! 500 callbacks on their own hosts, a tenth of which accept requests and never answer.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use serde_json::json;

use super::{LATENCY_RUN_FACTOR, MODERATE_RATE, MemoryUsage, Plan};
use crate::{
    protocol::{Load, Pace},
    report::{Report, Target},
    stack::{Stack, apply_process, insert_leads},
};

const NAME: &str = "hosts";
/// Processes, each with a callback on its own host.
const HOSTS: u16 = 500;
/// Hosts that never answer.
const HANGING: u16 = HOSTS / 10;
const LEADS: u64 = 100_000;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (mut healthy, _) = start_with_hosts().await?;
    let (mut degraded, endpoints) = start_with_hosts().await?;
    // Not earlier, so that the measurement includes the time in which the notifier detects the hanging hosts.
    degraded.driver.hang(endpoints[..usize::from(HANGING)].to_vec()).await?;
    let (mut none, mut some, mut memory) = (vec![], vec![], MemoryUsage::default());
    for _ in plan.runs(NAME) {
        none.push(measure(&mut healthy, plan, report, &mut memory, "none hangs").await?);
        some.push(measure(&mut degraded, plan, report, &mut memory, "a tenth hangs").await?);
    }
    let what = |how| format!("{HOSTS} callbacks at {MODERATE_RATE}/s, {how}: POST to a healthy one's webhook, p99");
    let ratio = ("healthy ones' p99, a tenth hanging, ratio to none", Target::AtMost(1.5));
    report.comparison(NAME, "ms", (what("none hangs"), none), (what("a tenth hangs"), some), ratio);
    memory.report(NAME, report);
    Ok(())
}

/// A stack with a callback on each host, and the addresses of the hosts.
async fn start_with_hosts() -> anyhow::Result<(Stack, Vec<SocketAddr>)> {
    // The one lead belongs to none of the hosts; its webhooks show that the services are ready.
    let mut stack = Stack::start(false, 1).await?;
    let endpoints = stack.driver.listen_on((0..HOSTS).map(host_address).collect()).await?;
    let mut processes = Vec::new();
    for (number, endpoint) in endpoints.iter().enumerate() {
        let callbacks = json!([{"name": "crm", "url": format!("http://{endpoint}/")}]);
        let applied = apply_process(&stack.client, stack.project_id, &format!("host-{number}"), callbacks).await?;
        processes.push(applied.process.process_id.context("the applied process has no id")?);
    }
    insert_leads(&stack.pool, stack.project_id, &processes, 1..LEADS).await?;
    stack.leads = LEADS;
    // Opens connections and plans statements.
    stack.post_and_receive(load(&stack, Duration::from_secs(2))).await?;
    Ok((stack, endpoints))
}

/// The loopback address of a host; the system chooses the port.
fn host_address(number: u16) -> SocketAddr {
    let [high, low] = (256 + number).to_be_bytes();
    (Ipv4Addr::new(127, 0, high, low), 0).into()
}

/// Updates to the leads of all hosts; webhooks are expected from healthy hosts only.
fn load(stack: &Stack, duration: Duration) -> Load {
    let ignored_leads = Some((HANGING.into(), HOSTS.into()));
    Load { pace: Pace::Rate(MODERATE_RATE), ignored_leads, ..stack.load(duration) }
}

/// Returns the p99 of the healthy hosts in a run.
async fn measure(
    stack: &mut Stack,
    plan: &Plan,
    report: &mut Report,
    memory: &mut MemoryUsage,
    what: &str,
) -> anyhow::Result<f64> {
    let meter = stack.meter();
    let (posted, received) = stack.post_and_receive_all(load(stack, plan.duration * LATENCY_RUN_FACTOR)).await?;
    let (usage, _) = meter.stop();
    report.detail(NAME, json!({"hanging": what, "posted": posted, "received": received, "usage": usage}))?;
    memory.add(&usage);
    Ok(received.latency.p99)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_has_its_own_address() {
        let hosts: std::collections::HashSet<_> = (0..HOSTS).map(host_address).collect();
        assert_eq!(hosts.len(), 500);
        assert!(hosts.contains(&"127.0.1.0:0".parse().expect("an address")));
        assert!(hosts.iter().all(|host| host.ip().is_loopback() && host.ip() != Ipv4Addr::LOCALHOST));
    }
}

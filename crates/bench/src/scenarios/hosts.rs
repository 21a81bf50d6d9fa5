//! Five hundred callbacks on hosts of their own, a tenth of which take requests and never answer.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::json;

use super::{CALM, LONGER, Memory, Plan};
use crate::{
    load::{Load, Pace},
    report::{Report, Target, ratios},
    stack::{Stack, apply, insert_leads},
};

const NAME: &str = "hosts";
/// Processes, each with a callback on a host of its own.
const HOSTS: u16 = 500;
/// How many of them hang.
const HANGING: u16 = HOSTS / 10;
const LEADS: u64 = 100_000;
/// How long webhooks may take that are measured.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (mut well, _) = hosts().await?;
    let (mut ill, endpoints) = hosts().await?;
    // That a tenth begins to hang is measured from the beginning.
    ill.driver.hang(endpoints[..usize::from(HANGING)].to_vec()).await?;
    let (mut none, mut some) = (Vec::new(), Vec::new());
    let mut memory = Memory::default();
    for _ in plan.runs(NAME) {
        none.push(p99(&mut well, plan, report, &mut memory, "none hangs").await?);
        some.push(p99(&mut ill, plan, report, &mut memory, "a tenth hangs").await?);
    }
    let ratios = ratios(&some, &none);
    let what = |how| format!("{HOSTS} callbacks at {CALM}/s, {how}: POST to a healthy one's webhook, p99");
    report.figure(NAME, what("none hangs"), "ms", none, None);
    report.figure(NAME, what("a tenth hangs"), "ms", some, None);
    report.figure(NAME, "healthy ones' p99, a tenth hanging, ratio to none", "x", ratios, Target::AtMost(1.5));
    memory.tell(NAME, report);
    Ok(())
}

/// A stack with a callback on each host, and where these listen.
async fn hosts() -> anyhow::Result<(Stack, Vec<SocketAddr>)> {
    // With a lead that is of none of the hosts: its webhooks show that all is up.
    let mut stack = Stack::start(false, 1).await?;
    let endpoints = stack.driver.listen_on((0..HOSTS).map(host).collect()).await?;
    let mut processes = Vec::new();
    for (number, endpoint) in endpoints.iter().enumerate() {
        let callbacks = json!([{"name": "crm", "url": format!("http://{endpoint}/")}]);
        let applied = apply(&stack.client, stack.project_id, &format!("host-{number}"), callbacks).await?;
        processes.push(applied.process.process_id.context("a process without an id")?);
    }
    insert_leads(&stack.pool, stack.project_id, &processes, 1..LEADS).await?;
    stack.leads = LEADS;
    // Connections are made and statements planned once.
    let posted = stack.driver.post(load(&stack, Duration::from_secs(2))).await?;
    stack.driver.received(posted.expected, PATIENCE).await?;
    Ok((stack, endpoints))
}

/// An address of this machine that no other of them has; the system chooses the port.
fn host(number: u16) -> SocketAddr {
    let [high, low] = (256 + number).to_be_bytes();
    (Ipv4Addr::new(127, 0, high, low), 0).into()
}

/// Updates to the leads of all hosts; webhooks are waited for of those hosts that never hang.
fn load(stack: &Stack, lasting: Duration) -> Load {
    let unheard = Some((HANGING.into(), HOSTS.into()));
    Load { pace: Pace::Rate(CALM), unheard, ..stack.load(lasting) }
}

/// The p99 of a run, of those hosts that never hang.
async fn p99(
    stack: &mut Stack,
    plan: &Plan,
    report: &mut Report,
    memory: &mut Memory,
    what: &str,
) -> anyhow::Result<f64> {
    stack.driver.reset().await?;
    let meter = stack.meter();
    let posted = stack.driver.post(load(stack, plan.lasting * LONGER)).await?;
    let received = stack.driver.received(posted.expected, PATIENCE).await?;
    let (taken, _) = meter.stop();
    ensure!(received.updates == posted.expected, "{received:?} of {posted:?}");
    report.detail(NAME, json!({"hanging": what, "posted": posted, "received": received, "taken": taken}))?;
    memory.note(&taken);
    Ok(received.latency.p99)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_addresses_of_their_own() {
        let hosts: std::collections::HashSet<_> = (0..HOSTS).map(host).collect();
        assert_eq!(hosts.len(), 500);
        assert!(hosts.contains(&"127.0.1.0:0".parse().expect("an address")));
        assert!(hosts.iter().all(|host| host.ip().is_loopback() && host.ip() != Ipv4Addr::LOCALHOST));
    }
}

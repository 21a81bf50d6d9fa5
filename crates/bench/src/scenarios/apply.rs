//! Updates applied per second from a full log, to 100 000 leads.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_nats::jetstream::message::OutboundMessage;
use contract::streams::{LEAD_COMMANDS, LEAD_EVENTS};
use serde_json::json;
use service_kit::publisher::Publisher;
use tokio::process::Command;

use super::{MemoryUsage, Plan, run_floor};
use crate::{
    load::{random_lead, update_body},
    meter::Usages,
    report::{Report, Target, ratios},
    stack::Stack,
};

pub(crate) const NAME: &str = "apply";
pub(crate) const FLOOR: &str = "floor: the statements, 500 updates a transaction";
pub(crate) const RATIO: &str = "applied, ratio to the floor of the statements";
pub(crate) const TO_SINGLE: &str = "applied, ratio to a transaction per update";
/// Says how this machine compares with the one that absolute targets were set on.
const SPEED: &str = "speed of this machine by pgbench, ratio to the one that rates and times were set on";
/// Transactions per second on that machine: 6 500 to 7 500.
const PGBENCH_REFERENCE: f64 = 7_000.0;
const LEADS: u64 = 100_000;
/// Commands in the log per second of a run; more than lead-state applies.
const MAX_RATE: u64 = 40_000;
/// For a million updates.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, LEADS).await?;
    stack.notifier.terminate().await;
    let (mut ours, mut floors, mut reads, mut singles, mut pgbenches) = (vec![], vec![], vec![], vec![], vec![]);
    let mut memory = MemoryUsage::default();
    let seconds = plan.duration.as_secs();
    let half = seconds.div_ceil(2).to_string();
    for _ in plan.runs(NAME) {
        stack.wait_until_announced(Duration::from_secs(120)).await?;
        stack.lead_state.terminate().await;
        fill_log(&stack, seconds * MAX_RATE).await?;
        reads.push(run_floor(&["read", &stack.nats.url(), LEAD_COMMANDS]).await?);
        let (postgres, leads) = (stack.postgres.url(), LEADS.to_string());
        floors.push(run_floor(&["apply", &postgres, &leads, &seconds.to_string()]).await?);
        singles.push(run_floor(&["one-by-one", &postgres, &leads, &half]).await?);
        pgbenches.push(pgbench(&stack, &half).await?);

        stack.restart(|stack| &mut stack.lead_state).await;
        let meter = stack.meter();
        let (before, written) = (stack.checkpoint().await?, stack.written_bytes().await?);
        let start = Instant::now();
        tokio::time::sleep(plan.duration).await;
        let after = stack.checkpoint().await?;
        let seconds = start.elapsed().as_secs_f64();
        let (usage, _) = meter.stop();
        let (_, last) = stack.stream_state(LEAD_COMMANDS).await?;
        ensure!(after.0 < last, "lead-state applied the whole log before the end of the run; raise MAX_RATE");
        let (applied, announced) = ((after.0 - before.0) as f64, after.1 - before.1);
        let wal = (stack.written_bytes().await?[0] - written[0]) / applied;
        let detail =
            json!({"applied": applied, "announced": announced, "seconds": seconds, "usage": usage, "wal": wal});
        report.detail(NAME, detail)?;
        ours.push(applied / seconds);
        memory.add(&usage);
    }
    let [to_floor, to_single, to_pgbench] = [&floors, &singles, &pgbenches].map(|baseline| ratios(&ours, baseline));
    report.figure(NAME, "floor: reading the log", "/s", reads, None);
    report.figure(NAME, FLOOR, "/s", floors, None);
    report.figure(NAME, "for comparison: a transaction per update, 16 connections", "/s", singles, None);
    report.figure(NAME, SPEED, "x", pgbenches.iter().map(|rate| rate / PGBENCH_REFERENCE).collect(), None);
    report.figure(NAME, "for comparison: pgbench simple-update, 16 connections", "/s", pgbenches, None);
    report.figure(NAME, "applied and announced", "/s", ours, None);
    report.figure(NAME, RATIO, "x", to_floor, Target::AtLeast(0.8));
    report.figure(NAME, TO_SINGLE, "x", to_single, Target::AtLeast(6.0));
    report.figure(NAME, "applied, ratio to pgbench simple-update", "x", to_pgbench, Target::AtLeast(5.3));
    memory.report(NAME, report);
    Ok(())
}

/// Publishes commands to the log, as internal producers do.
pub(crate) async fn fill_log(stack: &Stack, count: u64) -> anyhow::Result<()> {
    let js = service_kit::nats::jetstream(&stack.client);
    let subject = format!("leads.cmd.{}.update", stack.project_id);
    let commands = (0..count).map(|tag| OutboundMessage {
        subject: subject.clone().into(),
        headers: None,
        payload: update_body(random_lead(stack.leads), tag).into(),
    });
    Publisher::new(js).publish_all(commands).await?;
    Ok(())
}

/// The result of [`fill_and_drain`].
pub(crate) struct Drained {
    /// Updates applied per second.
    pub(crate) rate: f64,
    pub(crate) usage: Usages,
}

/// Publishes commands while lead-state is stopped, then measures until all of them are applied and announced.
pub(crate) async fn fill_and_drain(stack: &mut Stack, count: u64) -> anyhow::Result<Drained> {
    stack.lead_state.terminate().await;
    // The notifier is stopped, so events of earlier runs would fill their stream. Without the last one lead-state would
    // detect a loss of events and announce all of them again.
    service_kit::nats::jetstream(&stack.client).get_stream(LEAD_EVENTS).await?.purge().keep(1).await?;
    fill_log(stack, count).await?;
    // Otherwise Postgres would flush the pages of earlier runs during this one.
    sqlx::query("CHECKPOINT").execute(&stack.pool).await?;
    stack.restart(|stack| &mut stack.lead_state).await;
    let meter = stack.meter();
    let (before, start) = (stack.checkpoint().await?, Instant::now());
    stack.wait_until_announced(DRAIN_TIMEOUT).await?;
    let (after, seconds) = (stack.checkpoint().await?, start.elapsed().as_secs_f64());
    let (usage, _) = meter.stop();
    Ok(Drained { rate: (after.0 - before.0) as f64 / seconds, usage })
}

/// Transactions per second of Postgres' own benchmark on the same cluster, in a separate database.
async fn pgbench(stack: &Stack, seconds: &str) -> anyhow::Result<f64> {
    sqlx::query("DROP DATABASE IF EXISTS pgbench").execute(&stack.pool).await?;
    sqlx::query("CREATE DATABASE pgbench").execute(&stack.pool).await?;
    let url = stack.postgres.url();
    let url = format!("{}/pgbench", url.rsplit_once('/').map_or(url.as_str(), |(server, _)| server));
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(stack.postgres.program("pgbench"));
        let output = command.args(arguments).arg(&url).output().await.context("cannot run pgbench")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(text)
    };
    run(&["--initialize", "--scale=10", "--quiet"]).await?;
    let text =
        run(&["--builtin=simple-update", "--client=16", "--jobs=2", "--protocol=prepared", "--time", seconds]).await?;
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")).and_then(|rest| rest.split(' ').next());
    rate.context("pgbench printed no rate")?.parse().context("pgbench printed an invalid rate")
}

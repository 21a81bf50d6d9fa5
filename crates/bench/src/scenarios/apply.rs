//! 3–6: updates applied in a second from a full log, to 100 000 leads, a tenth of them in nine of ten updates.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use async_nats::jetstream::message::OutboundMessage;
use contract::streams::{LEAD_COMMANDS, LEAD_EVENTS};
use serde_json::json;
use service_kit::publisher::Publisher;
use tokio::process::Command;

use super::{Memory, Plan, floor};
use crate::{
    load::{any_lead, body},
    meter::Taken,
    report::{Report, Target, ratios},
    stack::Stack,
};

pub(crate) const NAME: &str = "apply";
pub(crate) const FLOOR: &str = "floor: the statements, 500 updates a transaction";
pub(crate) const RATIO: &str = "applied, ratio to the floor of the statements";
pub(crate) const TO_SINGLE: &str = "applied, ratio to a transaction per update";
/// How this machine compares, for whoever reads targets that are rates or times.
const SPEED: &str = "speed of this machine by pgbench, ratio to the one that rates and times were set on";
/// What that one did a second: 6 500 to 7 500.
const PGBENCH: f64 = 7_000.0;
const LEADS: u64 = 100_000;
/// Updates a second to have in the log, so that it does not run empty.
const AT_MOST: u64 = 40_000;
/// How long a million updates may take.
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, LEADS).await?;
    stack.notifier.terminate().await;
    let (mut ours, mut floors, mut reads, mut singles, mut pgbenches) = (vec![], vec![], vec![], vec![], vec![]);
    let mut memory = Memory::default();
    let seconds = plan.lasting.as_secs();
    let half = plan.lasting.as_secs().div_ceil(2).to_string();
    for _ in plan.runs(NAME) {
        stack.settled(Duration::from_secs(120)).await?;
        stack.lead_state.terminate().await;
        fill_log(&stack, seconds * AT_MOST).await?;
        reads.push(floor(&["read", &stack.nats.url(), LEAD_COMMANDS].map(str::to_owned)).await?);
        let postgres = stack.postgres.url();
        let arguments = |kind: &str, seconds: &str| [kind, &postgres, &LEADS.to_string(), seconds].map(str::to_owned);
        floors.push(floor(&arguments("apply", &seconds.to_string())).await?);
        singles.push(floor(&arguments("one-by-one", &half)).await?);
        pgbenches.push(pgbench(&stack, &half).await?);

        stack.restart(|stack| &mut stack.lead_state).await;
        let meter = stack.meter();
        let (before, written) = (stack.checkpoint().await?, stack.written().await?);
        let begun = Instant::now();
        tokio::time::sleep(plan.lasting).await;
        let after = stack.checkpoint().await?;
        let took = begun.elapsed().as_secs_f64();
        let (taken, _) = meter.stop();
        let (_, last) = stack.stream(LEAD_COMMANDS).await?;
        ensure!(after.0 < last, "the log ran empty");
        let applied = (after.0 - before.0) as f64;
        let wal = (stack.written().await?[0] - written[0]) / applied;
        report.detail(
            NAME,
            json!({"applied": applied, "announced": after.1 - before.1, "seconds": took, "taken": taken, "wal": wal}),
        )?;
        ours.push(applied / took);
        memory.note(&taken);
    }
    let (to_floor, to_single, to_pgbench) =
        (ratios(&ours, &floors), ratios(&ours, &singles), ratios(&ours, &pgbenches));
    report.figure(NAME, "floor: reading the log", "/s", reads, None);
    report.figure(NAME, FLOOR, "/s", floors, None);
    report.figure(NAME, "for comparison: a transaction per update, 16 connections", "/s", singles, None);
    report.figure(NAME, SPEED, "x", pgbenches.iter().map(|rate| rate / PGBENCH).collect(), None);
    report.figure(NAME, "for comparison: pgbench simple-update, 16 connections", "/s", pgbenches, None);
    report.figure(NAME, "applied and announced", "/s", ours, None);
    report.figure(NAME, RATIO, "x", to_floor, Target::AtLeast(0.7));
    report.figure(NAME, TO_SINGLE, "x", to_single, Target::AtLeast(6.0));
    report.figure(NAME, "applied, ratio to pgbench simple-update", "x", to_pgbench, Target::AtLeast(5.0));
    memory.tell(NAME, report);
    Ok(())
}

/// Puts commands into the log, as internal producers do.
pub(crate) async fn fill_log(stack: &Stack, count: u64) -> anyhow::Result<()> {
    let js = service_kit::nats::jetstream(&stack.client);
    let subject = format!("leads.cmd.{}.update", stack.project_id);
    let commands = (0..count).map(|tag| OutboundMessage {
        subject: subject.clone().into(),
        headers: None,
        payload: body(any_lead(stack.leads), tag).into(),
    });
    Ok(Publisher::new(js).publish_all(commands).await?)
}

/// What it took to empty the log.
pub(crate) struct Drained {
    /// Updates applied in a second.
    pub(crate) rate: f64,
    pub(crate) taken: BTreeMap<&'static str, Taken>,
}

/// Puts so many commands into the log while nobody reads it, then applies and announces them to the last.
pub(crate) async fn fill_and_drain(stack: &mut Stack, count: u64) -> anyhow::Result<Drained> {
    stack.lead_state.terminate().await;
    // Nobody delivers them, and the stream has room for so many only. The last one stays: without it lead-state would see
    // that events were lost, and announce all of them again.
    service_kit::nats::jetstream(&stack.client).get_stream(LEAD_EVENTS).await?.purge().keep(1).await?;
    fill_log(stack, count).await?;
    // What earlier runs wrote is on the disk before this one is measured.
    sqlx::query("CHECKPOINT").execute(&stack.pool).await?;
    stack.restart(|stack| &mut stack.lead_state).await;
    let meter = stack.meter();
    let (before, begun) = (stack.checkpoint().await?, Instant::now());
    stack.settled(PATIENCE).await?;
    let (after, took) = (stack.checkpoint().await?, begun.elapsed().as_secs_f64());
    let (taken, _) = meter.stop();
    Ok(Drained { rate: (after.0 - before.0) as f64 / took, taken })
}

/// Postgres' own benchmark on the same cluster, in a database of its own.
async fn pgbench(stack: &Stack, seconds: &str) -> anyhow::Result<f64> {
    sqlx::query("DROP DATABASE IF EXISTS pgbench").execute(&stack.pool).await?;
    sqlx::query("CREATE DATABASE pgbench").execute(&stack.pool).await?;
    let url = stack.postgres.url();
    let url = format!("{}/pgbench", url.rsplit_once('/').map_or(url.as_str(), |(server, _)| server));
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(stack.postgres.program("pgbench"));
        let output = command.args(arguments).arg(&url).output().await.context("cannot run pgbench")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "pgbench: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(text)
    };
    run(&["--initialize", "--scale=10", "--quiet"]).await?;
    let text =
        run(&["--builtin=simple-update", "--client=16", "--jobs=2", "--protocol=prepared", "--time", seconds]).await?;
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")).and_then(|rest| rest.split(' ').next());
    rate.context("pgbench told no rate")?.parse().context("pgbench's rate")
}

//! The latency from POST to webhook at fixed rates that the services can follow.

use std::time::Duration;

use serde_json::json;

use super::{Plan, sync_is_measurable};
use crate::{
    protocol::{Load, Pace},
    report::{Report, Target},
    stack::Stack,
};

pub(crate) const NAME: &str = "latency";

/// The stages of an update's timeline, with queries for their mean and p99. Times are recorded in whole milliseconds,
/// so the mean says more than the median.
const STAGES: [(&str, &str); 3] = [
    (
        "logged to decided",
        "SELECT avg(ms)::float8, percentile_cont(0.99) WITHIN GROUP (ORDER BY ms)::float8
         FROM (SELECT extract(epoch FROM applied_at - logged_at) * 1000 AS ms FROM lead_state.lead_updates
               ORDER BY log_sequence DESC, log_index DESC LIMIT 400) AS last",
    ),
    (
        "decided to posted",
        "SELECT avg(ms)::float8, percentile_cont(0.99) WITHIN GROUP (ORDER BY ms)::float8
         FROM (SELECT extract(epoch FROM a.started_at - u.applied_at) * 1000 AS ms
               FROM (SELECT * FROM lead_state.lead_updates ORDER BY log_sequence DESC, log_index DESC LIMIT 400) AS u
               JOIN webhooks.every_attempt a USING (update_id)) AS last",
    ),
    (
        "posted to answered",
        "SELECT avg(duration_ms)::float8, percentile_cont(0.99) WITHIN GROUP (ORDER BY duration_ms)::float8
         FROM (SELECT a.duration_ms
               FROM (SELECT * FROM lead_state.lead_updates ORDER BY log_sequence DESC, log_index DESC LIMIT 400) AS u
               JOIN webhooks.every_attempt a USING (update_id)) AS last",
    ),
];

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    measure(plan, report, false).await?;
    if sync_is_measurable(NAME, report).await? {
        measure(plan, report, true).await?;
    }
    Ok(())
}

async fn measure(plan: &Plan, report: &mut Report, sync: bool) -> anyhow::Result<()> {
    let durability = if sync { ", synced before every ack" } else { "" };
    let mut stack = Stack::start(sync, 100_000).await?;
    // Fills caches and plans statements.
    let warm_up = Load { pace: Pace::Rate(1000), ..stack.load(Duration::from_secs(2)) };
    stack.post_and_receive(warm_up).await?;
    for rate in [100, 1000] {
        let (target_p50, target_p99) = targets(rate, sync);
        let at = format!("at {rate}/s{durability}");
        let (mut p50, mut p99, mut p999, mut posts) = (vec![], vec![], vec![], vec![]);
        for _ in plan.runs(&format!("{NAME} {at}")) {
            let load = Load { pace: Pace::Rate(rate), ..stack.load(plan.duration) };
            let (posted, received) = stack.post_and_receive(load).await?;
            report.detail(NAME, json!({"sync": sync, "rate": rate, "posted": posted, "received": received}))?;
            p50.push(received.latency.p50);
            p99.push(received.latency.p99);
            p999.push(received.latency.p999);
            posts.push(posted.latency.p50);
        }
        for (stage, sql) in STAGES {
            let (mean, p99): (f64, f64) = sqlx::query_as(sql).fetch_one(&stack.pool).await?;
            report.figure(NAME, format!("{at}: {stage}, mean"), "ms", vec![mean], None);
            report.figure(NAME, format!("{at}: {stage}, p99"), "ms", vec![p99], None);
        }
        report.figure(NAME, format!("{at}: POST to answer, p50"), "ms", posts, None);
        report.figure(NAME, format!("{at}: POST to webhook, p50"), "ms", p50, Target::AtMost(target_p50));
        report.figure(NAME, format!("{at}: POST to webhook, p99"), "ms", p99, Target::AtMost(target_p99));
        report.figure(NAME, format!("{at}: POST to webhook, p99.9"), "ms", p999, None);
    }
    Ok(())
}

/// The targets for p50 and p99 from POST to webhook, in milliseconds.
fn targets(rate: u32, sync: bool) -> (f64, f64) {
    match (rate, sync) {
        (100, _) => (2.5, 8.0),
        (_, false) => (1.8, 6.0),
        (_, true) => (3.5, 10.0),
    }
}

//! Activities of 2 KiB, against updates of the same length: end to end, from the end of a call over HTTP to the
//! webhook.

use serde_json::json;

use super::Plan;
use crate::{
    protocol::{Content, LONG_BYTES, Load, Pace},
    report::{Report, Target},
    stack::{Stack, TIMEOUT},
};

pub(crate) const NAME: &str = "activities";
const CONTENTS: [(Content, &str); 2] = [(Content::LongUpdate, "updates"), (Content::Activity, "activities")];
/// Requests on their way to their webhook.
const WINDOW: usize = 4000;
/// Runs are this many times longer than other scenarios', so that one checkpoint of Postgres does not decide.
const RUN_FACTOR: u32 = 3;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    let mut figures = CONTENTS.map(|_| [vec![], vec![]]);
    for _ in plan.runs(NAME) {
        for ((content, what), [rates, cpu]) in CONTENTS.into_iter().zip(&mut figures) {
            let load = stack.load(plan.duration * RUN_FACTOR);
            let load = Load { connections: 256, pace: Pace::Window(WINDOW), content, ..load };
            let meter = stack.meter();
            let (posted, received) = stack.post_and_receive_all(load).await?;
            let (usage, _) = meter.stop();
            stack.wait_until_announced(TIMEOUT).await?;
            let seconds: f64 = usage.iter().filter(|(name, _)| **name != "driver").map(|(_, usage)| usage.cpu).sum();
            rates.push(posted.rate());
            cpu.push(seconds / received.updates as f64 * 1000.0);
            report.detail(NAME, json!({"what": what, "posted": posted, "received": received, "usage": usage}))?;
        }
    }
    let mut medians = Vec::new();
    for ((_, what), [rates, cpu]) in CONTENTS.into_iter().zip(figures) {
        let at = format!("{what} of {LONG_BYTES} bytes");
        let rate = report.figure(NAME, format!("{at}, webhook received"), "/s", rates, None);
        let what = format!("{at}: CPU per 1000, ours + NATS + Postgres");
        medians.push((rate, report.figure(NAME, what, "s", cpu, None)));
    }
    let [(update_rate, update_cpu), (rate, cpu)] = medians[..] else { return Ok(()) };
    report.figure(NAME, "activities, ratio of the rate to updates", "x", vec![rate / update_rate], None);
    let most = Target::AtMost(1.3);
    report.figure(NAME, "activities, ratio of the CPU to updates", "x", vec![cpu / update_cpu], most);
    Ok(())
}

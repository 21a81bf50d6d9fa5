//! A short run of everything that has a floor, judged by ratios alone: for machines that nobody keeps quiet.

use std::time::Duration;

use anyhow::ensure;

use super::{Plan, apply, deliver, e2e, gateway};
use crate::report::{Report, number};

/// How long all of it measures, how often.
const PLAN: Plan = Plan { lasting: Duration::from_secs(2), runs: 3, size: 0 };

/// What must hold even where others use the machine too: about half of what is reached now. What falls below was not noise.
const LEAST: [(&str, &str, f64); 5] = [
    (gateway::NAME, gateway::RATIO, 0.3),
    (apply::NAME, apply::RATIO, 0.35),
    (apply::NAME, apply::TO_SINGLE, 4.0),
    (deliver::NAME, deliver::RATIO, 0.18),
    (e2e::NAME, e2e::RATIO, 0.2),
];

/// Fails where a ratio is below what must hold.
pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    gateway::run(&PLAN, report).await?;
    apply::run(&PLAN, report).await?;
    deliver::run(&PLAN, report).await?;
    e2e::one(&Plan { runs: 1, ..PLAN }, report, false).await?;
    let below = below(report);
    ensure!(below.is_empty(), "slower than noise explains:\n  {}", below.join("\n  "));
    Ok(())
}

/// The ratios that are too low, or were not taken.
fn below(report: &Report) -> Vec<String> {
    let judged = LEAST.iter().map(|(scenario, what, least)| (scenario, what, least, report.median(scenario, what)));
    let low = judged.filter(|(.., least, ratio)| ratio.is_none_or(|ratio| ratio.is_nan() || ratio < **least));
    low.map(|(scenario, what, least, ratio)| {
        let ratio = ratio.map_or("not measured".to_owned(), number);
        format!("{scenario}: {what}: {ratio}, should be {} at least", number(*least))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_ratio_is_said() {
        let mut report = Report::default();
        for (scenario, what, least) in LEAST {
            report.figure(scenario, what, "x", vec![least], None);
        }
        assert_eq!(below(&report), [""; 0]);
        report.figures[1].median = 0.1;
        report.figures[3].median = f64::NAN;
        report.figures.remove(4);
        let said = below(&report);
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].starts_with("apply: ") && said[0].ends_with(": 0.10, should be 0.35 at least"), "{said:?}");
        assert!(said[2].contains("not measured"), "{said:?}");
    }
}

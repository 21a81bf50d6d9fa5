//! A short run of the scenarios with floors that checks ratios only, for machines with other work.

use std::time::Duration;

use anyhow::ensure;

use super::{Plan, apply, deliver, e2e, gateway};
use crate::report::{Report, number};

const PLAN: Plan = Plan { duration: Duration::from_secs(2), runs: 3, size: 0 };

/// About half of the usual ratios: noise from other work on the machine does not explain lower ones.
const MIN_RATIOS: [(&str, &str, f64); 5] = [
    (gateway::NAME, gateway::RATIO, 0.3),
    (apply::NAME, apply::RATIO, 0.35),
    (apply::NAME, apply::TO_SINGLE, 4.0),
    (deliver::NAME, deliver::RATIO, 0.18),
    (e2e::NAME, e2e::RATIO, 0.2),
];

/// Fails if a ratio is lower than in [`MIN_RATIOS`].
pub(crate) async fn run(report: &mut Report) -> anyhow::Result<()> {
    gateway::run(&PLAN, report).await?;
    apply::run(&PLAN, report).await?;
    deliver::run(&PLAN, report).await?;
    e2e::measure(&Plan { runs: 1, ..PLAN }, report, false).await?;
    let low = low_ratios(report);
    ensure!(low.is_empty(), "slower than noise explains:\n  {}", low.join("\n  "));
    Ok(())
}

/// The ratios that are too low or were not measured.
fn low_ratios(report: &Report) -> Vec<String> {
    let ratios =
        MIN_RATIOS.iter().map(|(scenario, what, least)| (scenario, what, least, report.median(scenario, what)));
    let low = ratios.filter(|(.., least, ratio)| ratio.is_none_or(|ratio| ratio.is_nan() || ratio < **least));
    low.map(|(scenario, what, least, ratio)| {
        let ratio = ratio.map_or("not measured".to_owned(), number);
        format!("{scenario}: {what}: {ratio}, should be at least {}", number(*least))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_and_missing_ratios_are_reported() {
        let mut report = Report::default();
        for (scenario, what, least) in MIN_RATIOS {
            report.figure(scenario, what, "x", vec![least], None);
        }
        assert_eq!(low_ratios(&report), [""; 0]);
        report.figures[1].median = 0.1;
        report.figures[3].median = f64::NAN;
        report.figures.remove(4);
        let low = low_ratios(&report);
        assert_eq!(low.len(), 3, "{low:?}");
        assert!(low[0].starts_with("apply: ") && low[0].ends_with(": 0.10, should be at least 0.35"), "{low:?}");
        assert!(low[2].contains("not measured"), "{low:?}");
    }
}

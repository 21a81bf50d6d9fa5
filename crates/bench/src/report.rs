//! What was measured, its verdicts, and how it is told.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// A target.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Target {
    /// The figure is at least this.
    AtLeast(f64),
    /// The figure is at most this.
    AtMost(f64),
}

impl Target {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(bound) => figure >= bound,
            Self::AtMost(bound) => figure <= bound,
        }
    }
}

/// A figure, from one or more runs.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Figure {
    /// The scenario it is of.
    pub(crate) scenario: &'static str,
    /// What was measured.
    pub(crate) what: String,
    /// The median of the runs.
    pub(crate) median: f64,
    /// All runs.
    pub(crate) runs: Vec<f64>,
    /// `/s`, `ms`, `MiB`, `x` for a ratio.
    pub(crate) unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
}

/// All that a run of the bench found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    /// The machine and the versions of what ran on it.
    pub(crate) environment: BTreeMap<&'static str, String>,
    pub(crate) figures: Vec<Figure>,
    /// The raw results, by scenario.
    pub(crate) details: BTreeMap<&'static str, Vec<Value>>,
}

impl Report {
    /// Notes a figure.
    pub(crate) fn figure(
        &mut self,
        scenario: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        runs: Vec<f64>,
        target: impl Into<Option<Target>>,
    ) -> f64 {
        let (median, target) = (median(&runs), target.into());
        let met = target.map(|target| target.is_met(median));
        let figure = Figure { scenario, what: what.into(), median, runs, unit, target, met };
        println!("{}", line(&figure));
        self.figures.push(figure);
        median
    }

    /// Notes raw results.
    pub(crate) fn detail(&mut self, scenario: &'static str, value: impl Serialize) -> anyhow::Result<()> {
        self.details.entry(scenario).or_default().push(serde_json::to_value(value)?);
        Ok(())
    }

    /// Whether every target that was looked at is met.
    pub(crate) fn all_met(&self) -> bool {
        self.figures.iter().all(|figure| figure.met != Some(false))
    }

    /// The table for people.
    pub(crate) fn table(&self) -> String {
        let mut table = String::from("\n");
        for (name, value) in &self.environment {
            table += &format!("{name:<12} {value}\n");
        }
        let mut scenario = "";
        for figure in &self.figures {
            if figure.scenario != scenario {
                scenario = figure.scenario;
                table += &format!("\n{scenario}\n");
            }
            table += &line(figure);
            table.push('\n');
        }
        let judged = self.figures.iter().filter(|figure| figure.met.is_some());
        let (met, missed): (Vec<_>, Vec<_>) = judged.partition(|figure| figure.met == Some(true));
        table += &format!("\n{} targets met, {} missed\n", met.len(), missed.len());
        table
    }
}

fn line(figure: &Figure) -> String {
    let verdict = match (figure.target, figure.met) {
        (Some(target), Some(met)) => {
            let (sign, bound) = match target {
                Target::AtLeast(bound) => ("≥", bound),
                Target::AtMost(bound) => ("≤", bound),
            };
            format!("{} {sign} {}", if met { "met   " } else { "MISSED" }, number(bound))
        }
        _ => String::new(),
    };
    let spread = match figure.runs.as_slice() {
        [] | [_] => String::new(),
        runs => format!("({})", runs.iter().map(|run| number(*run)).collect::<Vec<_>>().join(", ")),
    };
    let value = format!("{} {}", number(figure.median), figure.unit);
    format!("  {:<66} {value:>14}  {verdict:<18} {spread}", figure.what)
}

/// As many digits as mean something.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let split = digits.len() - 3;
            if size >= 1e6 {
                format!("{} {} {}", &digits[..split - 3], &digits[split - 3..split], &digits[split..])
            } else {
                format!("{} {}", &digits[..split], &digits[split..])
            }
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The middle one; of an even number the lower of the two.
pub(crate) fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_mean_something() {
        for (value, text) in [
            (0.0, "0"),
            (0.0123, "0.0123"),
            (0.857, "0.86"),
            (12.34, "12.3"),
            (999.4, "999"),
            (12345.6, "12 346"),
            (1234567.0, "1 234 567"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_missed_target_is_said() {
        let mut report = Report::default();
        report.figure("gateway", "accepted", "/s", vec![3.0, 1.0, 2.0], Target::AtLeast(2.0));
        assert!(report.all_met() && report.figures[0].median == 2.0);
        report.figure("gateway", "memory", "MiB", vec![65.0], Target::AtMost(64.0));
        assert!(!report.all_met());
        assert!(report.table().contains("1 targets met, 1 missed"), "{}", report.table());
    }
}

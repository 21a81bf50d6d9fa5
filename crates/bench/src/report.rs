//! The measured figures, their targets, and the printed table.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(bound) => figure >= bound,
            Self::AtMost(bound) => figure <= bound,
        }
    }

    pub(crate) fn bound(self) -> f64 {
        match self {
            Self::AtLeast(bound) | Self::AtMost(bound) => bound,
        }
    }

    fn text(self) -> String {
        let sign = match self {
            Self::AtLeast(_) => "≥",
            Self::AtMost(_) => "≤",
        };
        format!("{sign} {}", number(self.bound()))
    }
}

/// A measure with its values.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Figure {
    pub(crate) scenario: String,
    pub(crate) what: String,
    pub(crate) median: f64,
    /// The value of each run.
    pub(crate) runs: Vec<f64>,
    /// `/s`, `ms`, `MiB`, `x` for a ratio.
    pub(crate) unit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
}

/// The results of one execution of the bench.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) figures: Vec<Figure>,
    /// The measurements that are not possible here, with reasons.
    pub(crate) unmeasured: Vec<String>,
    /// The raw results by scenario.
    pub(crate) details: BTreeMap<String, Vec<Value>>,
}

impl Report {
    /// Adds a figure, prints it to standard error, and returns its median.
    pub(crate) fn figure(
        &mut self,
        scenario: &str,
        what: impl Into<String>,
        unit: &str,
        runs: Vec<f64>,
        target: impl Into<Option<Target>>,
    ) -> f64 {
        let (median, target) = (median(&runs), target.into());
        let met = target.map(|target| target.is_met(median));
        let figure =
            Figure { scenario: scenario.into(), what: what.into(), median, runs, unit: unit.into(), target, met };
        eprintln!("{}", line(&figure));
        self.figures.push(figure);
        median
    }

    /// Adds the figures of a baseline, of what is compared with it, and of their ratio.
    pub(crate) fn comparison(
        &mut self,
        scenario: &str,
        unit: &str,
        (baseline_name, baseline): (impl Into<String>, Vec<f64>),
        (what, runs): (impl Into<String>, Vec<f64>),
        (ratio_name, target): (&str, Target),
    ) {
        let ratios = ratios(&runs, &baseline);
        self.figure(scenario, baseline_name, unit, baseline, None);
        self.figure(scenario, what, unit, runs, None);
        self.figure(scenario, ratio_name, "x", ratios, target);
    }

    pub(crate) fn detail(&mut self, scenario: &str, value: impl Serialize) -> anyhow::Result<()> {
        self.details.entry(scenario.into()).or_default().push(serde_json::to_value(value)?);
        Ok(())
    }

    /// Records that a measurement is not possible here.
    pub(crate) fn unmeasured(&mut self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("  not measured: {what}");
        self.unmeasured.push(what);
    }

    pub(crate) fn median(&self, scenario: &str, what: &str) -> Option<f64> {
        let figure = self.figures.iter().find(|figure| figure.scenario == scenario && figure.what == what);
        figure.map(|figure| figure.median)
    }

    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a file written by --json", path.display()))
    }

    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn table(&self) -> String {
        let mut table = String::from("\n");
        for (name, value) in &self.environment {
            table += &format!("{name:<12} {value}\n");
        }
        let mut scenario = "";
        for figure in &self.figures {
            if figure.scenario != scenario {
                scenario = &figure.scenario;
                table += &format!("\n{scenario}\n");
            }
            table += &line(figure);
            table.push('\n');
        }
        table += &self.verdict();
        table
    }

    /// The number of met targets; the missed ones with their distance.
    fn verdict(&self) -> String {
        let with_target = self.figures.iter().filter_map(|figure| Some((figure, figure.target?, figure.met?)));
        let (met, missed): (Vec<_>, Vec<_>) = with_target.partition(|(_, _, met)| *met);
        let mut text = format!("\n{} targets met, {} missed\n", met.len(), missed.len());
        for (figure, target, _) in missed {
            text += &format!(
                "  MISSED {}: {}: {} {}, {} × the target of {}\n",
                figure.scenario,
                figure.what.trim(),
                number(figure.median),
                figure.unit,
                number(figure.median / target.bound()),
                target.text(),
            );
        }
        for what in &self.unmeasured {
            text += &format!("  not measured: {what}\n");
        }
        text
    }
}

fn line(figure: &Figure) -> String {
    let verdict = match (figure.target, figure.met) {
        (Some(target), Some(met)) => format!("{} {}", if met { "met   " } else { "MISSED" }, target.text()),
        _ => String::new(),
    };
    let spread = match figure.runs.as_slice() {
        [] | [_] => String::new(),
        runs => format!("({})", runs.iter().map(|run| number(*run)).collect::<Vec<_>>().join(", ")),
    };
    let value = format!("{} {}", number(figure.median), figure.unit);
    format!("  {:<66} {value:>14}  {verdict:<18} {spread}", figure.what).trim_end().to_owned()
}

/// Formats a number with two to four significant digits.
pub(crate) fn number(value: f64) -> String {
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

/// The ratio of each run to the run of the baseline that it alternated with.
pub(crate) fn ratios(runs: &[f64], baseline: &[f64]) -> Vec<f64> {
    runs.iter().zip(baseline).map(|(run, baseline)| run / baseline).collect()
}

/// The median; of an even number the lower of the two middle values.
pub(crate) fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_printed_with_significant_digits() {
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
    fn a_missed_target_is_printed_with_its_ratio() {
        let mut report = Report::default();
        report.figure("gateway", "accepted", "/s", vec![3.0, 1.0, 2.0], Target::AtLeast(2.0));
        assert_eq!(report.median("gateway", "accepted"), Some(2.0));
        assert!(report.table().contains("1 targets met, 0 missed"), "{}", report.table());
        report.figure("gateway", "memory", "MiB", vec![80.0], Target::AtMost(64.0));
        assert!(
            report.table().ends_with(
                "1 targets met, 1 missed\n  MISSED gateway: memory: 80.0 MiB, 1.25 × the target of ≤ 64.0\n"
            ),
            "{}",
            report.table()
        );
    }

    #[test]
    fn a_written_report_can_be_read() {
        let mut report = Report::default();
        report.figure("gateway", "accepted", "/s", vec![2.0], Target::AtLeast(2.0));
        report.detail("gateway", 7).expect("a detail");
        report.unmeasured("something");
        let file = std::env::temp_dir().join(format!("leadrelay-report-{}.json", std::process::id()));
        report.write(&file).expect("written");
        let read = Report::read(&file);
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(read.expect("read").table(), report.table());
    }
}

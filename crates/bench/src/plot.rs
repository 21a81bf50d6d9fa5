//! Charts of a report: rates next to their floors, and latencies.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use anyhow::Context;
use serde::Deserialize;

use crate::{
    latency::Latency,
    report::{Figure, Report, Target, median, number},
    scenarios::latency,
};

/// Prefixes of figures that do not measure Leadrelay.
const OTHERS: [&str; 2] = ["floor: ", "for comparison: "];
const OURS: &str = "#2563eb";
const OTHER: &str = "#b6bcc6";
const MARK: &str = "#b91c1c";
const WIDTH: f64 = 960.0;

/// Writes rates.svg and latency.svg to a directory.
pub(crate) fn draw(report: &Report, dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for (name, drawing) in [("rates.svg", rates(report)), ("latency.svg", latencies(report)?)] {
        let path = dir.join(name);
        fs::write(&path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The elements of a chart.
struct Svg(String);

impl Svg {
    fn text(&mut self, x: f64, y: f64, rest: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        self.draw(format_args!(r#"<text x="{x:.1}" y="{y:.1}" {rest}>{text}</text>"#));
    }

    fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str) {
        let width = if colour == MARK { 2 } else { 1 };
        self.draw(format_args!(
            r#"<path d="M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}" stroke="{colour}" stroke-width="{width}"/>"#
        ));
    }

    fn draw(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{element}");
    }

    /// The document, with a title, on white because the page around it may be dark.
    fn finish(self, title: &str, height: f64) -> String {
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="system-ui, sans-serif" font-size="13" fill="#1f2937">
<title>{title}</title>
<rect width="100%" height="100%" fill="#fff"/>
<text x="16" y="28" font-size="17" font-weight="600">{title}</text>
{}</svg>
"##,
            self.0
        )
    }
}

/// A bar for each rate; each scenario has its own scale.
fn rates(report: &Report) -> String {
    const ROW: f64 = 24.0;
    const LEFT: f64 = 430.0;
    const ROOM: f64 = WIDTH - LEFT - 100.0;
    let mut scenarios = Vec::<(&str, Vec<&Figure>)>::new();
    for figure in report.figures.iter().filter(|figure| figure.unit == "/s") {
        match scenarios.last_mut() {
            Some((scenario, figures)) if *scenario == figure.scenario => figures.push(figure),
            _ => scenarios.push((&figure.scenario, vec![figure])),
        }
    }
    let (mut svg, mut y) = (Svg(String::new()), 44.0);
    for (scenario, figures) in scenarios {
        y += 10.0;
        svg.text(16.0, y + 16.0, r#"font-weight="600""#, scenario);
        y += ROW;
        let ours = figures.iter().filter(|figure| !is_other(figure)).map(|figure| figure.median).fold(0.0, f64::max);
        let targets = figures.iter().filter_map(|figure| figure.target).map(Target::bound);
        let most = figures.iter().map(|figure| figure.median).chain(targets).fold(0.0, f64::max);
        // The bar of a much faster floor is cut off, so that the other bars stay readable.
        let full = if ours > 0.0 { most.min(2.5 * ours) } else { most };
        for figure in figures {
            let (colour, cut) = (if is_other(figure) { OTHER } else { OURS }, figure.median > full);
            let length = ROOM * (figure.median / full).min(1.0);
            svg.text(LEFT - 10.0, y + 16.0, r#"text-anchor="end""#, &figure.what);
            svg.draw(format_args!(
                r#"<rect x="{LEFT}" y="{:.1}" width="{length:.1}" height="16" rx="2" fill="{colour}"/>"#,
                y + 3.0
            ));
            if cut {
                let [left, right] = [LEFT + ROOM - 24.0, LEFT + ROOM - 14.0];
                svg.draw(format_args!(
                    r##"<path d="M{left} {0:.1}l6 -20M{right} {0:.1}l6 -20" stroke="#fff" stroke-width="3"/>"##,
                    y + 21.0
                ));
            }
            svg.text(LEFT + length + 8.0, y + 16.0, "", &format!("{} /s", number(figure.median)));
            if let Some(target) = figure.target {
                let x = LEFT + ROOM * (target.bound() / full).min(1.0);
                svg.line([x, y + 1.0], [x, y + 21.0], MARK);
            }
            y += ROW;
        }
    }
    y += 10.0;
    for (x, colour, what) in
        [(16.0, OURS, "Leadrelay"), (120.0, OTHER, "floors, and others for comparison"), (380.0, MARK, "target")]
    {
        let width = if colour == MARK { 2 } else { 12 };
        svg.draw(format_args!(r#"<rect x="{x}" y="{:.1}" width="{width}" height="12" fill="{colour}"/>"#, y + 1.0));
        svg.text(x + 18.0, y + 12.0, "", what);
    }
    svg.finish("Rates, in the same run on the same machine", y + 28.0)
}

fn is_other(figure: &Figure) -> bool {
    OTHERS.iter().any(|prefix| figure.what.starts_with(prefix))
}

/// The raw result of a run of the latency scenario.
#[derive(Deserialize)]
struct Run {
    sync: bool,
    rate: u32,
    received: Received,
}

#[derive(Deserialize)]
struct Received {
    latency: Latency,
}

/// A line over the percentiles for each rate.
fn latencies(report: &Report) -> anyhow::Result<String> {
    const PERCENTILES: [&str; 5] = ["p50", "p90", "p99", "p99.9", "max"];
    const COLOURS: [&str; 4] = [OURS, "#0f766e", "#93b4f5", "#7cc4bd"];
    const LEFT: f64 = 70.0;
    const TOP: f64 = 60.0;
    const STEP: f64 = 160.0;
    const HEIGHT: f64 = 300.0;
    let mut series = BTreeMap::<_, [Vec<f64>; 5]>::new();
    for detail in report.details.get(latency::NAME).into_iter().flatten() {
        let run = Run::deserialize(detail).context("unexpected raw result of the latency scenario")?;
        let Latency { p50, p90, p99, p999, max, .. } = run.received.latency;
        let runs = series.entry((run.sync, run.rate)).or_default();
        for (runs, value) in runs.iter_mut().zip([p50, p90, p99, p999, max]) {
            runs.push(value);
        }
    }
    let series: Vec<_> = series.into_iter().map(|(key, runs)| (key, runs.map(|runs| median(&runs)))).collect();
    let all = series.iter().flat_map(|(_, values)| values.iter().copied());
    let decades = all.clone().fold(1.0_f64, f64::max).log10().ceil().max(1.0);
    let lowest = all.fold(1.0_f64, f64::min).log10().floor();
    let point = |index: usize, ms: f64| {
        let height = (ms.max(1e-3).log10() - lowest) / (decades - lowest);
        [LEFT + 30.0 + STEP * index as f64, TOP + HEIGHT * (1.0 - height)]
    };
    let mut svg = Svg(String::new());
    let right = LEFT + 60.0 + STEP * 4.0;
    for decade in lowest as i32..=decades as i32 {
        for times in [1.0, 2.0, 5.0] {
            let ms = times * 10_f64.powi(decade);
            let [_, y] = point(0, ms);
            if y < TOP - 1.0 {
                continue;
            }
            svg.line([LEFT, y], [right, y], "#e5e7eb");
            svg.text(LEFT - 8.0, y + 4.0, r#"text-anchor="end""#, &format!("{ms} ms"));
        }
    }
    for (index, percentile) in PERCENTILES.iter().enumerate() {
        let [x, _] = point(index, 1.0);
        svg.text(x, TOP + HEIGHT + 22.0, r#"text-anchor="middle""#, percentile);
    }
    for (number, ((sync, rate), values)) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points: Vec<_> = values.iter().enumerate().map(|(index, ms)| point(index, *ms)).collect();
        let path: Vec<_> = points.iter().map(|[x, y]| format!("{x:.1} {y:.1}")).collect();
        svg.draw(format_args!(r#"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2"/>"#, path.join("L")));
        for [x, y] in &points {
            svg.draw(format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#));
        }
        let y = TOP + HEIGHT + 50.0 + 20.0 * number as f64;
        svg.draw(format_args!(r#"<rect x="{LEFT}" y="{:.1}" width="12" height="12" fill="{colour}"/>"#, y - 10.0));
        let durability = if *sync { "synced before every ack" } else { "JetStream's default" };
        let [p50, _, p99, ..] = values.map(crate::report::number);
        svg.text(LEFT + 18.0, y, "", &format!("{rate} a second, {durability}: p50 {p50} ms, p99 {p99} ms"));
    }
    for (index, percentile) in PERCENTILES.iter().enumerate() {
        let suffix = format!("POST to webhook, {percentile}");
        let targets = report.figures.iter().filter(|figure| figure.what.ends_with(&suffix));
        let bounds = targets.filter(|figure| figure.scenario == latency::NAME).filter_map(|figure| figure.target);
        if let Some(bound) = bounds.map(Target::bound).reduce(f64::min) {
            let [x, y] = point(index, bound);
            svg.line([x - 14.0, y], [x + 14.0, y], MARK);
            let rest = format!(r##"fill="{MARK}" font-size="11" stroke="#fff" stroke-width="4" paint-order="stroke""##);
            svg.text(x + 18.0, y + 4.0, &rest, &format!("target {bound} ms"));
        }
    }
    Ok(svg.finish("From POST to webhook, at fixed rates", TOP + HEIGHT + 60.0 + 20.0 * series.len() as f64))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_drawn_as_bars_and_latencies_as_lines() {
        let mut report = Report::default();
        report.figure("gateway", "floor: hyper & such", "/s", vec![40_000.0], None);
        report.figure("gateway", "accepted", "/s", vec![30_000.0], Target::AtLeast(20_000.0));
        report.figure("gateway", "memory", "MiB", vec![30.0], None);
        report.figure(latency::NAME, "at 100/s: POST to webhook, p50", "ms", vec![1.0], Target::AtMost(2.5));
        for p50 in [1.0, 2.0, 3.0] {
            let latency = Latency { p50, p90: 3.0, p99: 5.0, p999: 9.0, max: 20.0, count: 1 };
            let run = json!({"sync": false, "rate": 100, "received": {"latency": latency}});
            report.detail(latency::NAME, run).expect("a detail");
        }
        let rates = rates(&report);
        assert_eq!(rates.matches(r#"height="16""#).count(), 2, "{rates}");
        assert!(rates.contains("floor: hyper &amp; such") && rates.contains("40 000 /s"), "{rates}");
        let latencies = latencies(&report).expect("a drawing");
        assert!(latencies.contains("p50 2.00 ms") && latencies.contains("target 2.5 ms"), "{latencies}");
    }
}

//! The statistics on the board of a project.

use std::collections::BTreeMap;

use contract::{
    ObjectId, Timestamp,
    rpc::{DeliveryCounts, StatisticsRange, StatisticsStep, UpdateCounts},
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    view::{chart, parts::table},
};

/// How many codes of refused updates are shown.
const CODES: usize = 5;

/// What the board covers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Covered {
    /// Its name in the URL.
    key: &'static str,
    pub(super) name: &'static str,
    pub(super) range: StatisticsRange,
}

/// The spans that the board may cover, each with its steps.
const SPANS: [(&str, &str, i64, StatisticsStep); 4] = [
    ("15m", "15 minutes", 15, StatisticsStep::Minute),
    ("1h", "hour", 60, StatisticsStep::Minute),
    ("24h", "24 hours", 24, StatisticsStep::Hour),
    ("30d", "30 days", 30, StatisticsStep::Day),
];

impl Covered {
    /// The span with this name, until now; 24 hours by default.
    pub(super) fn new(key: Option<&str>, now: Timestamp) -> Result<Self, Fault> {
        let key = key.unwrap_or("24h");
        let span = SPANS.into_iter().find(|(known, ..)| *known == key);
        let (key, name, steps, step) =
            span.ok_or_else(|| Fault::Invalid("range must be 15m, 1h, 24h or 30d.".into()))?;
        Ok(Self { key, name, range: StatisticsRange::last(steps, step, now) })
    }
}

/// Links to the board with each span.
pub(super) fn spans(project: ObjectId, covered: &Covered) -> Markup {
    html! {
        nav aria-label="Range" {
            ul.actions {
                li { "The last" }
                @for (key, name, ..) in SPANS {
                    li {
                        @if key == covered.key { strong { (name) } }
                        @else { a href={ "/p/" (project) "?range=" (key) } { (name) } }
                    }
                }
            }
        }
    }
}

/// A chart and a table of updates, the newest first, with their sums.
pub(super) fn updates(counts: &[UpdateCounts], covered: &Covered) -> Markup {
    let row = |counts: &UpdateCounts| (counts.at, [counts.succeeded, counts.failed]);
    let steps: Vec<_> = counts.iter().map(row).collect();
    charted("updates", "Updates", ["Succeeded", "Failed"], &steps, &steps, covered)
}

/// A chart and a table of deliveries, the newest first, with their sums.
pub(super) fn deliveries(counts: &[DeliveryCounts], covered: &Covered) -> Markup {
    let bars: Vec<_> = counts.iter().map(|counts| (counts.at, [counts.delivered, counts.failed])).collect();
    let row =
        |counts: &DeliveryCounts| (counts.at, [counts.delivered, counts.within_1s, counts.failed, counts.exhausted]);
    let steps: Vec<_> = counts.iter().map(row).collect();
    let columns = ["Delivered", "of these within 1 s", "Attempts failed", "Exhausted"];
    charted("deliveries", "Deliveries", columns, &bars, &steps, covered)
}

/// The codes of most refused updates, each with a link to them.
pub(super) fn codes(project: ObjectId, counts: &[UpdateCounts], covered: &Covered) -> Markup {
    let mut sums = BTreeMap::<_, i64>::new();
    for counts in counts.iter().filter(|counts| counts.failed > 0) {
        *sums.entry(counts.group.as_deref().unwrap_or_default()).or_default() += counts.failed;
    }
    let mut codes: Vec<_> = sums.into_iter().collect();
    codes.sort_by_key(|(_, failed)| std::cmp::Reverse(*failed));
    let from = covered.range.from.to_iso();
    let rows = html! {
        @for (code, failed) in codes.iter().take(CODES) {
            tr {
                td { a href={ "/p/" (project) "/updates?status=failed&code=" (code) "&from=" (from) } { (code) } }
                td.number { (failed) }
            }
        }
    };
    html! {
        @if codes.is_empty() { p { "None." } } @else { (table("Codes of refused updates", &["Code", "Updates"], &rows)) }
    }
}

fn charted<const N: usize>(
    id: &str,
    what: &str,
    columns: [&str; N],
    bars: &[(Timestamp, [i64; 2])],
    steps: &[(Timestamp, [i64; N])],
    covered: &Covered,
) -> Markup {
    let mut sums = [0; N];
    for (_, counts) in steps {
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    let numbers = |counts: &[i64; N]| html! { @for count in counts { td.number { (count) } } };
    let rows = html! {
        tr { td { strong { (covered.name) } } (numbers(&sums)) }
        @for (at, counts) in steps.iter().rev() {
            tr { td { (begin(*at)) } (numbers(counts)) }
        }
    };
    let columns: Vec<_> = [&["From (UTC)"][..], &columns[..]].concat();
    let caption = format!("{what} per {}", covered.range.step);
    html! {
        @if sums.iter().all(|sum| *sum == 0) {
            p { "None." }
        } @else {
            (chart::stacked(id, &caption, &covered.range, bars))
            (table(&caption, &columns, &rows))
        }
    }
}

/// The begin of a step.
fn begin(at: Timestamp) -> Markup {
    let iso = at.to_iso();
    html! { time datetime=(iso) { (iso.get(5..10).unwrap_or_default()) " " (iso.get(11..16).unwrap_or_default()) } }
}

//! The statistics on the board of a project and on the pages of callbacks.

use std::collections::BTreeMap;

use contract::{
    ObjectId, Timestamp,
    rpc::{DeliveryCounts, StatisticsRange, StatisticsStep, UpdateCounts},
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    view::{
        chart,
        parts::{fact, table},
    },
};

/// How many codes of refused updates are shown.
const CODES: usize = 5;

/// The time range that a page covers.
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

/// The list that a number links to.
struct List {
    path: String,
    /// The names of the list's parameters for the start and the end of a time range.
    times: [&'static str; 2],
    /// Only deliveries to this callback.
    callback: Option<ObjectId>,
}

impl List {
    fn updates(project: ObjectId) -> Self {
        Self { path: format!("/p/{project}/updates"), times: ["from", "to"], callback: None }
    }

    fn deliveries(project: ObjectId) -> Self {
        Self { path: format!("/p/{project}/deliveries"), times: ["since", "until"], callback: None }
    }

    /// The URL of the list, filtered by time and status. An empty status does not filter.
    fn part(&self, status: &str, from: Timestamp, to: Option<Timestamp>) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if !status.is_empty() {
            query.append_pair("status", status);
        }
        if let Some(callback) = self.callback {
            query.append_pair("callback", &callback.to_string());
        }
        query.append_pair(self.times[0], &from.to_iso());
        if let Some(to) = to {
            query.append_pair(self.times[1], &to.to_iso());
        }
        format!("{}?{}", self.path, query.finish())
    }
}

/// The rate per second, over the part of the range that has passed.
fn rate(count: i64, covered: &Covered, now: Timestamp) -> String {
    let millis = (now.millis().min(covered.range.to.millis()) - covered.range.from.millis()).max(1);
    let rate = count as f64 * 1000.0 / millis as f64;
    match rate {
        _ if count == 0 => "0".to_owned(),
        ..0.01 => "less than 0.01".to_owned(),
        0.01..10.0 => format!("{rate:.2}"),
        _ => format!("{rate:.0}"),
    }
}

/// Accepted and applied updates per second, and how many were refused.
pub(super) fn update_rates(project: ObjectId, counts: &[UpdateCounts], covered: &Covered, now: Timestamp) -> Markup {
    let list = List::updates(project);
    let (succeeded, failed) = counts.iter().fold((0, 0), |(s, f), counts| (s + counts.succeeded, f + counts.failed));
    let all = succeeded + failed;
    let linked = |status, text: String| html! { a href=(list.part(status, covered.range.from, None)) { (text) } };
    html! {
        // An update is counted once it is applied, with the minute in which the log accepted it.
        (fact("Accepted and applied", Some(linked("", format!("{} per second", rate(all, covered, now))))))
        (fact("Succeeded", Some(linked("succeeded", format!("{} per second", rate(succeeded, covered, now))))))
        (fact("Refused", Some(linked("failed", share(failed, all)))))
    }
}

/// A part of all in per cent, rounded down: 100 % means all, and 0 % none.
fn share(part: i64, all: i64) -> String {
    match (part * 100).checked_div(all).unwrap_or(0) {
        0 if part > 0 => "<1 %".to_owned(),
        percent => format!("{percent} %"),
    }
}

/// Deliveries per second.
pub(super) fn delivery_rates(
    project: ObjectId,
    counts: &[DeliveryCounts],
    covered: &Covered,
    now: Timestamp,
) -> Markup {
    let delivered = counts.iter().map(|counts| counts.delivered).sum();
    let href = List::deliveries(project).part("delivered", covered.range.from, None);
    fact("Delivered", Some(html! { a href=(href) { (rate(delivered, covered, now)) " per second" } }))
}

/// A chart and a table of updates, the newest first, with their sums.
pub(super) fn updates(project: ObjectId, counts: &[UpdateCounts], covered: &Covered) -> Markup {
    let mut steps: Vec<(Timestamp, [i64; 2])> = Vec::new();
    // The counts of one step are adjacent.
    for step in counts.chunk_by(|a, b| a.at == b.at) {
        let sum = |count: fn(&UpdateCounts) -> i64| step.iter().map(count).sum();
        steps.push((step[0].at, [sum(|counts| counts.succeeded), sum(|counts| counts.failed)]));
    }
    let columns = [("Succeeded", "succeeded"), ("Failed", "failed")];
    charted("updates", "Updates", &List::updates(project), columns, &steps, &steps, covered)
}

/// A chart and a table of deliveries, the newest first, with their sums.
pub(super) fn deliveries(project: ObjectId, counts: &[DeliveryCounts], covered: &Covered) -> Markup {
    let bars: Vec<_> = counts.iter().map(|counts| (counts.at, [counts.delivered, counts.failed])).collect();
    let row =
        |counts: &DeliveryCounts| (counts.at, [counts.delivered, counts.within_1s, counts.failed, counts.exhausted]);
    let steps: Vec<_> = counts.iter().map(row).collect();
    // No list can be filtered by failed attempts, so their sum links to all deliveries of the time.
    let columns = [
        ("Delivered", "delivered"),
        ("of these within 1 s", "delivered"),
        ("Attempts failed", ""),
        ("Exhausted", "exhausted"),
    ];
    charted("deliveries", "Deliveries", &List::deliveries(project), columns, &bars, &steps, covered)
}

/// The success rate and latency of a callback, and a small chart and a table of its deliveries.
pub(super) fn of_callback(
    project: ObjectId,
    callback: ObjectId,
    counts: &[DeliveryCounts],
    covered: &Covered,
) -> Markup {
    let sum = |count: fn(&DeliveryCounts) -> i64| counts.iter().map(count).sum::<i64>();
    let (delivered, failed) = (sum(|counts| counts.delivered), sum(|counts| counts.failed));
    let within = [
        ("≤ 100 ms", sum(|counts| counts.within_100ms)),
        ("≤ 1 s", sum(|counts| counts.within_1s)),
        ("≤ 10 s", sum(|counts| counts.within_10s)),
    ];
    let bars: Vec<_> = counts.iter().map(|counts| (counts.at, [counts.delivered, counts.exhausted])).collect();
    let row = |counts: &DeliveryCounts| (counts.at, [counts.delivered, counts.exhausted, counts.failed]);
    let steps: Vec<_> = counts.iter().map(row).collect();
    let list = List { callback: Some(callback), ..List::deliveries(project) };
    let columns = [("Delivered", "delivered"), ("Exhausted", "exhausted"), ("Attempts failed", "")];
    html! {
        dl.facts {
            (fact("Success rate", success_rate(delivered, failed).map(|rate| html! { (rate) " of " (delivered + failed) " attempts" })))
            (fact("p95", p95(delivered, within).map(|bound| html! { (bound) " for 95 % of the accepted attempts" })))
        }
        div.spark { (charted("deliveries", "Deliveries", &list, columns, &bars, &steps, covered)) }
    }
}

/// The share of attempts that were accepted, rounded down: 100 % means all.
fn success_rate(delivered: i64, failed: i64) -> Option<String> {
    let permille = (delivered * 1000).checked_div(delivered + failed)?;
    Some(format!("{}.{} %", permille / 10, permille % 10))
}

/// The lowest counted bound that 95 % of the accepted attempts did not exceed.
fn p95(delivered: i64, within: [(&'static str, i64); 3]) -> Option<&'static str> {
    if delivered == 0 {
        return None;
    }
    let bound = within.into_iter().find(|(_, count)| count * 100 >= delivered * 95);
    Some(bound.map_or("> 10 s", |(bound, _)| bound))
}

/// The most frequent codes of refused updates, each with a link to its updates.
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

/// A column has a title, and the status of the list that its sum links to. A row has one link, to the list of its time:
/// a link for each number would make the page several times as large.
fn charted<const N: usize>(
    id: &str,
    what: &str,
    list: &List,
    columns: [(&str, &str); N],
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
    let from = covered.range.from;
    let end = |at: Timestamp| Timestamp::from_millis(at.millis() + covered.range.step.millis());
    let rows = html! {
        tr {
            td { strong { (covered.name) } }
            @for (sum, (_, status)) in sums.iter().zip(columns) {
                td.number { a href=(list.part(status, from, None)) { (sum) } }
            }
        }
        @for (at, counts) in steps.iter().rev() {
            tr {
                td { a href=(list.part("", *at, Some(end(*at)))) { (begin(*at)) } }
                @for count in counts { td.number { (count) } }
            }
        }
    };
    let titles: Vec<_> = std::iter::once("From (UTC)").chain(columns.map(|(title, _)| title)).collect();
    let caption = format!("{what} per {}", covered.range.step);
    html! {
        @if sums.iter().all(|sum| *sum == 0) {
            p { "None." }
        } @else {
            (chart::stacked(id, &caption, &covered.range, bars))
            (table(&caption, &titles, &rows))
        }
    }
}

/// The start of a step.
fn begin(at: Timestamp) -> Markup {
    let iso = at.to_iso();
    html! { time datetime=(iso) { (iso.get(5..10).unwrap_or_default()) " " (iso.get(11..16).unwrap_or_default()) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_time_that_has_passed() {
        let now = Timestamp::from_millis(1_768_193_790_000);
        let covered = Covered::new(Some("15m"), now).unwrap();
        // The last minute is half over.
        let seconds = 14 * 60 + 30;
        assert_eq!(rate(seconds * 2, &covered, now), "2.00");
        assert_eq!(rate(seconds * 1500, &covered, now), "1500");
        assert_eq!((rate(0, &covered, now), rate(1, &covered, now)), ("0".into(), "less than 0.01".into()));
    }

    #[test]
    fn a_small_share_is_not_none() {
        assert_eq!(
            [(0, 0), (0, 9), (1, 150), (199, 200), (7, 7)].map(|(part, all)| share(part, all)),
            ["0 %", "0 %", "<1 %", "99 %", "100 %"]
        );
    }

    #[test]
    fn the_success_rate_is_of_attempts_and_rounded_down() {
        assert_eq!(success_rate(0, 0), None);
        let rates = [success_rate(7, 0), success_rate(0, 7), success_rate(1999, 1)].map(Option::unwrap);
        assert_eq!(rates, ["100.0 %", "0.0 %", "99.9 %"]);
    }

    #[test]
    fn the_p95_is_the_bound_that_contains_it() {
        let p95 = |within_100ms, within_1s, within_10s| {
            p95(100, [("≤ 100 ms", within_100ms), ("≤ 1 s", within_1s), ("≤ 10 s", within_10s)])
        };
        assert_eq!(p95(95, 100, 100), Some("≤ 100 ms"));
        assert_eq!(p95(94, 95, 100), Some("≤ 1 s"));
        assert_eq!(p95(0, 94, 95), Some("≤ 10 s"));
        assert_eq!(p95(0, 0, 94), Some("> 10 s"));
        assert_eq!(super::p95(0, [("≤ 100 ms", 0), ("≤ 1 s", 0), ("≤ 10 s", 0)]), None);
    }
}

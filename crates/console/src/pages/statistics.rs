//! The statistics on the board of a project: the last 24 hours.

use contract::{
    Timestamp,
    rpc::{DeliveryCounts, UpdateCounts},
};
use maud::{Markup, html};

use crate::view::parts::table;

/// A table of updates per hour, the newest first, with their sums.
pub(super) fn updates(counts: &[UpdateCounts]) -> Markup {
    let row = |counts: &UpdateCounts| [counts.succeeded, counts.failed];
    let hours = counts.iter().map(|counts| (counts.at, row(counts)));
    per_hour("Updates per hour", ["Succeeded", "Failed"], hours)
}

/// A table of deliveries per hour, the newest first, with their sums.
pub(super) fn deliveries(counts: &[DeliveryCounts]) -> Markup {
    let row = |counts: &DeliveryCounts| [counts.delivered, counts.within_1s, counts.failed, counts.exhausted];
    let hours = counts.iter().map(|counts| (counts.at, row(counts)));
    per_hour("Deliveries per hour", ["Delivered", "of these within 1 s", "Attempts failed", "Exhausted"], hours)
}

fn per_hour<const N: usize>(
    caption: &str,
    columns: [&str; N],
    hours: impl DoubleEndedIterator<Item = (Timestamp, [i64; N])> + Clone,
) -> Markup {
    let mut sums = [0; N];
    for (_, counts) in hours.clone() {
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    let numbers = |counts: [i64; N]| html! { @for count in counts { td.number { (count) } } };
    let rows = html! {
        tr { td { strong { "24 hours" } } (numbers(sums)) }
        @for (at, counts) in hours.rev() {
            tr { td { (hour(at)) } (numbers(counts)) }
        }
    };
    let columns: Vec<_> = [&["Hour (UTC)"][..], &columns[..]].concat();
    html! {
        @if sums.iter().all(|sum| *sum == 0) {
            p { "None." }
        } @else {
            (table(caption, &columns, &rows))
        }
    }
}

/// The begin of an hour.
fn hour(at: Timestamp) -> Markup {
    let iso = at.to_iso();
    html! { time datetime=(iso) { (iso.get(5..10).unwrap_or_default()) " " (iso.get(11..16).unwrap_or_default()) } }
}

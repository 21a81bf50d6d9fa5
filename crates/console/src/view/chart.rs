//! Charts as SVG: stacked bars over time. Their numbers are in a table beside them.

use contract::{Timestamp, rpc::StatisticsRange};
use maud::{Markup, html};

/// The height of the highest bar, in the units of the drawing. Bars are ten units apart.
const HEIGHT: i64 = 100;
const WIDTH: i64 = 10;

/// A bar per step of the range, in two parts: `good` from the bottom, `bad` on top of it. `id` is unique on the page.
pub(crate) fn stacked(id: &str, title: &str, range: &StatisticsRange, bars: &[(Timestamp, [i64; 2])]) -> Markup {
    let step = range.step.millis();
    let steps = (range.to.millis() - range.from.millis()) / step;
    let highest = bars.iter().map(|(_, parts)| parts.iter().sum()).max().unwrap_or(0).max(1_i64);
    let height = |count: i64| count * HEIGHT / highest;
    let sums = [0, 1].map(|part: usize| bars.iter().map(|(_, parts)| parts[part]).sum::<i64>());
    html! {
        svg.chart viewBox={ "0 0 " (steps * WIDTH) " " (HEIGHT) } preserveAspectRatio="none" role="img"
            aria-labelledby={ (id) "-title " (id) "-text" } {
            title id={ (id) "-title" } { (title) }
            desc id={ (id) "-text" } { (sums[0]) " and " (sums[1]) ", at most " (highest) " per " (range.step) "; the table has the numbers" }
            @for (at, [good, bad]) in bars {
                @let x = (at.millis() - range.from.millis()) / step * WIDTH;
                rect.good x=(x) y=(HEIGHT - height(*good)) width=(WIDTH - 2) height=(height(*good)) {}
                @if *bad > 0 {
                    // At least two units high, so that few failures are visible.
                    @let bad = height(*bad).max(2);
                    rect.bad x=(x) y=((HEIGHT - height(*good) - bad).max(0)) width=(WIDTH - 2) height=(bad) {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_stand_at_their_time_and_few_failures_are_visible() {
        let range = StatisticsRange::last_day(Timestamp::from_millis(0));
        let hour = |hour: i64| Timestamp::from_millis(range.from.millis() + hour * 3_600_000);

        let html = stacked("c", "Updates", &range, &[(hour(0), [1000, 0]), (hour(23), [499, 1])]).0;

        assert!(
            html.contains("viewBox=\"0 0 240 100\"") && html.contains("1499 and 1, at most 1000 per hour"),
            "{html}"
        );
        assert!(html.contains(r#"<rect class="good" x="0" y="0" width="8" height="100">"#), "{html}");
        assert!(html.contains(r#"<rect class="bad" x="230" y="49" width="8" height="2">"#), "{html}");
        assert_eq!(html.matches("class=\"bad\"").count(), 1, "{html}");
    }
}

//! Small parts of pages.

use std::{fmt::Display, time::Duration};

use contract::{
    JsonObject, ObjectId, Timestamp,
    rpc::{CallbackState, Cursor, DeliveryStatus},
};
use maud::{Markup, PreEscaped, html};

use crate::fault::Fault;

/// The markers around a fragment, for [`live_fragments`]. Texts of pages cannot contain them: their `<` is escaped.
const LIVE_BEGIN: &str = "<!--live-->";
const LIVE_END: &str = "<!--/live-->";

/// A fragment that a live page keeps current. Fragments do not contain others; the name is unique in the page.
pub(crate) fn live(name: &str, content: &Markup) -> Markup {
    fragment(&html! { div data-live=(name) { (content) } })
}

/// The rows of a list that a live page keeps current. New rows wait behind a button, so that no row moves while the
/// reader reaches for it.
pub(crate) fn live_rows(name: &str, content: &Markup) -> Markup {
    fragment(&html! { div data-live=(name) data-rows { (content) } })
}

fn fragment(element: &Markup) -> Markup {
    html! { (PreEscaped(LIVE_BEGIN)) (element) (PreEscaped(LIVE_END)) }
}

/// The live fragments of a page.
pub(crate) fn live_fragments(page: &Markup) -> impl Iterator<Item = &str> {
    page.0.split(LIVE_BEGIN).skip(1).filter_map(|rest| rest.split(LIVE_END).next())
}

/// A panel: a titled part of a page, whose data may be missing while the rest of the page is shown. A live page keeps
/// it current.
pub(crate) fn panel<T>(title: &str, data: &Result<T, Fault>, content: impl FnOnce(&T) -> Markup) -> Markup {
    fragment(&html! {
        section.panel data-live=(title) {
            h2 { (title) }
            @match data {
                Ok(data) => (content(data)),
                Err(fault) => (notice(fault)),
            }
        }
    })
}

/// Why something is not shown.
pub(crate) fn notice(fault: &Fault) -> Markup {
    html! { p.notice role="status" { (fault.to_string()) } }
}

/// An empty list: what would be in it, and the command that makes its first entry.
pub(crate) fn empty(text: &str, command: Option<&str>) -> Markup {
    html! {
        div.empty {
            p { (text) }
            @if let Some(command) = command { pre tabindex="0" { code { (command) } } }
        }
    }
}

/// A curl command for the gateway, with the variables that the HTTP guide uses.
pub(crate) fn curl(path: &str, body: &str) -> String {
    format!(
        "curl \"$LEADRELAY_GATEWAY_URL{path}\" -H \"Authorization: Bearer $LEADRELAY_API_KEY\" \\\n  --json '{body}'"
    )
}

/// A table that scrolls by itself on narrow screens.
pub(crate) fn table(caption: &str, columns: &[&str], rows: &Markup) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table {
                caption.hidden { (caption) }
                thead { tr { @for column in columns { th scope="col" { (column) } } } }
                tbody { (rows) }
            }
        }
    }
}

/// The fields of a list's filters, with their values as in the URL.
pub(crate) fn filter_fields(filters: &[(&str, Option<String>)], labels: &[&str]) -> Markup {
    html! {
        @for ((name, value), label) in filters.iter().zip(labels) {
            label for=(name) { (label) }
            input id=(name) name=(name) value=[value.as_deref()]
                placeholder=[matches!(*name, "from" | "to" | "since" | "until").then_some("2026-01-12T04:55:59Z")];
        }
    }
}

/// A choice of one value for a list's filter, or of all.
pub(crate) fn choice<T: Display + PartialEq>(name: &str, label: &str, values: &[T], selected: Option<T>) -> Markup {
    html! {
        label for=(name) { (label) }
        select id=(name) name=(name) {
            option value="" { "all" }
            @for value in values { option value=(value) selected[selected.as_ref() == Some(value)] { (value) } }
        }
    }
}

/// The link to a list's next page.
pub(crate) fn next_page(path: &str, filters: &[(&str, Option<String>)], next: Option<&Cursor>) -> Markup {
    let Some(cursor) = next else { return html! {} };
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in filters {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    query.append_pair("cursor", cursor.as_str());
    html! { p.pages { a rel="next" href={ (path) "?" (query.finish()) } { "Next page" } } }
}

pub(crate) fn time(at: Timestamp) -> Markup {
    let iso = at.to_iso();
    let text = iso.replacen('T', " ", 1);
    html! { time datetime=(iso) { (text.trim_end_matches('Z')) } }
}

/// The time of day of an instant.
pub(crate) fn clock_time(at: Timestamp) -> Markup {
    let iso = at.to_iso();
    html! { time datetime=(iso) { (iso.get(11..19).unwrap_or_default()) } }
}

/// A duration in at most two units.
pub(crate) fn span(millis: i64) -> String {
    let seconds = millis / 1000;
    match seconds {
        ..1 => format!("{millis} ms"),
        1..10 => format!("{}.{} s", seconds, millis % 1000 / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// How long ago, or in how long, an instant is.
pub(crate) fn ago(at: Timestamp, now: Timestamp) -> String {
    let millis = now.millis() - at.millis();
    if millis < 0 { format!("in {}", span(-millis)) } else { format!("{} ago", span(millis)) }
}

/// A link to an object of a project, by its id.
pub(crate) fn link(project: ObjectId, list: &str, id: impl Display) -> Markup {
    let id = id.to_string();
    html! { a.id href={ "/p/" (project) "/" (list) "/" (id) } { (id) } }
}

/// A row of a list of facts; absent ones are left out.
pub(crate) fn fact(name: &str, value: Option<Markup>) -> Markup {
    html! {
        @if let Some(value) = value {
            dt { (name) }
            dd { (value) }
        }
    }
}

/// A text as the value of a fact.
pub(crate) fn text(value: Option<&str>) -> Option<Markup> {
    value.map(|value| html! { (value) })
}

/// A status: its colour is never the only signal.
pub(crate) fn badge(kind: Kind, text: &str) -> Markup {
    let (class, sign) = match kind {
        Kind::Good => ("badge good", "✓"),
        Kind::Bad => ("badge bad", "✗"),
        Kind::Waiting => ("badge waiting", "…"),
        Kind::Off => ("badge off", "–"),
    };
    html! { span class=(class) { span aria-hidden="true" { (sign) } " " (text) } }
}

/// The meaning of a status for its reader.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Good,
    Bad,
    Waiting,
    Off,
}

pub(crate) fn delivery_status(status: DeliveryStatus) -> Markup {
    let kind = match status {
        DeliveryStatus::Pending => Kind::Waiting,
        DeliveryStatus::Delivered => Kind::Good,
        DeliveryStatus::Exhausted => Kind::Bad,
    };
    badge(kind, status.as_str())
}

pub(crate) fn callback_state(state: CallbackState) -> Markup {
    let kind = match state {
        CallbackState::Healthy => Kind::Good,
        CallbackState::Failing | CallbackState::Disabled => Kind::Bad,
        CallbackState::Paused | CallbackState::Off => Kind::Off,
    };
    badge(kind, state.as_str())
}

/// The duration of an attempt as a bar, relative to the longest one.
pub(crate) fn bar(duration: Duration, longest: Duration) -> Markup {
    const WIDTH: u128 = 100;
    let width = (duration.as_millis() * WIDTH).checked_div(longest.as_millis()).unwrap_or(0).clamp(1, WIDTH);
    html! {
        svg.bar viewBox="0 0 100 8" width="100" height="8" aria-hidden="true" { rect width=(width) height="8" rx="2" {} }
    }
}

/// A phone number, hidden until it is revealed: screens are shared and photographed.
pub(crate) fn masked(phone: &str) -> Markup {
    let count = phone.chars().count();
    let shown: String = phone.chars().skip(count.saturating_sub(2)).collect();
    html! {
        details.reveal {
            summary { "••• " (shown) }
            (phone)
        }
    }
}

/// The longest indented JSON of a page. Nested arrays take 60 times as many bytes indented, and a live page keeps its
/// fragments in memory.
const MAX_JSON_BYTES: usize = 64 << 10;

/// A JSON object, indented; numbers and strings stay as they are. Of a long one, the beginning.
pub(crate) fn json(title: &str, object: &JsonObject) -> Markup {
    let (shown, is_cut) = indented(object.get(), MAX_JSON_BYTES);
    html! {
        figure.json {
            figcaption { (title) }
            pre tabindex="0" { code { (shown) } }
            @if is_cut { p { "Only the beginning is shown. The whole object has " (object.get().len()) " bytes." } }
        }
    }
}

/// The first `max` bytes of JSON with a line per member, and whether there are more. serde_json would round long
/// numbers.
fn indented(text: &str, max: usize) -> (String, bool) {
    let mut out = String::with_capacity(text.len().saturating_mul(2).min(max));
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    let mut chars = text.chars().peekable();
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.push_str(&"  ".repeat(depth));
    };
    while out.len() <= max
        && let Some(c) = chars.next()
    {
        if in_string {
            out.push(c);
            in_string = escaped || c != '"';
            escaped = c == '\\' && !escaped;
            continue;
        }
        match c {
            '"' => {
                in_string = true;
                out.push(c);
            }
            '{' | '[' => {
                out.push(c);
                while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
                // An empty object or array stays on its line.
                if let Some(close) = chars.next_if(|c| matches!(c, '}' | ']')) {
                    out.push(close);
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => out.push(c),
        }
    }
    let is_cut = out.len() > max;
    out.truncate(out.floor_char_boundary(max));
    (out, is_cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indented_json_keeps_every_digit_and_string() {
        let text = r#"{"n":123456789012345678901234567890.10,"s":"a \"{,}\" \\","e":{ },"l":[ 1,[]]}"#;
        insta::assert_snapshot!(indented(text, 1000).0, @r#"
        {
          "n": 123456789012345678901234567890.10,
          "s": "a \"{,}\" \\",
          "e": {},
          "l": [
            1,
            []
          ]
        }
        "#);
    }

    #[test]
    fn long_json_is_cut_between_characters() {
        assert_eq!(indented("[1]", 7), ("[\n  1\n]".into(), false));
        assert_eq!(indented("[1]", 6), ("[\n  1\n".into(), true));
        assert_eq!(indented("\"aé\"", 3), ("\"a".into(), true));
        let nested = format!(r#"{{"a":{}{}}}"#, "[".repeat(60), "]".repeat(60));
        let flat = format!(r#"{{"list":[{nested}{}]}}"#, format!(",{nested}").repeat(8500));
        let object = JsonObject::from_text(flat.clone()).unwrap();

        let html = json("Metadata", &object).0;

        assert!(flat.len() > 1 << 20 && html.len() < 2 * MAX_JSON_BYTES, "{} bytes", html.len());
        assert!(html.ends_with(&format!("The whole object has {} bytes.</p></figure>", flat.len())));
    }

    #[test]
    fn the_fragments_of_a_page_are_its_live_parts() {
        let hostile = "<!--/live--><!--live-->";
        let page =
            html! { p { "fixed" } (live("a", &html! { (hostile) })) p { "between" } (live_rows("b", &html! { "2" })) };

        let fragments: Vec<_> = live_fragments(&page).collect();

        assert_eq!(fragments.len(), 2, "{fragments:?}");
        assert!(fragments[0].starts_with(r#"<div data-live="a">&lt;!--"#), "{fragments:?}");
        assert_eq!(fragments[1], r#"<div data-live="b" data-rows>2</div>"#);
    }

    #[test]
    fn spans_have_at_most_two_units() {
        let spans = [0, 999, 1000, 9_950, 59_999, 61_000, 3_660_000, 90_000_000].map(span);
        assert_eq!(spans, ["0 ms", "999 ms", "1.0 s", "9.9 s", "59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
        let at = Timestamp::from_millis;
        assert_eq!((ago(at(0), at(500)), ago(at(5000), at(0))), ("500 ms ago".into(), "in 5.0 s".into()));
    }

    #[test]
    fn a_panel_without_data_says_why() {
        let data: Result<(), _> = Err(Fault::Unavailable("webhook-notifier does not run.".into()));
        let html = panel("Deliveries", &data, |()| html! { "content" }).into_string();
        insta::assert_snapshot!(html, @r#"<!--live--><section class="panel" data-live="Deliveries"><h2>Deliveries</h2><p class="notice" role="status">webhook-notifier does not run.</p></section><!--/live-->"#);
    }

    #[test]
    fn the_link_to_the_next_page_keeps_the_filters() {
        let cursor = Cursor::new("leads", "7");
        let html = next_page("/leads", &[("state", Some("a&b".into())), ("q", None)], Some(&cursor)).into_string();
        insta::assert_snapshot!(html, @r#"<p class="pages"><a rel="next" href="/leads?state=a%26b&amp;cursor=bGVhZHM6Nw">Next page</a></p>"#);
        assert_eq!(next_page("/leads", &[], None).into_string(), "");
    }

    #[test]
    fn a_command_uses_the_variables_of_the_guide() {
        insta::assert_snapshot!(curl("/api/v1/processes", "{}"), @r#"
        curl "$LEADRELAY_GATEWAY_URL/api/v1/processes" -H "Authorization: Bearer $LEADRELAY_API_KEY" \
          --json '{}'
        "#);
    }

    #[test]
    fn a_phone_number_is_hidden_until_it_is_revealed() {
        insta::assert_snapshot!(masked("+4915112345678").into_string(), @r#"<details class="reveal"><summary>••• 78</summary>+4915112345678</details>"#);
    }

    #[test]
    fn bars_are_relative_to_the_longest_attempt() {
        let millis = Duration::from_millis;
        let width = |ms, longest| bar(millis(ms), millis(longest)).into_string();
        assert!(width(50, 200).contains(r#"width="25""#) && width(0, 0).contains(r#"<rect width="1""#));
    }
}

//! Dead letters, for operators: the newest ones, and one with its body.

use contract::replay::Replay;
use maud::{Markup, html};

use crate::{
    dead_letters::{self, Letter, Newest},
    fault::Fault,
    pages::actions::dead_letters::endpoint,
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, fact, table, text, time},
    },
    visit::Visit,
};

/// Bytes of a body that are shown.
const SHOWN_BYTES: usize = 4096;

/// A table of dead letters, for the page of the system.
pub(super) fn rows(newest: &Newest) -> Markup {
    let Newest { letters, may_have_more } = newest;
    let rows = html! {
        @for letter in letters {
            tr {
                td { a href={ "/system/dead-letters/" (letter.number) } { (letter.number) } }
                td { (time(letter.dead_since)) }
                td { (letter.reason) }
                td { (letter.error) }
                td { (replay(letter)) }
            }
        }
    };
    html! {
        @if letters.is_empty() && !may_have_more {
            p { "None." }
        } @else if letters.is_empty() {
            p { "The newest messages are notes about replays. All letters: " code { "leadctl dead-letters list" } "." }
        } @else {
            p { "The newest ones. All of them: " code { "leadctl dead-letters list" } "." }
            (table("Dead letters", &["Number", "Since", "Reason", "Error", "Replay"], &rows))
        }
    }
}

fn replay(letter: &Letter) -> Markup {
    match letter.replay.map(|(_, replay)| replay) {
        None => badge(Kind::Bad, "not replayed"),
        Some(Replay::NotSent) => badge(Kind::Bad, "a replay was refused"),
        Some(Replay::Begun) => badge(Kind::Waiting, "maybe replayed"),
        Some(Replay::Sent { sequence }) => badge(Kind::Good, &format!("replayed as entry {sequence}")),
    }
}

/// `GET /system/dead-letters/{number}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    visit.all_projects()?;
    let number = visit.id("number")?;
    let (letter, message) = dead_letters::get(&visit.app.broker()?.js, number).await?;
    let content = render(&letter, &message.payload, visit.session.may_act());
    Ok(Page::Show { title: format!("Dead letter {number}"), section: Section::None, content })
}

/// Whether the gateway has an endpoint for the letter's command, a form keeps its body, and it was not replayed.
fn may_replay(letter: &Letter, body: &[u8]) -> bool {
    let was_not_sent = matches!(letter.replay, None | Some((_, Replay::NotSent)));
    endpoint(letter).is_some() && was_not_sent && std::str::from_utf8(body).is_ok()
}

pub(super) fn render(letter: &Letter, body: &[u8], may_act: bool) -> Markup {
    let shown = String::from_utf8_lossy(body.get(..SHOWN_BYTES).unwrap_or(body));
    let command = format!(
        "leadctl dead-letters replay {0}\n\n# With a corrected body:\nleadctl dead-letters replay {0} --body corrected.json",
        letter.number
    );
    html! {
        dl.facts {
            (fact("Reason", text(Some(&letter.reason))))
            (fact("Error", text(Some(&letter.error))))
            (fact("Subject", Some(html! { span.id { (letter.subject) } })))
            (fact("Since", Some(time(letter.dead_since))))
            (fact("Replay", Some(replay(letter))))
            (fact("Truncated from", letter.truncated_from.map(|bytes| html! { (bytes) " bytes" })))
        }
        section.panel {
            h2 { "Body" }
            pre tabindex="0" { code { (shown) } }
            @if body.len() > SHOWN_BYTES { p { "The first " (SHOWN_BYTES) " of " (body.len()) " bytes." } }
        }
        section.panel {
            h2 { "Replay" }
            @if may_act && may_replay(letter, body) {
                p { a href={ "/system/dead-letters/" (letter.number) "/replay" } { "Replay it, perhaps corrected" } }
            }
            p { "On the command line, also to another project, or once more:" }
            pre tabindex="0" { code { (command) } }
        }
        p { a href="/system" { "Back to the system" } }
    }
}

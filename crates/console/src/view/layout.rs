//! The frame of every page.

use contract::{ObjectId, Timestamp};
use maud::{DOCTYPE, Markup, html};

use crate::{
    assets,
    fault::Fault,
    session::Session,
    view::parts::{clock_time, notice},
};

/// The part of a project's navigation that a page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    None,
    Board,
    Updates,
    Leads,
    Calls,
    Deliveries,
    Callbacks,
    Processes,
    Keys,
}

/// Key, section, path below the project, and title.
const SECTIONS: [(char, Section, &str, &str); 8] = [
    ('b', Section::Board, "", "Board"),
    ('u', Section::Updates, "/updates", "Updates"),
    ('l', Section::Leads, "/leads", "Leads"),
    ('t', Section::Calls, "/calls", "Calls"),
    ('d', Section::Deliveries, "/deliveries", "Deliveries"),
    ('c', Section::Callbacks, "/callbacks", "Callbacks"),
    ('p', Section::Processes, "/processes", "Processes"),
    ('k', Section::Keys, "/keys", "API keys"),
];

/// What surrounds a page's content.
pub(crate) struct Frame<'a> {
    pub(crate) title: &'a str,
    pub(crate) session: Option<&'a Session>,
    pub(crate) project: Option<ObjectId>,
    pub(crate) section: Section,
    pub(crate) now: Timestamp,
    /// Whether a stream keeps the page current.
    pub(crate) is_live: bool,
}

/// A whole page.
pub(crate) fn page(frame: &Frame<'_>, content: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (frame.title) " · Leadrelay" }
                link rel="icon" href="data:,";
                link rel="stylesheet" href=(*assets::STYLE);
                script src=(*assets::SCRIPT) defer {}
            }
            body {
                a.skip href="#main" { "Skip to the content" }
                (header(frame))
                @if let (Some(project), Some(_)) = (frame.project, frame.session) { (navigation(project, frame.section)) }
                main #main tabindex="-1" {
                    h1 { (frame.title) }
                    @if frame.is_live {
                        // Shown by the script, which fills it.
                        p #live hidden { span {} " " button.quiet type="button" aria-pressed="false" { "Pause" } }
                    }
                    (content)
                }
                (footer(frame))
            }
        }
    }
}

fn header(frame: &Frame<'_>) -> Markup {
    html! {
        header.top {
            a.brand href="/" { "Leadrelay" }
            @if let Some(session) = frame.session {
                @if let Some(project) = frame.project {
                    form.search action={ "/p/" (project) "/go" } role="search" {
                        label.hidden for="search" {
                            "Id of a lead, update, delivery, callback or process; or name, reference, phone or e-mail of a lead"
                        }
                        input #search name="q" type="search" autocomplete="off"
                            placeholder="Id, or a lead's name, reference, phone, e-mail";
                        button { "Go" }
                    }
                }
                form.account action="/logout" method="post" {
                    input type="hidden" name="form_token" value=(session.form_token);
                    span { (session.name()) }
                    button.quiet { "Sign out" }
                }
            }
        }
    }
}

fn navigation(project: ObjectId, current: Section) -> Markup {
    html! {
        nav.sections aria-label="Project" {
            ul {
                @for (key, section, path, title) in SECTIONS {
                    li {
                        a href={ "/p/" (project) (path) } data-key=(key) aria-current=[(section == current).then_some("page")] {
                            (title)
                        }
                    }
                }
            }
        }
    }
}

fn footer(frame: &Frame<'_>) -> Markup {
    html! {
        footer.bottom {
            p { "As of " span #as-of { (clock_time(frame.now)) } " · all times are UTC · Leadrelay " (env!("CARGO_PKG_VERSION")) }
            details #keys {
                summary { "Keyboard" }
                dl {
                    @for (key, _, _, title) in SECTIONS {
                        dt { kbd { "g" } " " kbd { (key) } }
                        dd { (title) }
                    }
                    dt { kbd { "/" } }
                    dd { "Search" }
                    dt { kbd { "j" } " " kbd { "k" } }
                    dd { "Next and previous row; Enter opens it" }
                    dt { kbd { "]" } }
                    dd { "Next page of a list" }
                    dt { kbd { "." } }
                    dd { "Pause the live page, and go on" }
                    dt { kbd { "?" } }
                    dd { "This list" }
                }
            }
        }
    }
}

/// The content of a page that cannot be shown.
pub(crate) fn fault(fault: &Fault) -> Markup {
    html! {
        (notice(fault))
        p { a href="/" { "All projects" } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Role;

    #[test]
    fn a_page_has_a_frame_without_anything_inline() {
        let session = Session {
            role: Role::Operator,
            form_token: "f0".into(),
            ends_at: Timestamp::from_millis(0),
            credential: None,
        };
        let frame = Frame {
            title: "A <title>",
            session: Some(&session),
            project: Some(ObjectId::from_bytes([0x11; 12])),
            section: Section::Leads,
            now: Timestamp::from_millis(1_768_193_759_048),
            is_live: true,
        };

        let page = page(&frame, &html! { p { "content" } }).into_string();

        assert!(page.contains("<title>A &lt;title&gt; · Leadrelay</title>"), "{page}");
        assert!(page.contains(r#"<input type="hidden" name="form_token" value="f0">"#), "{page}");
        assert!(
            page.contains(r#"href="/p/111111111111111111111111/leads" data-key="l" aria-current="page""#),
            "{page}"
        );
        // The content security policy forbids all of these.
        for inline in ["<style", "style=", "onclick", "javascript:", "http://", "https://"] {
            assert!(!page.contains(inline), "{inline}: {page}");
        }
    }

    #[test]
    fn a_visitor_without_a_session_gets_no_navigation() {
        let frame = Frame {
            title: "t",
            session: None,
            project: None,
            section: Section::None,
            now: Timestamp::from_millis(0),
            is_live: false,
        };
        let page = page(&frame, &html! {}).into_string();
        assert!(!page.contains("<nav") && !page.contains("form"), "{page}");
    }
}

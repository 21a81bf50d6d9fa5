//! The frame of every page.

use contract::{ObjectId, Timestamp};
use maud::{DOCTYPE, Markup, html};

use crate::{
    assets,
    fault::Fault,
    session::{Role, Session},
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

/// The parameters of the frame around a page's content.
pub(crate) struct Frame<'a> {
    pub(crate) title: &'a str,
    pub(crate) session: Option<&'a Session>,
    pub(crate) project: Option<ObjectId>,
    pub(crate) section: Section,
    pub(crate) now: Timestamp,
    /// Whether a stream keeps the page current.
    pub(crate) is_live: bool,
}

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
                @if let Some(session) = frame.session { (palette(session, frame.project)) }
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

/// A dialog that leads to a page by its name, or to an id. The script opens it; without the script the navigation and
/// the search do the same.
fn palette(session: &Session, project: Option<ObjectId>) -> Markup {
    // Portal links show no other page.
    if matches!(session.role, Role::Portal(_)) {
        return html! {};
    }
    // Outside a project the palette finds ids only.
    let label = if project.is_some() { "Page, id, reference, phone or e-mail" } else { "Page or id" };
    let below = project.map(|project| format!("/p/{project}"));
    let pages = below.iter().flat_map(|base| SECTIONS.map(|(.., path, title)| (format!("{base}{path}"), title)));
    let of_operators = [("/".to_owned(), "Projects"), ("/system".to_owned(), "System")];
    let of_operators = of_operators.into_iter().filter(|_| session.role.sees_all());
    let go = below.as_ref().map_or_else(|| "/go/".to_owned(), |base| format!("{base}/go?q="));
    html! {
        dialog #palette aria-label="Go to" {
            label for="palette-text" { (label) }
            input #palette-text type="text" role="combobox" aria-expanded="true" aria-controls="palette-pages"
                aria-autocomplete="list" autocomplete="off" spellcheck="false";
            ul #palette-pages role="listbox" aria-label="Pages" {
                @for (number, (path, title)) in pages.chain(of_operators).enumerate() {
                    li id={ "palette-" (number) } role="option" aria-selected="false" data-href=(path) { (title) }
                }
                li #palette-go role="option" aria-selected="false" data-go=(go) hidden {}
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
                    dt { kbd { "Ctrl" } " " kbd { "K" } }
                    dd {
                        "Go to a page by its name, or to an id"
                        @if frame.project.is_some() { ", reference, phone or e-mail" }
                    }
                    dt { kbd { "/" } }
                    dd { "Search" }
                    dt { kbd { "j" } " " kbd { "k" } }
                    dd { "Next and previous row; Enter opens it" }
                    dt { kbd { "]" } }
                    dd { "Next page of a list" }
                    dt { kbd { "." } }
                    dd { "Pause and resume the live page" }
                    dt { kbd { "?" } }
                    dd { "This list" }
                }
                // Shown by the script. Speech input and slips type keys (WCAG 2.1.4).
                p #single-keys hidden { label { input type="checkbox" checked; " Use the keys without Ctrl" } }
            }
        }
    }
}

/// The content of a page that cannot be shown.
pub(crate) fn fault(fault: &Fault, session: Option<&Session>) -> Markup {
    html! {
        (notice(fault))
        ul.actions {
            li { a href="/" { "All projects" } }
            // A session of a portal link that has ended does not lead there.
            @if session.is_none() { li { a href="/login" { "Sign in" } } }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use contract::console::PortalTarget;

    use super::*;
    use crate::session::{Portal, tests::key};

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
        let options: Vec<_> =
            page.split(r#"role="option""#).skip(1).filter_map(|rest| rest.split('>').nth(1)).collect();
        let expected = ["Board", "Updates", "Leads", "Calls", "Deliveries", "Callbacks", "Processes", "API keys"];
        let expected: Vec<_> =
            expected.iter().chain(&["Projects", "System", ""]).map(|name| format!("{name}</li")).collect();
        assert_eq!(options, expected);
        // The content security policy forbids all of these.
        for inline in ["<style", "style=", "onclick", "javascript:", "http://", "https://"] {
            assert!(!page.contains(inline), "{inline}: {page}");
        }
    }

    #[test]
    fn the_palette_leads_a_key_to_its_project_and_a_portal_link_nowhere() {
        let project = ObjectId::from_bytes([0x11; 12]);
        let session =
            |role| Session { role, form_token: "f0".into(), ends_at: Timestamp::from_millis(0), credential: None };
        let key = palette(&session(Role::Key(Arc::new(key()))), Some(project)).0;
        assert!(key.contains(r#"data-href="/p/111111111111111111111111/keys""#), "{key}");
        assert!(key.contains(r#"data-go="/p/111111111111111111111111/go?q=""#), "{key}");
        assert!(!key.contains(r#"data-href="/system""#), "{key}");
        let operator = palette(&session(Role::Operator), None).0;
        assert!(operator.contains(r#"data-go="/go/""#) && operator.contains(r#"data-href="/system""#), "{operator}");
        assert!(key.contains("phone") && !operator.contains("phone"), "{operator}");
        let target = PortalTarget::CallbackId(project);
        let portal = Portal { project_id: project, target, may_act: false, name: "0".into() };
        assert_eq!(palette(&session(Role::Portal(Arc::new(portal))), None).0, "");
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

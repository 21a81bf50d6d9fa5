//! Processes: a list, and one with its states, policies and callbacks.

use contract::{
    ObjectId,
    key::Scope,
    process::{DuringCall, MetadataMerge, Process},
    rpc::{GetProcess, ListProcesses, Page as ListPage, ProcessSelector},
    subject::NO_PROCESS,
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::Page,
    view::{
        graph,
        layout::Section,
        parts::{curl, empty, fact, next_page, span, table, text},
    },
    visit::{PAGE, Visit},
};

/// `GET /p/{project}/processes`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let page = visit.request(&ListProcesses { project_id, cursor: visit.cursor(), limit: PAGE }).await?;
    let body = r#"{"name":"sales","states":[{"name":"new","kind":"initial"},{"name":"won","kind":"terminal"}]}"#;
    let content = render_list(project_id, &page, &curl("/api/v1/processes", body));
    Ok(Page::Show { title: "Processes".into(), section: Section::Processes, content })
}

pub(super) fn render_list(project: ObjectId, page: &ListPage<Process>, curl: &str) -> Markup {
    html! {
        @if page.items.is_empty() && page.next.is_none() {
            (empty("There are no processes yet. This command creates the first one:", Some(curl)))
        } @else {
            (rows(project, &page.items))
            (next_page(&format!("/p/{project}/processes"), &[], page.next.as_ref()))
        }
    }
}

/// A table of processes.
pub(super) fn rows(project: ObjectId, processes: &[Process]) -> Markup {
    let rows = html! {
        @for process in processes {
            tr {
                td { a href={ "/p/" (project) "/processes/" (segment(process)) } { (name(process)) } }
                td.number { (process.rules.states.len()) }
                td.number { (process.callbacks.len()) }
                td.number { (process.revision) }
            }
        }
    };
    table("Processes", &["Name", "States", "Callbacks", "Revision"], &rows)
}

/// The path segment that names a process in URLs.
pub(super) fn segment(process: &Process) -> String {
    process.process_id.map_or_else(|| NO_PROCESS.to_owned(), |id| id.to_string())
}

fn name(process: &Process) -> &str {
    if process.process_id.is_none() { "Fallback callbacks" } else { &process.name }
}

/// The process that a path segment names.
pub(super) fn selector(segment: &str) -> Result<ProcessSelector, Fault> {
    if segment == NO_PROCESS {
        return Ok(ProcessSelector::Named(NO_PROCESS.to_owned()));
    }
    segment.parse().map(ProcessSelector::Id).map_err(|_| Fault::no_page())
}

/// `GET /p/{project}/processes/{process}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let process = selector(visit.segment("process"))?;
    let process = visit.request(&GetProcess { project_id, process }).await?;
    let title = name(&process).to_owned();
    Ok(Page::Show {
        title,
        section: Section::Processes,
        content: render(project_id, &process, visit.session.may_act()),
    })
}

pub(super) fn render(project: ObjectId, process: &Process, may_act: bool) -> Markup {
    let rules = &process.rules;
    let rows = html! {
        @for callback in &process.callbacks {
            tr {
                td { a href={ "/p/" (project) "/callbacks/" (callback.callback_id) } { (callback.name) } }
                td { (callback.url) }
                td { (if callback.enabled { "on" } else { "off" }) }
            }
        }
    };
    let merge = match rules.metadata_merge {
        MetadataMerge::Shallow => "key by key",
        MetadataMerge::Deep => "deep (RFC 7396)",
    };
    let during_call = match rules.during_call {
        DuringCall::Reject => "updates fail",
        DuringCall::Queue => "updates are queued until it ends",
    };
    html! {
        dl.facts {
            (fact("Id", process.process_id.map(|id| html! { span.id { (id) } })))
            (fact("Revision", Some(html! { (process.revision) })))
            @if process.process_id.is_some() {
                (fact("Metadata is merged", text(Some(merge))))
                (fact("During a call", text(Some(during_call))))
                (fact("A call ends after", Some(html! { (span(i64::from(rules.call_timeout_seconds) * 1000)) })))
                (fact("Leaving terminal states", text(Some(if rules.allow_leaving_terminal { "allowed" } else { "refused" }))))
            }
        }
        @if process.process_id.is_some() {
            section.panel {
                h2 { "States" }
                (graph::states(rules, None))
            }
            ul.actions {
                li { a href={ "/p/" (project) "/leads?process=" (segment(process)) } { "Leads of this process" } }
                @if may_act { li { a href={ "/p/" (project) "/processes/" (segment(process)) "/edit" } { "Edit" } } }
                li {
                    a href={ "/p/" (project) "/processes/" (segment(process)) "/share" } {
                        (if may_act { "Share" } else { "Portal links" })
                    }
                }
            }
        } @else {
            p { "These callbacks receive the outcomes of updates whose lead is unknown." }
        }
        section.panel {
            h2 { "Callbacks" }
            @if process.callbacks.is_empty() {
                p { "No callback: outcomes are recorded, but not delivered." }
            } @else {
                (table("Callbacks", &["Name", "URL", "Switched"], &rows))
            }
        }
    }
}

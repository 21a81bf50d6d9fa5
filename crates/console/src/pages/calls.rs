//! Calls in progress.

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    rpc::{Call, ListCalls, Page as ListPage},
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::Page,
    view::{
        layout::Section,
        parts::{ago, curl, empty, link, live, next_page, table, time},
    },
    visit::{PAGE, Visit},
};

/// `GET /p/{project}/calls`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let query = ListCalls { project_id, lead_id: None, cursor: visit.cursor(), limit: PAGE };
    let page = visit.request(&query).await?;
    let curl = curl("/api/v1/calls/started", r#"{"leadId":"LEAD_ID","callId":"call-1"}"#);
    let content = render_list(project_id, &page, visit.session.may_act(), visit.now, &curl);
    Ok(Page::list(&visit, "Calls in progress", Section::Calls, live("calls", &content)))
}

pub(super) fn render_list(
    project: ObjectId,
    page: &ListPage<Call>,
    may_act: bool,
    now: Timestamp,
    curl: &str,
) -> Markup {
    html! {
        @if page.items.is_empty() && page.next.is_none() {
            (empty("No call is in progress. This command reports the start of one:", Some(curl)))
        } @else {
            (rows(project, &page.items, may_act, now))
            (next_page(&format!("/p/{project}/calls"), &[], page.next.as_ref()))
        }
    }
}

/// A table of calls. For visitors who may act, each call has a link that ends it.
pub(super) fn rows(project: ObjectId, calls: &[Call], may_act: bool, now: Timestamp) -> Markup {
    let rows = html! {
        @for call in calls {
            tr {
                td { (link(project, "leads", call.lead_id)) }
                td { (call.call_id.as_deref().unwrap_or("without an id")) }
                td { (time(call.started_at)) " (" (ago(call.started_at, now)) ")" }
                td { (time(call.expires_at)) " (" (ago(call.expires_at, now)) ")" }
                @if may_act { td { a href=(end_path(project, call)) { "End the call" } } }
            }
        }
    };
    let columns = ["Lead", "Call", "In progress since", "Expires", "Action"];
    table("Calls in progress", if may_act { &columns } else { &columns[..4] }, &rows)
}

/// The page that ends a call. A call without an id can only be ended together with all other calls of its lead.
fn end_path(project: ObjectId, call: &Call) -> String {
    let path = format!("/p/{project}/leads/{}/end-call", call.lead_id);
    let Some(call_id) = &call.call_id else { return path };
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("call", call_id);
    format!("{path}?{}", query.finish())
}

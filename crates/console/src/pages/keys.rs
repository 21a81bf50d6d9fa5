//! The API keys of a project.

use contract::{
    ObjectId, Timestamp,
    key::{ApiKey, Scope},
    rpc::{ListKeys, Page as ListPage},
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, empty, next_page, table, time},
    },
    visit::{PAGE, Visit},
};

/// `GET /p/{project}/keys`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let query = ListKeys { project_id, key_id: None, cursor: visit.cursor(), limit: PAGE };
    let page = visit.request(&query).await?;
    let content = render(project_id, &page, visit.session.may_act(), visit.now);
    Ok(Page::Show { title: "API keys".into(), section: Section::Keys, content })
}

pub(super) fn render(project: ObjectId, page: &ListPage<ApiKey>, may_act: bool, now: Timestamp) -> Markup {
    let rows = html! {
        @for key in &page.items {
            tr {
                td { (key.name) }
                td { (status(key, now)) }
                td { (scopes(key)) }
                td { (time(key.created_at)) }
                td { @match key.last_used_at { Some(at) => (time(at)), None => "never" } }
                td { @match key.expires_at { Some(at) => (time(at)), None => "never" } }
                td { a href={ "/p/" (project) "/updates?key=" (key.key_id) } { "Updates" } }
                @if may_act {
                    td {
                        @if key.revoked_at.is_none() {
                            a href={ "/p/" (project) "/keys/" (key.key_id) "/revoke" } { "Revoke" }
                        }
                    }
                }
            }
        }
    };
    let columns = ["Name", "Status", "Scopes", "Created", "Last used", "Expires", "Last 24 hours", "Action"];
    let columns = if may_act { &columns[..] } else { &columns[..7] };
    let command = format!("leadctl key create --project {project} --name crm --scope leads:read --scope leads:write");
    html! {
        @if !page.items.is_empty() { (table("API keys", columns, &rows)) }
        (next_page(&format!("/p/{project}/keys"), &[], page.next.as_ref()))
        (empty("An operator creates a key with this command, which prints its text once:", Some(&command)))
    }
}

/// Whether a key is accepted.
pub(super) fn status(key: &ApiKey, now: Timestamp) -> Markup {
    match key.revoked_at {
        Some(at) => html! { (badge(Kind::Off, "revoked")) " " (time(at)) },
        None if key.is_valid(now) => badge(Kind::Good, "valid"),
        None => badge(Kind::Off, "expired"),
    }
}

/// What a key may do.
pub(super) fn scopes(key: &ApiKey) -> String {
    key.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(", ")
}

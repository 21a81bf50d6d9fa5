//! The projects that a visitor may see.

use std::{collections::BTreeMap, sync::Arc};

use contract::{ObjectId, key::ApiKey};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::Page,
    session::Role,
    view::{
        layout::Section,
        parts::{empty, table},
    },
    visit::Visit,
};

/// `GET /`: redirects an API key to its project; shows operators and viewers the list of projects.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    match &visit.session.role {
        Role::Key(key) => return Ok(Page::Redirect(format!("/p/{}", key.project_id))),
        Role::Portal(_) => return Ok(Page::Redirect("/portal".into())),
        Role::Operator | Role::Viewer => {}
    }
    let content = render(&visit.app.keys.all());
    Ok(Page::Show { title: "Projects".into(), section: Section::None, content })
}

/// The projects that have an API key, with the names of their keys.
pub(super) fn render(keys: &[Arc<ApiKey>]) -> Markup {
    let mut projects: BTreeMap<ObjectId, Vec<&str>> = BTreeMap::new();
    for key in keys {
        projects.entry(key.project_id).or_default().push(&key.name);
    }
    projects.values_mut().for_each(|names| names.sort_unstable());
    let rows = html! {
        @for (project, names) in &projects {
            tr {
                td { a.id href={ "/p/" (project) } { (project) } }
                td { (names.join(", ")) }
            }
        }
    };
    html! {
        @if projects.is_empty() {
            (empty("No project has an API key yet. These commands create both:", Some(
                "leadctl project create --name Sales\nleadctl key create --project PROJECT_ID --name crm")))
        } @else {
            p { "The projects that have an API key." }
            (table("Projects", &["Project", "API keys"], &rows))
        }
        p { a href="/system" { "The system: services, streams, dead letters" } }
    }
}

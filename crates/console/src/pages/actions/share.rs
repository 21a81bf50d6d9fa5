//! Shares one process or callback with people outside the project, by a link that expires.

use contract::{
    ObjectId, Timestamp,
    console::{OpenPortalLink, PORTAL_AGE, PORTAL_DEFAULT_AGE, PortalTarget},
    key::Scope,
    rpc::{CallbackStatus, GetProcess, ProcessSelector},
};
use maud::{Markup, html};
use std::time::Duration;

use super::token_field;
use crate::{
    fault::Fault,
    login_link,
    portal_link::{self, NewPortalLink, PortalLinkError},
    respond::Page,
    session::Role,
    view::{
        layout::Section,
        parts::{ago, panel, table, time},
    },
    visit::Visit,
};

/// The shared process or callback: its page, its name, and its section.
struct Shared {
    project_id: ObjectId,
    target: PortalTarget,
    path: String,
    name: String,
    section: Section,
}

impl Shared {
    /// The process or callback of the path. Fails unless the visitor may see everything that the link shows.
    async fn of(visit: &Visit) -> Result<Self, Fault> {
        let project_id = visit.project(Scope::ConfigRead)?;
        visit.session.role.check(project_id, Scope::LeadsRead)?;
        if visit.segment("callback").is_empty() {
            let process_id: ObjectId = visit.id("process")?;
            let query = GetProcess { project_id, process: ProcessSelector::Id(process_id) };
            let name = format!("process {}", visit.request(&query).await?.name);
            let path = format!("/p/{project_id}/processes/{process_id}");
            let target = PortalTarget::ProcessId(process_id);
            return Ok(Self { project_id, target, path, name, section: Section::Processes });
        }
        let callback = visit.callback(project_id).await?;
        let path = format!("/p/{project_id}/callbacks/{}", callback.callback_id);
        let target = PortalTarget::CallbackId(callback.callback_id);
        Ok(Self { project_id, target, path, name: format!("callback {}", callback.name), section: Section::Callbacks })
    }

    fn page(&self, content: &Markup) -> Page {
        let content = html! { (content) p { a href=(self.path) { "Back to the " (self.name) } } };
        Page::Show { title: "Share".into(), section: self.section, content }
    }

    /// The forms, and the open links of the project.
    async fn forms(&self, visit: &Visit) -> Markup {
        let may_act = acting_key(visit, self.project_id).map(drop);
        let (links, callbacks) = tokio::join!(open_links(visit, self.project_id), visit.callbacks(self.project_id));
        let names = TargetNames { project_id: self.project_id, callbacks: callbacks.unwrap_or_default() };
        let form_token = visit.session.may_act().then_some(visit.session.form_token.as_str());
        html! {
            @if let Some(form_token) = form_token { (render(&self.name, &self.path, form_token, may_act)) }
            (render_links(&links, &names, &self.path, form_token, visit.now))
        }
    }
}

/// `GET /p/{project}/callbacks/{callback}/share`, and the same for a process.
pub(crate) async fn form(visit: Visit) -> Result<Page, Fault> {
    let shared = Shared::of(&visit).await?;
    Ok(shared.page(&shared.forms(&visit).await))
}

/// The names of the processes and callbacks that links show, as far as they are known.
pub(in crate::pages) struct TargetNames {
    pub(in crate::pages) project_id: ObjectId,
    pub(in crate::pages) callbacks: Vec<CallbackStatus>,
}

impl TargetNames {
    fn link(&self, target: PortalTarget) -> Markup {
        let (kind, list, id, name) = match target {
            PortalTarget::ProcessId(id) => {
                let callback = self.callbacks.iter().find(|callback| callback.process_id == Some(id));
                ("process", "processes", id, callback.map(|callback| &callback.process))
            }
            PortalTarget::CallbackId(id) => {
                let callback = self.callbacks.iter().find(|callback| callback.callback_id == id);
                ("callback", "callbacks", id, callback.map(|callback| &callback.name))
            }
        };
        html! {
            (kind) " "
            a href={ "/p/" (self.project_id) "/" (list) "/" (id) } {
                @match name { Some(name) => (name), None => (id) }
            }
        }
    }
}

/// The key that visitors of a link act with: the session's.
fn acting_key(visit: &Visit, project_id: ObjectId) -> Result<&contract::secret::Secret, Fault> {
    visit.session.credential(project_id, Scope::LeadsWrite)?;
    visit.session.credential(project_id, Scope::ConfigWrite)
}

pub(in crate::pages) fn render(name: &str, path: &str, form_token: &str, may_act: Result<(), Fault>) -> Markup {
    html! {
        section.panel {
            p {
                "A link shows the " b { (name) } " to people outside the project: health, deliveries, attempts and the first bytes of \
                responses, of a process also the outcomes of its updates. It shows no leads, no configuration, and nothing else of \
                the project. It works for everyone who has it, until it ends."
            }
            form.action action={ (path) "/share" } method="post" {
                (token_field(form_token))
                label for="hours" { "Valid for hours" }
                input #hours name="hours" type="number" min="1" max=(PORTAL_AGE.as_secs() / 3600) required
                    value=(PORTAL_DEFAULT_AGE.as_secs() / 3600);
                @match may_act {
                    Ok(()) => label {
                        input type="checkbox" name="act" value="yes";
                        " Visitors may send tests and redeliver, with the API key of this session"
                    },
                    Err(_) => p {
                        "Visitors may only view: a link whose visitors may send tests and redeliver needs an API key of this \
                        project with the scopes leads:write and config:write."
                    },
                }
                button { "Make a link" }
            }
        }
    }
}

/// The open links of a project. With a form token, each link has a button that revokes it, and a further form revokes a
/// link by its URL, token or id.
pub(in crate::pages) fn render_links(
    links: &Result<Vec<OpenPortalLink>, Fault>,
    names: &TargetNames,
    path: &str,
    form_token: Option<&str>,
    now: Timestamp,
) -> Markup {
    let columns = ["Link", "Shows", "Visitors may", "Made by", "Until", "Action"];
    let shown = if form_token.is_some() { &columns[..] } else { &columns[..5] };
    html! {
        (panel("Open links of the project", links, |links| {
            let rows = html! {
                @for link in links {
                    tr {
                        td { span.id { (link.id) } }
                        td { (names.link(link.target)) }
                        td { @if link.may_act { "test, redeliver" } @else { "only look" } }
                        td { (link.made_by) }
                        td { (time(link.ends_at)) " (" (ago(link.ends_at, now)) ")" }
                        @if let Some(form_token) = form_token { td {
                            form action={ (path) "/share" } method="post" {
                                (token_field(form_token))
                                input type="hidden" name="link" value=(link.id);
                                button aria-label={ "Revoke the link " (link.id) } { "Revoke" }
                            }
                        } }
                    }
                }
            };
            html! {
                @if links.is_empty() { p { "None." } } @else { (table("Open links", shown, &rows)) }
            }
        }))
        @if let Some(form_token) = form_token {
            section.panel {
                h2 { "Revoke a link" }
                form.action action={ (path) "/share" } method="post" {
                    (token_field(form_token))
                    label for="link" { "The link" }
                    input #link name="link" type="text" required autocomplete="off" spellcheck="false";
                    button { "Revoke the link" }
                }
            }
        }
    }
}

/// `POST /p/{project}/callbacks/{callback}/share`, and the same for a process: makes a link, or revokes the link that
/// the form names.
pub(crate) async fn submit(visit: Visit) -> Result<Page, Fault> {
    let shared = Shared::of(&visit).await?;
    let (who, project_id, name) = (visit.session.identity(), shared.project_id, &shared.name);
    let js = &visit.app.broker()?.js;
    let failed = |e: anyhow::Error| {
        tracing::warn!("a portal link was not written: {e:#}");
        Fault::Unavailable("The bucket of links cannot be written. Try again.".into())
    };
    if let Some(link) = visit.entered("link") {
        let id = open_link(&visit, project_id, link).await?;
        portal_link::revoke_portal_link(js, Some(project_id), &id).await.map_err(failed)?;
        tracing::info!(who, %project_id, object = name, link = id, "action revoke portal link: done");
        let forms = shared.forms(&visit).await;
        return Ok(shared.page(&html! {
            p role="status" { "The link " span.id { (id) } " is revoked: it no longer works." }
            (forms)
        }));
    }
    let hours: u64 = visit.field("hours")?;
    let age = Duration::from_secs(hours.saturating_mul(3600));
    if age.is_zero() || age > PORTAL_AGE {
        return Err(Fault::Invalid("hours must be a number from 1 to 168.".into()));
    }
    let may_act = visit.entered("act").is_some();
    let key = match &visit.session.role {
        _ if may_act => Some(acting_key(&visit, project_id)?.clone()),
        Role::Key(_) => Some(visit.session.credential(project_id, Scope::ConfigRead)?.clone()),
        Role::Operator | Role::Viewer | Role::Portal(_) => None,
    };
    let new = NewPortalLink { project_id, target: shared.target, age, made_by: who.clone(), key, may_act };
    let token = portal_link::create_portal_link(js, new).await.map_err(|error| match error {
        PortalLinkError::TooMany(made) => Fault::Invalid(format!(
            "The project has made {made} portal links within 7 days, the most it may. Try later."
        )),
        PortalLinkError::NotMade(e) => failed(e),
    })?;
    let link = portal_link::id(&token);
    tracing::info!(who, %project_id, object = name, link, hours, may_act, "action share: done");
    let content = html! {
        p { "Copy the link now: it is not shown again. It is valid for " (hours) " hours." }
        pre tabindex="0" { code { (login_link::login_url(&visit.app.public.origin, &token)) } }
    };
    Ok(shared.page(&content))
}

/// The open links of a project. They count towards the visitor's rate of pages.
async fn open_links(visit: &Visit, project_id: ObjectId) -> Result<Vec<OpenPortalLink>, Fault> {
    portal_link::list(&visit.app, &visit.session.visitor(), project_id, visit.now).await
}

/// The id of an open link of the project, given its URL, token or id.
async fn open_link(visit: &Visit, project_id: ObjectId, link: &str) -> Result<String, Fault> {
    let id = portal_link::token_in(link).map_or_else(|| link.to_owned(), portal_link::id);
    let open = open_links(visit, project_id).await?;
    if open.iter().any(|known| known.id == id) {
        return Ok(id);
    }
    Err(Fault::NotFound("This project has no such link: it has ended, was revoked, or is another project's.".into()))
}

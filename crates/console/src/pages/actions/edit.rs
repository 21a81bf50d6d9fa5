//! Edits the rules of a process: shows them as text, previews the differences from the configuration, then applies
//! exactly these differences.

use contract::{
    ObjectId,
    key::Scope,
    process::Process,
    rpc::{GetProcess, ProcessSelector},
};
use http_api::{ChangeResponse, ConfiguredProcess};
use maud::{Markup, html};
use reqwest::Method;
use serde_json::Value;

use super::{key_form, token_field};
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{diff::diff, layout::Section, parts::notice},
    visit::{Action, Visit},
};

/// Members of a process that its page does not edit: callbacks and sources have actions and secrets of their own.
const KEPT: [&str; 5] = ["processId", "projectId", "version", "callbacks", "sources"];

/// The process of the path.
async fn process(visit: &Visit) -> Result<Process, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let process_id: ObjectId = visit.id("process")?;
    visit.request(&GetProcess { project_id, process: ProcessSelector::Id(process_id) }).await
}

/// The name and the rules of a process as indented JSON.
fn text(process: &Process) -> Result<String, Fault> {
    let unreadable = |e: serde_json::Error| Fault::Invalid(format!("The process cannot be written as JSON: {e}."));
    let mut object = serde_json::to_value(ConfiguredProcess::from(process.clone())).map_err(unreadable)?;
    if let Some(members) = object.as_object_mut() {
        members.retain(|name, value| !KEPT.contains(&name.as_str()) && !value.is_null());
    }
    serde_json::to_string_pretty(&object).map_err(unreadable)
}

/// The entered text in the format of [`text`], so that the diff shows only changes of the content.
fn normalized(entered: &str) -> Result<String, Fault> {
    let invalid = |e: serde_json::Error| Fault::Invalid(format!("This is not a JSON object: {e}."));
    let object: serde_json::Map<String, Value> = serde_json::from_str(entered).map_err(invalid)?;
    serde_json::to_string_pretty(&object).map_err(invalid)
}

/// The content of the page that edits a process.
pub(in crate::pages) struct EditPage<'a> {
    pub(in crate::pages) path: String,
    pub(in crate::pages) form_token: &'a str,
    pub(in crate::pages) allowed: Result<(), Fault>,
    pub(in crate::pages) current: String,
    pub(in crate::pages) version: i64,
    pub(in crate::pages) entered: Option<String>,
    /// Why the entered text was not applied.
    pub(in crate::pages) refused: Option<Fault>,
    /// Whether somebody else changed the process since the form was opened.
    pub(in crate::pages) is_conflict: bool,
}

impl<'a> EditPage<'a> {
    fn new(visit: &'a Visit, process: &Process) -> Result<Self, Fault> {
        Ok(Self {
            path: format!("/p/{}/processes/{}/edit", process.project_id, visit.segment("process")),
            form_token: &visit.session.form_token,
            allowed: visit.session.credential(process.project_id, Scope::ConfigWrite).map(drop),
            current: text(process)?,
            version: process.revision,
            entered: None,
            refused: None,
            is_conflict: false,
        })
    }

    fn show(&self) -> Page {
        Page::Show { title: "Edit a process".into(), section: Section::Processes, content: self.render() }
    }

    pub(in crate::pages) fn render(&self) -> Markup {
        html! {
            @match &self.allowed {
                Err(fault) => { (notice(fault)) (key_form(&self.path, self.form_token)) }
                Ok(()) => {
                    @if let Some(fault) = &self.refused { (notice(fault)) }
                    @if let Some(entered) = &self.entered { (self.preview(entered)) }
                    (self.form())
                }
            }
        }
    }

    /// The differences, and the form that applies them.
    fn preview(&self, entered: &str) -> Markup {
        let Ok(entered) = normalized(entered) else { return html! {} };
        html! {
            @if self.is_conflict {
                p.notice role="status" {
                    "The process was changed since you opened it. Lines with a minus are what is configured now, lines with a \
                    plus are yours. Applying replaces what is configured now."
                }
            }
            @if entered == self.current {
                p { "The text equals the configuration." }
            } @else {
                (diff("Changes", &self.current, &entered))
                form.action action=(self.path) method="post" {
                    (token_field(self.form_token))
                    input type="hidden" name="step" value="apply";
                    input type="hidden" name="version" value=(self.version);
                    input type="hidden" name="text" value=(entered);
                    button { "Apply" }
                }
            }
        }
    }

    fn form(&self) -> Markup {
        html! {
            form.action.wide action=(self.path) method="post" {
                (token_field(self.form_token))
                input type="hidden" name="step" value="preview";
                input type="hidden" name="version" value=(self.version);
                label for="text" { "Name, states, transitions and policies as JSON; callbacks stay as they are" }
                textarea #text name="text" rows="24" spellcheck="false" required {
                    (self.entered.as_deref().unwrap_or(&self.current))
                }
                button { "Show the changes" }
            }
        }
    }
}

/// `GET /p/{project}/processes/{process}/edit`.
pub(crate) async fn form(visit: Visit) -> Result<Page, Fault> {
    let process = process(&visit).await?;
    Ok(EditPage::new(&visit, &process)?.show())
}

/// `POST /p/{project}/processes/{process}/edit`: shows the changes, or applies them.
pub(crate) async fn submit(visit: Visit) -> Result<Page, Fault> {
    let process = process(&visit).await?;
    let entered: String = visit.field("text")?;
    let version: i64 = visit.field("version")?;
    let refused = match normalized(&entered) {
        Err(fault) => Some(fault),
        Ok(text) if visit.entered("step") == Some("apply") && version == process.revision => {
            match apply(&visit, &process, text).await {
                Ok(_) => {
                    return Ok(Page::Redirect(format!(
                        "/p/{}/processes/{}",
                        process.project_id,
                        visit.segment("process")
                    )));
                }
                // The page shows the input again, so that it can be corrected.
                Err(Fault::Invalid(text)) => Some(Fault::Invalid(text)),
                Err(fault) => return Err(fault),
            }
        }
        Ok(_) => None,
    };
    // The gateway may have refused the version: read the process again.
    let process = self::process(&visit).await?;
    let is_conflict = version != process.revision;
    Ok(EditPage { entered: Some(entered), refused, is_conflict, ..EditPage::new(&visit, &process)? }.show())
}

async fn apply(visit: &Visit, process: &Process, text: String) -> Result<ChangeResponse<ConfiguredProcess>, Fault> {
    let project_id = process.project_id;
    let request = GatewayRequest::new(Method::PUT, format!("/api/v1/processes/{}", visit.segment("process")))
        .json(text)
        .header("if-match", format!("\"{}\"", process.revision));
    let action = Action {
        name: "edit process",
        project_id,
        scope: Scope::ConfigWrite,
        object: format!("process {} {:?}", visit.segment("process"), process.name),
        before: format!("version {}", process.revision),
    };
    let after = |reply: &ChangeResponse<ConfiguredProcess>| {
        format!("version {}: {}", reply.data.version, reply.changes.join("; "))
    };
    visit.act(&action, request, after).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_shows_both_and_applies_to_the_current_version() {
        let page = EditPage {
            path: "/p/1/processes/2/edit".into(),
            form_token: "f0",
            allowed: Ok(()),
            current: "{\n  \"name\": \"now\"\n}".into(),
            version: 9,
            entered: Some(r#"{"name":"mine"}"#.into()),
            refused: None,
            is_conflict: true,
        };

        let html = page.render().into_string();

        assert!(html.contains("<del>-   &quot;name&quot;: &quot;now&quot;</del>"), "{html}");
        assert!(html.contains("<ins>+   &quot;name&quot;: &quot;mine&quot;</ins>"), "{html}");
        assert!(html.contains("was changed since") && html.contains(r#"name="version" value="9""#), "{html}");
        let invalid = EditPage { entered: Some("[".into()), ..page }.render().into_string();
        assert!(!invalid.contains("Apply") && invalid.contains(">[</textarea>"), "{invalid}");
    }
}

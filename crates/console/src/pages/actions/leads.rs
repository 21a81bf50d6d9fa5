//! Sends an update to a lead: previews its outcome, then sends exactly the previewed update.

use std::collections::BTreeMap;

use contract::{
    JsonObject, ObjectId,
    key::Scope,
    process::Process,
    rpc::{GetLead, GetProcess, Lead, ProcessSelector},
};
use http_api::{DryRunOutcome, DryRunResponse, UpdateAccepted, UpdateRequest};
use maud::{Markup, html};

use super::{OUTCOME_WAIT, key_form, new_idempotency_key, token_field};
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        graph,
        layout::Section,
        parts::{Kind, badge, fact, notice, table, text},
    },
    visit::{Action, Visit},
};

const UPDATE: &str = "/api/v1/leads/update";

/// The fields of the form, as they were entered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::pages) struct Entered {
    pub(in crate::pages) state: Option<String>,
    pub(in crate::pages) disposition: Option<String>,
    pub(in crate::pages) name: Option<String>,
    pub(in crate::pages) metadata: Option<String>,
}

impl Entered {
    fn of(visit: &Visit) -> Self {
        let text = |name| visit.entered(name).map(str::to_owned);
        Self { state: text("state"), disposition: text("disposition"), name: text("name"), metadata: text("metadata") }
    }

    /// The fields by their names in the form.
    fn fields(&self) -> [(&'static str, Option<&str>); 4] {
        [
            ("state", self.state.as_deref()),
            ("disposition", self.disposition.as_deref()),
            ("name", self.name.as_deref()),
            ("metadata", self.metadata.as_deref()),
        ]
    }

    fn update(&self, lead_id: ObjectId, user: String) -> Result<UpdateRequest, Fault> {
        let metadata = self.metadata.clone().map(JsonObject::from_text).transpose();
        let metadata = metadata
            .map_err(|_| Fault::Invalid("Metadata must be a JSON object, for example {\"color\": \"blue\"}.".into()))?;
        Ok(UpdateRequest {
            lead_id: Some(lead_id),
            target_state: self.state.clone(),
            disposition: self.disposition.clone(),
            name: self.name.clone(),
            user_id: Some(user),
            metadata,
            ..UpdateRequest::default()
        })
    }
}

/// The lead of the path, and its process if the visitor may read it.
async fn lead(visit: &Visit) -> Result<(ObjectId, Lead, Option<Process>), Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let lead_id = Some(visit.id("lead")?);
    let lead = visit.request(&GetLead { project_id, lead_id, reference_id: None, process_id: None }).await?;
    let process = match visit.session.role.check(project_id, Scope::ConfigRead) {
        Ok(()) => visit.request(&GetProcess { project_id, process: ProcessSelector::Id(lead.process_id) }).await.ok(),
        Err(_) => None,
    };
    Ok((project_id, lead, process))
}

/// The content of the page that sends an update.
pub(in crate::pages) struct UpdatePage<'a> {
    pub(in crate::pages) lead: &'a Lead,
    /// The states that the lead may move to; none if the process cannot be read.
    pub(in crate::pages) states: Option<Vec<String>>,
    pub(in crate::pages) entered: Entered,
    pub(in crate::pages) preview: Option<Result<DryRunResponse, Fault>>,
    pub(in crate::pages) form_token: &'a str,
    pub(in crate::pages) idempotency_key: String,
    pub(in crate::pages) allowed: Result<(), Fault>,
}

impl<'a> UpdatePage<'a> {
    fn new(visit: &'a Visit, lead: &'a Lead, process: Option<Process>) -> Self {
        let states =
            process.map(|process| graph::targets(&process.rules, &lead.state).into_iter().map(str::to_owned).collect());
        Self {
            lead,
            states,
            entered: Entered::default(),
            preview: None,
            form_token: &visit.session.form_token,
            idempotency_key: new_idempotency_key(),
            allowed: visit.session.credential(lead.project_id, Scope::LeadsWrite).map(drop),
        }
    }

    fn show(&self) -> Page {
        Page::Show { title: "Send an update".into(), section: Section::Leads, content: self.render() }
    }

    pub(in crate::pages) fn render(&self) -> Markup {
        let Self { lead, form_token, .. } = self;
        let path = format!("/p/{}/leads/{}/update", lead.project_id, lead.lead_id);
        html! {
            p {
                "To the lead " a href={ "/p/" (lead.project_id) "/leads/" (lead.lead_id) } {
                    (lead.name.as_deref().unwrap_or("without a name"))
                }
                ", which is in the state " b { (lead.state) } " at version " (lead.version) "."
            }
            @match &self.allowed {
                Err(fault) => { (notice(fault)) (key_form(&path, form_token)) }
                Ok(()) => {
                    @match &self.preview {
                        Some(Ok(preview)) => (self.outcome(&path, preview)),
                        Some(Err(fault)) => (notice(fault)),
                        None => {}
                    }
                    (self.form(&path))
                }
            }
        }
    }

    fn form(&self, path: &str) -> Markup {
        let Self { entered, form_token, .. } = self;
        html! {
            form.action action=(path) method="post" {
                (token_field(form_token))
                input type="hidden" name="step" value="preview";
                label for="state" { "New state" }
                @match &self.states {
                    Some(states) => select #state name="state" {
                        option value="" { "unchanged" }
                        @for state in states {
                            option value=(state) selected[entered.state.as_ref() == Some(state)] { (state) }
                        }
                    },
                    None => input #state name="state" value=[entered.state.as_deref()];
                }
                label for="disposition" { "Disposition" }
                input #disposition name="disposition" value=[entered.disposition.as_deref()];
                label for="name" { "New name" }
                input #name name="name" value=[entered.name.as_deref()] autocomplete="off";
                label for="metadata" { "Metadata to merge, as a JSON object" }
                textarea #metadata name="metadata" rows="6" spellcheck="false" {
                    (entered.metadata.as_deref().unwrap_or_default())
                }
                button { "Preview" }
            }
        }
    }

    /// What the update would do, and the form that sends it.
    fn outcome(&self, path: &str, preview: &DryRunResponse) -> Markup {
        let DryRunOutcome { success, error, error_code, from_state, to_state, data, .. } = &preview.outcome;
        html! {
            section.panel {
                h2 { "Preview" }
                dl.facts {
                    (fact("Outcome", Some(match success {
                        true => badge(Kind::Good, "would succeed"),
                        false => badge(Kind::Bad, &format!("would fail: {}", error_code.as_deref().unwrap_or("unknown"))),
                    })))
                    (fact("Error", text(error.as_deref())))
                    (fact("State", Some(html! {
                        (from_state.as_deref().unwrap_or_default()) " → " (to_state.as_deref().unwrap_or_default())
                    })))
                    @for warning in &preview.warnings { (fact("Warning", text(Some(warning)))) }
                }
                @if let Some(data) = data { (changes(&self.lead.metadata, data)) }
                @if *success {
                    form.action action=(path) method="post" {
                        (token_field(self.form_token))
                        input type="hidden" name="step" value="send";
                        input type="hidden" name="idempotency_key" value=(self.idempotency_key);
                        input type="hidden" name="version" value=(self.lead.version);
                        @for (name, value) in self.entered.fields() {
                            @if let Some(value) = value { input type="hidden" name=(name) value=(value); }
                        }
                        button { "Send the update" }
                    }
                }
            }
        }
    }
}

/// The members of the metadata that change.
fn changes(before: &JsonObject, after: &JsonObject) -> Markup {
    let (before, after) = (before.members(), after.members());
    let mut keys: BTreeMap<&str, (Option<&str>, Option<&str>)> = BTreeMap::new();
    for (key, value) in &before {
        keys.entry(key).or_default().0 = Some(value.get());
    }
    for (key, value) in &after {
        keys.entry(key).or_default().1 = Some(value.get());
    }
    keys.retain(|_, (before, after)| before != after);
    let rows = html! {
        @for (key, (before, after)) in &keys {
            tr {
                td { (key) }
                td { code { (before.unwrap_or("–")) } }
                td { code { (after.unwrap_or("–")) } }
            }
        }
    };
    html! {
        @if keys.is_empty() {
            p { "The metadata stays as it is." }
        } @else {
            (table("Changed metadata", &["Key", "Before", "After"], &rows))
        }
    }
}

/// `GET /p/{project}/leads/{lead}/update`.
pub(crate) async fn form(visit: Visit) -> Result<Page, Fault> {
    let (_, lead, process) = lead(&visit).await?;
    Ok(UpdatePage::new(&visit, &lead, process).show())
}

/// `POST /p/{project}/leads/{lead}/update`: previews the update, or sends the one that was previewed.
pub(crate) async fn submit(visit: Visit) -> Result<Page, Fault> {
    let (project_id, lead, process) = lead(&visit).await?;
    let entered = Entered::of(&visit);
    let update = entered.update(lead.lead_id, format!("console: {}", visit.session.name()));
    if visit.entered("step") == Some("send") {
        return send(&visit, project_id, &lead, &update?).await;
    }
    let preview = async {
        let request = GatewayRequest::post(format!("{UPDATE}?dryRun=true"), &update?)?;
        visit.send(project_id, Scope::LeadsWrite, request).await
    };
    let preview = match preview.await {
        // The page shows the input again, so that it can be corrected.
        Err(Fault::Invalid(text)) => Err(Fault::Invalid(text)),
        Err(fault) => return Err(fault),
        Ok(preview) => Ok(preview),
    };
    Ok(UpdatePage { entered, preview: Some(preview), ..UpdatePage::new(&visit, &lead, process) }.show())
}

async fn send(visit: &Visit, project_id: ObjectId, lead: &Lead, update: &UpdateRequest) -> Result<Page, Fault> {
    // The update fails if the lead changed after the preview.
    let request = GatewayRequest::post(UPDATE, update)?
        .header("if-match", format!("\"{}\"", visit.field::<u32>("version")?))
        .header("idempotency-key", visit.field::<String>("idempotency_key")?)
        .header("prefer", OUTCOME_WAIT);
    let action = Action {
        name: "update lead",
        project_id,
        scope: Scope::LeadsWrite,
        object: format!("lead {}", lead.lead_id),
        before: format!("state {:?}, version {}", lead.state, lead.version),
    };
    let after = |reply: &UpdateAccepted| {
        let outcome = match &reply.outcome {
            None => "not decided yet".to_owned(),
            Some(outcome) => outcome.error.clone().unwrap_or_else(|| "succeeded".to_owned()),
        };
        let state = update.target_state.as_deref().unwrap_or("unchanged");
        format!("update {}, target state {state:?}: {outcome}", reply.update_id)
    };
    let accepted = visit.act(&action, request, after).await?;
    Ok(Page::Redirect(format!("/p/{project_id}/updates/{}", accepted.update_id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_members_are_shown_with_every_digit() {
        let object = |text: &str| JsonObject::from_text(text.into()).unwrap();
        let before = object(r#"{"kept":1,"budget":12345678901234567890.10,"gone":true}"#);
        let after = object(r#"{"kept":1,"budget":12345678901234567890.20,"new":"<b>"}"#);

        let html = changes(&before, &after).0;

        assert!(html.contains("12345678901234567890.10") && html.contains("12345678901234567890.20"), "{html}");
        assert!(html.contains("<td>gone</td>") && html.contains("&lt;b&gt;") && !html.contains("kept"), "{html}");
        assert!(changes(&before, &before).0.contains("stays as it is"));
    }

    #[test]
    fn metadata_must_be_an_object() {
        for (text, is_valid) in [("{\"a\":1}", true), ("[1]", false), ("{", false)] {
            let entered = Entered { metadata: Some(text.into()), ..Entered::default() };
            assert_eq!(entered.update(ObjectId::from_bytes([1; 12]), "u".into()).is_ok(), is_valid, "{text}");
        }
    }
}

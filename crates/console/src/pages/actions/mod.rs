//! Actions: a page that says what an action does, with a form that does it through the gateway.

pub(crate) mod callbacks;
pub(crate) mod calls;
pub(crate) mod dead_letters;
pub(crate) mod deliveries;
pub(crate) mod edit;
pub(crate) mod keys;
pub(crate) mod leads;
pub(crate) mod recovery;
pub(crate) mod share;

use contract::{ObjectId, key::Scope};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::{Page, with_parameters},
    session::Role,
    view::layout::Section,
    visit::Visit,
};

/// The content of an action's page.
pub(in crate::pages) struct Confirmation {
    /// The path that the form is sent to.
    pub(in crate::pages) path: String,
    /// What the action does, and to how many objects.
    pub(in crate::pages) consequence: Markup,
    /// Fields of the form.
    pub(in crate::pages) fields: Markup,
    pub(in crate::pages) button: String,
}

impl Confirmation {
    /// The page with the action's form. If the session has no key that allows the action, the page has a form for such
    /// a key instead.
    pub(in crate::pages) fn page(
        &self,
        visit: &Visit,
        title: &str,
        section: Section,
        project: ObjectId,
        scope: Scope,
    ) -> Page {
        let allowed = visit.session.credential(project, scope).map(drop);
        // Visitors of portal links have no API keys.
        let is_portal = matches!(visit.session.role, Role::Portal(_));
        // The parameters name what the action is done to.
        let next = (!is_portal).then(|| with_parameters(&self.path, &visit.query));
        let content = render(self, &visit.session.form_token, &allowed, next.as_deref());
        Page::Show { title: title.to_owned(), section, content }
    }
}

/// The content of an action's page. A form for an API key leads to `next`; without it, there is no such form.
pub(super) fn render(
    confirmation: &Confirmation,
    form_token: &str,
    allowed: &Result<(), Fault>,
    next: Option<&str>,
) -> Markup {
    let Confirmation { path, consequence, fields, button } = confirmation;
    html! {
        section.panel {
            (consequence)
            @match allowed {
                Ok(()) => form.action action=(path) method="post" {
                    (token_field(form_token))
                    (fields)
                    button { (button) }
                },
                Err(fault) => {
                    p.notice role="status" { (fault.to_string()) }
                    @if let Some(next) = next { (key_form(next, form_token)) }
                }
            }
        }
    }
}

/// The field that proves that a form was rendered for this session.
fn token_field(form_token: &str) -> Markup {
    html! { input type="hidden" name="form_token" value=(form_token); }
}

/// A form for an API key that allows an action; it leads back to this path.
fn key_form(path: &str, form_token: &str) -> Markup {
    html! {
        form.action action="/login" method="post" {
            (token_field(form_token))
            input type="hidden" name="next" value=(path);
            label for="api_key" { "API key" }
            input #api_key name="api_key" type="password" required autocomplete="off" spellcheck="false";
            button { "Use this key" }
        }
    }
}

/// A key for `Idempotency-Key`: if a form is sent twice, the gateway accepts its request once.
fn new_idempotency_key() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

/// Longest wait for the outcome of an update or call event. The timeline shows a later one.
const OUTCOME_WAIT: &str = "wait=5";

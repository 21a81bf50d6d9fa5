//! Actions on one callback: test, enable, pause, resume, and rotate the signing secret.

use contract::{
    ObjectId,
    key::Scope,
    process::DEFAULT_OVERLAP_SECONDS,
    rpc::{CallbackStatus, DeliveryStatus, ListDeliveries},
    subject::NO_PROCESS,
};
use http_api::{ConfiguredCallback, DataResponse, EnableResult, PauseResult, RotateSecretRequest, TestResult};
use maud::{Markup, html};

use super::Confirmation;
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, fact, span, text, time},
    },
    visit::{Action, PAGE, Visit},
};

/// A callback, its project, and its path in the HTTP API.
pub(in crate::pages) struct Target {
    pub(super) project_id: ObjectId,
    pub(super) callback: CallbackStatus,
    path: String,
}

impl Target {
    /// The callback of the path.
    pub(super) async fn of(visit: &Visit) -> Result<Self, Fault> {
        let project_id = visit.project(Scope::ConfigRead)?;
        Ok(Self::new(project_id, visit.callback(project_id).await?))
    }

    pub(in crate::pages) fn new(project_id: ObjectId, callback: CallbackStatus) -> Self {
        let process = callback.process_id.map_or_else(|| NO_PROCESS.to_owned(), |id| id.to_string());
        let path = format!("/api/v1/processes/{process}/callbacks/{}", callback.callback_id);
        Self { project_id, callback, path }
    }

    /// The console's page of one of the callback's actions.
    pub(super) fn page(&self, action: &str) -> String {
        format!("/p/{}/callbacks/{}/{action}", self.project_id, self.callback.callback_id)
    }

    pub(super) fn action(&self, name: &'static str, before: impl Into<String>) -> Action {
        Action {
            name,
            project_id: self.project_id,
            scope: Scope::ConfigWrite,
            object: format!("callback {} {:?}", self.callback.callback_id, self.callback.name),
            before: before.into(),
        }
    }

    /// The path of one of the callback's actions in the HTTP API.
    pub(super) fn api(&self, action: &str) -> String {
        format!("{}/{action}", self.path)
    }

    fn show(&self, visit: &Visit, title: &str, page: &Confirmation) -> Page {
        page.page(visit, title, Section::Callbacks, self.project_id, Scope::ConfigWrite)
    }

    pub(super) fn back(&self) -> Markup {
        let Self { project_id, callback, .. } = self;
        html! {
            p {
                a href={ "/p/" (project_id) "/callbacks/" (callback.callback_id) } { "Back to the callback " (callback.name) }
            }
        }
    }
}

/// `GET /p/{project}/callbacks/{callback}/test`.
pub(crate) async fn confirm_test(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let page = Confirmation {
        path: target.page("test"),
        consequence: html! {
            p { "One signed ping is sent to " b { (target.callback.name) } ". It is not a delivery: it is not recorded, not \
                retried, and changes nothing about the callback's health." }
        },
        fields: html! {},
        button: "Send a test".into(),
    };
    Ok(target.show(&visit, "Test a callback", &page))
}

/// `POST /p/{project}/callbacks/{callback}/test`.
pub(crate) async fn test(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let result = send_test(&visit, &target).await?;
    let content = html! { (render_test(&result)) (target.back()) };
    Ok(Page::Show { title: "Test a callback".into(), section: Section::Callbacks, content })
}

pub(in crate::pages) async fn send_test(visit: &Visit, target: &Target) -> Result<TestResult, Fault> {
    let request = GatewayRequest::post(target.api("test"), &serde_json::json!({}))?;
    let after = |reply: &DataResponse<TestResult>| reply.data.error.clone().unwrap_or_else(|| "accepted".into());
    let action = target.action("test callback", target.callback.state.as_str());
    Ok(visit.act(&action, request, after).await?.data)
}

pub(in crate::pages) fn render_test(result: &TestResult) -> Markup {
    html! {
        dl.facts {
            (fact("Result", Some(match result.delivered {
                true => badge(Kind::Good, "accepted"),
                false => badge(Kind::Bad, "failed"),
            })))
            (fact("Error", text(result.error.as_deref())))
            (fact("Status", result.status_code.map(|code| html! { (code) })))
            (fact("Sent", Some(time(result.started_at.0))))
            (fact("Took", Some(html! { (span(result.duration_ms.into())) })))
            (fact("webhook-id", Some(html! { span.id { (result.webhook_id) } })))
        }
        @if let Some(response) = &result.response {
            h2 { "First bytes of the response" }
            pre tabindex="0" { (response) }
        }
    }
}

/// `GET /p/{project}/callbacks/{callback}/enable`: says first how many deliveries wait.
pub(crate) async fn confirm_enable(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let page = Confirmation {
        path: target.page("enable"),
        consequence: attempted_again(&visit, &target).await?,
        fields: html! {},
        button: "Enable".into(),
    };
    Ok(target.show(&visit, "Enable a callback", &page))
}

/// Says that waiting deliveries are attempted again, and how many there are.
async fn attempted_again(visit: &Visit, target: &Target) -> Result<Markup, Fault> {
    visit.session.role.check(target.project_id, Scope::LeadsRead)?;
    let waiting = ListDeliveries {
        status: Some(DeliveryStatus::Pending),
        callback_id: Some(target.callback.callback_id),
        ..ListDeliveries::of_project(target.project_id, PAGE)
    };
    let waiting = visit.request(&waiting).await?;
    let more = if waiting.next.is_some() { "at least " } else { "" };
    Ok(html! {
        p {
            "Deliveries to " b { (target.callback.name) } " are attempted again. Waiting now: " (more) (waiting.items.len()) "."
        }
    })
}

/// `GET /p/{project}/callbacks/{callback}/pause`.
pub(crate) async fn confirm_pause(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let page = Confirmation {
        path: target.page("pause"),
        consequence: html! {
            p { "Deliveries to " b { (target.callback.name) } " are recorded and wait until the callback is resumed." }
        },
        fields: html! {},
        button: "Pause".into(),
    };
    Ok(target.show(&visit, "Pause a callback", &page))
}

/// `POST /p/{project}/callbacks/{callback}/pause`.
pub(crate) async fn pause(visit: Visit) -> Result<Page, Fault> {
    set_paused(visit, "pause", "pause callback").await
}

/// `GET /p/{project}/callbacks/{callback}/resume`: says first how many deliveries wait.
pub(crate) async fn confirm_resume(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let page = Confirmation {
        path: target.page("resume"),
        consequence: attempted_again(&visit, &target).await?,
        fields: html! {},
        button: "Resume".into(),
    };
    Ok(target.show(&visit, "Resume a callback", &page))
}

/// `POST /p/{project}/callbacks/{callback}/resume`.
pub(crate) async fn resume(visit: Visit) -> Result<Page, Fault> {
    set_paused(visit, "resume", "resume callback").await
}

async fn set_paused(visit: Visit, path: &str, name: &'static str) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let request = GatewayRequest::post(target.api(path), &serde_json::json!({}))?;
    let after = |reply: &DataResponse<PauseResult>| match reply.data.was_paused {
        true => "was paused before".to_owned(),
        false => "was not paused before".to_owned(),
    };
    visit.act(&target.action(name, target.callback.state.as_str()), request, after).await?;
    Ok(Page::Redirect(format!("/p/{}/callbacks/{}", target.project_id, target.callback.callback_id)))
}

/// `POST /p/{project}/callbacks/{callback}/enable`.
pub(crate) async fn enable(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let request = GatewayRequest::post(target.api("enable"), &serde_json::json!({}))?;
    let after = |reply: &DataResponse<EnableResult>| match reply.data.was_disabled {
        true => "enabled".to_owned(),
        false => "was not disabled".to_owned(),
    };
    visit.act(&target.action("enable callback", target.callback.state.as_str()), request, after).await?;
    Ok(Page::Redirect(format!("/p/{}/callbacks/{}", target.project_id, target.callback.callback_id)))
}

/// `GET /p/{project}/callbacks/{callback}/rotate-secret`.
pub(crate) async fn confirm_rotation(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let page = Confirmation {
        path: target.page("rotate-secret"),
        consequence: html! {
            p {
                "The callback " b { (target.callback.name) } " gets a new signing secret, which is shown once. The present \
                secrets sign as well until the overlap ends; after that, an endpoint that knows only them rejects every \
                delivery."
            }
        },
        fields: html! {
            label for="hours" { "Overlap in hours" }
            input #hours name="hours" type="number" min="0" max="168" required value=(DEFAULT_OVERLAP_SECONDS / 3600);
        },
        button: "Rotate the secret".into(),
    };
    Ok(target.show(&visit, "Rotate a signing secret", &page))
}

/// `POST /p/{project}/callbacks/{callback}/rotate-secret`.
pub(crate) async fn rotate(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let hours: u16 = visit.field("hours")?;
    let body = RotateSecretRequest { overlap_seconds: Some(u32::from(hours) * 3600) };
    let request = GatewayRequest::post(target.api("rotate-secret"), &body)?;
    // The secrets themselves are never logged.
    let after = |reply: &DataResponse<ConfiguredCallback>| {
        format!("a new secret, {} replaced ones still sign", reply.data.retiring_secrets.len())
    };
    let changed = visit.act(&target.action("rotate secret", "the present secrets"), request, after).await?.data;
    let secrets: Vec<_> = changed.callback.secrets.iter().map(|secret| secret.expose()).collect();
    let content = html! { (render_rotated(&secrets)) (target.back()) };
    Ok(Page::Show { title: "New signing secret".into(), section: Section::Callbacks, content })
}

fn render_rotated(secrets: &[&str]) -> Markup {
    html! {
        p { "Save the secret now: it is not shown again." }
        @for secret in secrets { pre tabindex="0" { code { (secret) } } }
    }
}

//! Ends a call whose end was never reported.

use contract::{
    ObjectId,
    key::Scope,
    rpc::{Call, ListCalls, MAX_LIMIT},
};
use http_api::{CallEndedRequest, UpdateAccepted};
use maud::html;

use super::{Confirmation, OUTCOME_WAIT, new_idempotency_key};
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        layout::Section,
        parts::{fact, link, text, time},
    },
    visit::{Action, Visit},
};

/// The calls that the action ends: one call with a lead, or all of them.
async fn calls(
    visit: &Visit,
    project_id: ObjectId,
    lead_id: ObjectId,
    call_id: Option<&str>,
) -> Result<Vec<Call>, Fault> {
    // A lead has fewer calls than the longest page.
    let query = ListCalls { project_id, lead_id: Some(lead_id), cursor: None, limit: MAX_LIMIT };
    let mut calls = visit.request(&query).await?.items;
    calls.retain(|call| call_id.is_none() || call.call_id.as_deref() == call_id);
    if calls.is_empty() {
        return Err(Fault::NotFound("There is no such call with this lead. It may have ended.".into()));
    }
    Ok(calls)
}

/// `GET /p/{project}/leads/{lead}/end-call?call=`.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let lead_id: ObjectId = visit.id("lead")?;
    let call_id = visit.text("call");
    let calls = calls(&visit, project_id, lead_id, call_id).await?;
    let page = Confirmation {
        path: format!("/p/{project_id}/leads/{lead_id}/end-call"),
        consequence: html! {
            p {
                "Calls with the lead " (link(project_id, "leads", lead_id)) " that end: " (calls.len()) ". Updates that \
                were queued behind them are decided at once."
            }
            @for call in &calls {
                dl.facts {
                    (fact("Call", text(Some(call.call_id.as_deref().unwrap_or("without an id")))))
                    (fact("In progress since", Some(time(call.started_at))))
                    (fact("Expires", Some(time(call.expires_at))))
                }
            }
        },
        fields: html! {
            @if let Some(call_id) = call_id { input type="hidden" name="call" value=(call_id); }
            input type="hidden" name="idempotency_key" value=(new_idempotency_key());
        },
        button: if call_id.is_some() { "End the call".into() } else { format!("End all calls ({})", calls.len()) },
    };
    Ok(page.page(&visit, "End a call", Section::Calls, project_id, Scope::CallsWrite))
}

/// `POST /p/{project}/leads/{lead}/end-call`.
pub(crate) async fn end(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let lead_id: ObjectId = visit.id("lead")?;
    let call_id = visit.entered("call");
    let calls = calls(&visit, project_id, lead_id, call_id).await?;
    let body =
        CallEndedRequest { lead_id: Some(lead_id), call_id: call_id.map(str::to_owned), ..CallEndedRequest::default() };
    let request = GatewayRequest::post("/api/v1/calls/ended", &body)?
        .header("idempotency-key", visit.field::<String>("idempotency_key")?)
        .header("prefer", OUTCOME_WAIT);
    let before = calls.iter().map(|call| {
        let call_id = call.call_id.as_deref().unwrap_or("without an id");
        format!("call {call_id} since {}", call.started_at.to_iso())
    });
    let action = Action {
        name: "end call",
        project_id,
        scope: Scope::CallsWrite,
        object: format!("lead {lead_id}"),
        before: before.collect::<Vec<_>>().join(", "),
    };
    let accepted = visit.act(&action, request, |reply: &UpdateAccepted| format!("event {}", reply.update_id)).await?;
    Ok(Page::Redirect(format!("/p/{project_id}/updates/{}", accepted.update_id)))
}

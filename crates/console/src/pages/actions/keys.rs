//! Revoking an API key.

use contract::{
    ObjectId,
    key::{ApiKey, Scope},
    rpc::ListKeys,
};
use http_api::DataResponse;
use maud::html;

use super::Confirmation;
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    pages::keys::{scopes, status},
    respond::Page,
    view::{
        layout::Section,
        parts::{fact, text, time},
    },
    visit::{Action, Visit},
};

/// The key of the path.
async fn key(visit: &Visit, project_id: ObjectId) -> Result<ApiKey, Fault> {
    let key_id: ObjectId = visit.id("key")?;
    let key = visit.request(&ListKeys::one(project_id, key_id)).await?.items.pop();
    key.ok_or_else(|| Fault::NotFound("This project has no such API key.".into()))
}

/// `GET /p/{project}/keys/{key}/revoke`.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let key = key(&visit, project_id).await?;
    let page = Confirmation {
        path: format!("/p/{project_id}/keys/{}/revoke", key.key_id),
        consequence: html! {
            p {
                "Requests with this key are refused within a second, and console sessions that were started with it end. \
                This cannot be undone."
            }
            dl.facts {
                (fact("Key", text(Some(&key.name))))
                (fact("Status", Some(status(&key, visit.now))))
                (fact("Scopes", Some(html! { (scopes(&key)) })))
                (fact("Created", Some(time(key.created_at))))
            }
            p { a href={ "/p/" (project_id) "/updates?key=" (key.key_id) } { "Updates of the last 24 hours under this key" } }
        },
        fields: html! {},
        button: "Revoke the key".into(),
    };
    Ok(page.page(&visit, "Revoke an API key", Section::Keys, project_id, Scope::ConfigWrite))
}

/// `POST /p/{project}/keys/{key}/revoke`.
pub(crate) async fn revoke(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let key = key(&visit, project_id).await?;
    let request = GatewayRequest::post(format!("/api/v1/keys/{}/revoke", key.key_id), &serde_json::json!({}))?;
    let action = Action {
        name: "revoke key",
        project_id,
        scope: Scope::ConfigWrite,
        object: format!("key {} {:?}", key.key_id, key.name),
        before: scopes(&key),
    };
    let after = |reply: &DataResponse<http_api::ApiKey>| {
        format!("revoked at {:?}", reply.data.revoked_at.map(|at| at.0.to_iso()))
    };
    visit.act(&action, request, after).await?;
    Ok(Page::Redirect(format!("/p/{project_id}/keys")))
}

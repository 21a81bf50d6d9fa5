//! Redirects from an id to its page.

use std::collections::BTreeSet;

use contract::{
    ObjectId,
    key::Scope,
    rpc::{CallbackStatus, DeliveryId, GetDelivery, GetLead, GetProcess, GetUpdate, ProcessSelector},
};

use crate::{fault::Fault, respond::Page, session::Role, visit::Visit};

/// How many projects are searched for an id. Each costs a few queries.
const MAX_PROJECTS: usize = 20;

/// `GET /go/{id}`: redirects to the page of an id in one of the projects that the visitor may see.
pub(crate) async fn anywhere(visit: Visit) -> Result<Page, Fault> {
    let text = visit.segment("id").to_owned();
    let projects: BTreeSet<ObjectId> = match &visit.session.role {
        Role::Key(key) => [key.project_id].into(),
        Role::Portal(_) => return Err(Fault::no_page()),
        Role::Operator | Role::Viewer => visit.app.keys.all().iter().map(|key| key.project_id).collect(),
    };
    if projects.len() > MAX_PROJECTS {
        return Err(Fault::Invalid(format!(
            "More than {MAX_PROJECTS} projects may have this id. Open the project first, and search there."
        )));
    }
    for project_id in projects {
        if let Some(path) = find(&visit, project_id, &text).await? {
            return Ok(Page::Redirect(format!("/p/{project_id}/{path}")));
        }
    }
    Err(not_found(&text))
}

/// `GET /p/{project}/go?q=`: redirects to the page of an id; for any other text, to a search for leads.
pub(crate) async fn in_project(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let Some(text) = visit.text("q").map(str::trim) else {
        return Ok(Page::Redirect(format!("/p/{project_id}")));
    };
    match find(&visit, project_id, text).await? {
        Some(path) => Ok(Page::Redirect(format!("/p/{project_id}/{path}"))),
        None if text.parse::<ObjectId>().is_ok() || text.parse::<DeliveryId>().is_ok() => Err(not_found(text)),
        None => {
            let query: String = form_urlencoded::Serializer::new(String::new()).append_pair("q", text).finish();
            Ok(Page::Redirect(format!("/p/{project_id}/leads?{query}")))
        }
    }
}

fn not_found(text: &str) -> Fault {
    Fault::NotFound(format!("No lead, update, delivery, callback or process has the id {text:?}."))
}

/// The path of what has this id, below its project.
async fn find(visit: &Visit, project_id: ObjectId, text: &str) -> Result<Option<String>, Fault> {
    if let Ok(id) = text.parse::<DeliveryId>() {
        let delivery = visit.request(&GetDelivery { project_id, id }).await;
        return Ok(exists(delivery)?.then(|| format!("deliveries/{id}")));
    }
    let Ok(id) = text.parse::<ObjectId>() else { return Ok(None) };
    let lead = GetLead { project_id, lead_id: Some(id), reference_id: None, process_id: None };
    let process = async {
        visit.session.role.check(project_id, Scope::ConfigRead)?;
        visit.request(&GetProcess { project_id, process: ProcessSelector::Id(id) }).await
    };
    let update = GetUpdate { project_id, update_id: id };
    let (lead, update, process, callbacks) =
        tokio::join!(visit.request(&lead), visit.request(&update), process, visit.callbacks(project_id));
    let is_callback = |callbacks: Vec<CallbackStatus>| callbacks.iter().any(|callback| callback.callback_id == id);
    if exists(lead)? {
        return Ok(Some(format!("leads/{id}")));
    }
    // Updates come last, because they may only be assumed.
    if process.is_ok() {
        return Ok(Some(format!("processes/{id}")));
    }
    if callbacks.is_ok_and(is_callback) {
        return Ok(Some(format!("callbacks/{id}")));
    }
    Ok(exists(update)?.then(|| format!("updates/{id}")))
}

fn exists<T>(answer: Result<T, Fault>) -> Result<bool, Fault> {
    match answer {
        Ok(_) => Ok(true),
        Err(Fault::NotFound(_)) => Ok(false),
        Err(fault) => Err(fault),
    }
}

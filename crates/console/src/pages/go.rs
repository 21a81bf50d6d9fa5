//! Redirects from an id to its page.

use std::collections::BTreeSet;

use contract::{
    ObjectId,
    key::Scope,
    rpc::{CallbackStatus, DeliveryId, GetDelivery, GetLead, GetProcess, GetUpdate, ProcessSelector, Update},
};

use crate::{fault::Fault, respond::Page, session::Role, visit::Visit};

/// How many projects are searched for an id. Each costs a few queries.
const MAX_PROJECTS: usize = 20;

/// `GET /go/{id}`: redirects to the page of an id in one of the projects that the visitor may see.
pub(crate) async fn anywhere(visit: Visit) -> Result<Page, Fault> {
    let text = visit.segment("id").to_owned();
    let role = &visit.session.role;
    let projects: BTreeSet<ObjectId> = match role {
        Role::Key(key) => {
            role.check(key.project_id, Scope::LeadsRead)?;
            [key.project_id].into()
        }
        Role::Portal(_) => return Err(Fault::no_page()),
        Role::Operator | Role::Viewer => visit.app.keys.all().iter().map(|key| key.project_id).collect(),
    };
    if projects.len() > MAX_PROJECTS {
        return Err(Fault::Invalid(format!(
            "More than {MAX_PROJECTS} projects may have this id. Open the project first, and search there."
        )));
    }
    let mut assumed = None;
    for project_id in projects {
        match find(&visit, project_id, &text).await? {
            Some(Found::Known(path)) => return Ok(Page::Redirect(format!("/p/{project_id}/{path}"))),
            // Another project may have an object with this id.
            Some(Found::Assumed(path)) => assumed = assumed.or(Some(format!("/p/{project_id}/{path}"))),
            None => {}
        }
    }
    assumed.map(Page::Redirect).ok_or_else(|| not_found(&text))
}

/// `GET /p/{project}/go?q=`: redirects to the page of an id; for any other text, to a search for leads.
pub(crate) async fn in_project(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let Some(text) = visit.text("q").map(str::trim) else {
        return Ok(Page::Redirect(format!("/p/{project_id}")));
    };
    match find(&visit, project_id, text).await? {
        Some(Found::Known(path) | Found::Assumed(path)) => Ok(Page::Redirect(format!("/p/{project_id}/{path}"))),
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

/// The path of an object, below its project.
enum Found {
    Known(String),
    /// While the log has a backlog, any new id counts as a pending update.
    Assumed(String),
}

impl Found {
    fn update(update: &Update) -> Self {
        let path = format!("updates/{}", update.update_id);
        if *update == Update::pending(update.update_id) { Self::Assumed(path) } else { Self::Known(path) }
    }
}

/// The object with this id.
async fn find(visit: &Visit, project_id: ObjectId, text: &str) -> Result<Option<Found>, Fault> {
    if let Ok(id) = text.parse::<DeliveryId>() {
        let delivery = existing(visit.request(&GetDelivery { project_id, id }).await)?;
        return Ok(delivery.map(|_| Found::Known(format!("deliveries/{id}"))));
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
    if existing(lead)?.is_some() {
        return Ok(Some(Found::Known(format!("leads/{id}"))));
    }
    // Updates come last, because they may only be assumed.
    if process.is_ok() {
        return Ok(Some(Found::Known(format!("processes/{id}"))));
    }
    if callbacks.is_ok_and(is_callback) {
        return Ok(Some(Found::Known(format!("callbacks/{id}"))));
    }
    Ok(existing(update)?.map(|update| Found::update(&update)))
}

fn existing<T>(answer: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(Fault::NotFound(_)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    #[test]
    fn an_update_of_which_nothing_is_known_is_assumed() {
        let pending = Update::pending(ObjectId::from_bytes([1; 12]));
        let queued = Update { queued_until: Some(Timestamp::from_millis(0)), ..pending.clone() };

        assert!(matches!(Found::update(&pending), Found::Assumed(_)));
        assert!(matches!(Found::update(&queued), Found::Known(_)));
    }
}

//! One request of a signed-in visitor.

use std::{collections::BTreeMap, str::FromStr, sync::Arc};

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    rpc::{CallbackStatus, Cursor, ListCallbacks, Query},
};
use serde::de::DeserializeOwned;

use crate::{
    app::App,
    fault::Fault,
    gateway::GatewayRequest,
    session::{Portal, Role, Session},
};

/// How many rows a page of a list has.
pub(crate) const PAGE: u32 = 50;

/// One request of a signed-in visitor for a page.
#[derive(Debug)]
pub(crate) struct Visit {
    pub(crate) app: Arc<App>,
    pub(crate) session: Session,
    pub(crate) now: Timestamp,
    /// The parameters of the path.
    pub(crate) path: Vec<(String, String)>,
    /// The parameters of the query string; empty ones are absent.
    pub(crate) query: Vec<(String, String)>,
    /// The fields of the form, if one was sent.
    pub(crate) form: Vec<(String, String)>,
}

/// A change that a visitor makes, for the check of the key and for the log.
#[derive(Debug)]
pub(crate) struct Action {
    /// The name, as in the log.
    pub(crate) name: &'static str,
    pub(crate) project_id: ObjectId,
    /// The scope that the key needs.
    pub(crate) scope: Scope,
    /// The object that is changed.
    pub(crate) object: String,
    /// The state of the object before the change.
    pub(crate) before: String,
}

impl Visit {
    /// The project of the path, if the visitor may read pages that need this scope there.
    pub(crate) fn project(&self, scope: Scope) -> Result<ObjectId, Fault> {
        let project_id = self.id("project")?;
        self.session.role.check(project_id, scope)?;
        Ok(project_id)
    }

    /// Refuses visitors who do not see every project: pages about the whole installation do not exist for them.
    pub(crate) fn all_projects(&self) -> Result<(), Fault> {
        if self.session.role.sees_all() { Ok(()) } else { Err(Fault::no_page()) }
    }

    /// The visitor's portal link. The pages of portal links do not exist for other visitors.
    pub(crate) fn portal(&self) -> Result<&Portal, Fault> {
        match &self.session.role {
            Role::Portal(portal) => Ok(portal),
            Role::Operator | Role::Viewer | Role::Key(_) => Err(Fault::no_page()),
        }
    }

    /// An id in the path. Any other text names no page.
    pub(crate) fn id<T: FromStr>(&self, name: &str) -> Result<T, Fault> {
        self.segment(name).parse().map_err(|_| Fault::no_page())
    }

    pub(crate) fn segment(&self, name: &str) -> &str {
        self.path.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The values of a parameter that the query string may have several times.
    pub(crate) fn texts(&self, name: &str) -> impl Iterator<Item = &str> {
        self.query.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A parameter of the query string.
    pub(crate) fn parameter<T: FromStr>(&self, name: &str) -> Result<Option<T>, Fault> {
        let parse = |text: &str| text.parse().map_err(|_| Fault::Invalid(format!("{name} is not valid in this URL.")));
        self.text(name).map(parse).transpose()
    }

    pub(crate) fn cursor(&self) -> Option<Cursor> {
        self.text("cursor").map(|text| Cursor::from_text(text.to_owned()))
    }

    pub(crate) async fn request<Q: Query>(&self, query: &Q) -> Result<Q::Reply, Fault> {
        self.app.request(query).await
    }

    pub(crate) fn field<T: FromStr>(&self, name: &str) -> Result<T, Fault> {
        let field = self.form.iter().find(|(known, _)| known == name);
        field
            .and_then(|(_, value)| value.parse().ok())
            .ok_or_else(|| Fault::Invalid(format!("{name} is missing in the form, or not valid.")))
    }

    /// The values of a field that the form may have several times.
    pub(crate) fn fields(&self, name: &str) -> impl Iterator<Item = &str> {
        self.form.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A text of the form; an empty one is absent.
    pub(crate) fn entered(&self, name: &str) -> Option<&str> {
        self.form.iter().find(|(known, _)| known == name).map(|(_, value)| value.trim()).filter(|text| !text.is_empty())
    }

    /// Sends a request to the gateway with the session's API key, which must have this scope in this project.
    pub(crate) async fn send<T: DeserializeOwned>(
        &self,
        project_id: ObjectId,
        scope: Scope,
        request: GatewayRequest,
    ) -> Result<T, Fault> {
        let key = self.session.credential(project_id, scope)?;
        self.app.gateway.send(key, request).await
    }

    /// Sends a change to the gateway, and logs the visitor and the change before and after it. A refused change is
    /// logged, too.
    pub(crate) async fn act<T: DeserializeOwned>(
        &self,
        action: &Action,
        request: GatewayRequest,
        after: impl FnOnce(&T) -> String,
    ) -> Result<T, Fault> {
        let Action { name, project_id, scope, object, before } = action;
        let who = self.session.identity();
        // If the visitor hangs up, this function ends here, but the gateway may still make the change.
        tracing::info!(who, %project_id, object, before, "action {name}: sent");
        let done = self.send(*project_id, *scope, request).await;
        let (done_or_not, after) = match &done {
            Ok(reply) => ("done", after(reply)),
            Err(fault) => ("not done", fault.to_string()),
        };
        tracing::info!(who, %project_id, object, before, after, "action {name}: {done_or_not}");
        done
    }

    /// The callback of the path.
    pub(crate) async fn callback(&self, project_id: ObjectId) -> Result<CallbackStatus, Fault> {
        let callback_id: ObjectId = self.id("callback")?;
        let callbacks = self.callbacks_with_details(project_id).await?;
        let callback = callbacks.into_iter().find(|known| known.callback_id == callback_id);
        callback.ok_or_else(|| Fault::NotFound("This project has no such callback.".into()))
    }

    /// The callbacks of a project, with their details from the database.
    pub(crate) async fn callbacks_with_details(&self, project_id: ObjectId) -> Result<Vec<CallbackStatus>, Fault> {
        self.session.role.check(project_id, Scope::ConfigRead)?;
        self.request(&ListCallbacks { project_id, details: true }).await
    }

    /// The callbacks of a project, for their names and health.
    pub(crate) async fn callbacks(&self, project_id: ObjectId) -> Result<Vec<CallbackStatus>, Fault> {
        self.session.role.check(project_id, Scope::ConfigRead)?;
        self.request(&ListCallbacks { project_id, details: false }).await
    }
}

/// The names of callbacks; without them, their ids are shown.
pub(crate) fn names(callbacks: &Result<Vec<CallbackStatus>, Fault>) -> BTreeMap<ObjectId, String> {
    callbacks.iter().flatten().map(|callback| (callback.callback_id, callback.name.clone())).collect()
}

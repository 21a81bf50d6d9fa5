//! One request of a signed-in visitor.

use std::{collections::BTreeMap, str::FromStr, sync::Arc};

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    rpc::{CallbackStatus, Cursor, ListCallbacks, Query},
};

use crate::{app::App, fault::Fault, session::Session};

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
}

impl Visit {
    /// The project of the path, if the visitor may read what needs this scope there.
    pub(crate) fn project(&self, scope: Scope) -> Result<ObjectId, Fault> {
        let project_id = self.id("project")?;
        self.session.role.check(project_id, scope)?;
        Ok(project_id)
    }

    /// An id in the path. What is no id names no page.
    pub(crate) fn id<T: FromStr>(&self, name: &str) -> Result<T, Fault> {
        self.segment(name).parse().map_err(|_| Fault::no_page())
    }

    pub(crate) fn segment(&self, name: &str) -> &str {
        self.path.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
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

    /// The callbacks of a project, for their names and health.
    pub(crate) async fn callbacks(&self, project_id: ObjectId) -> Result<Vec<CallbackStatus>, Fault> {
        self.session.role.check(project_id, Scope::ConfigRead)?;
        self.request(&ListCallbacks { project_id }).await
    }
}

/// The names of callbacks; without them, their ids are shown.
pub(crate) fn names(callbacks: &Result<Vec<CallbackStatus>, Fault>) -> BTreeMap<ObjectId, String> {
    callbacks.iter().flatten().map(|callback| (callback.callback_id, callback.name.clone())).collect()
}

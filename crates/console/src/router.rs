//! The pages, a row each.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, Uri},
    middleware,
    routing::{get, post},
};

use crate::{
    app::App,
    assets,
    fault::Fault,
    pages::{board, callbacks, deliveries, go, leads, login, processes, projects, updates},
    respond::{page, respond, with_security_headers},
};

/// The console's pages.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/login", get(login::form).post(login::submit))
        .route("/logout", post(login::end))
        .route("/", page(projects::list))
        .route("/go/{id}", page(go::anywhere))
        .route("/p/{project}", page(board::show))
        .route("/p/{project}/go", page(go::in_project))
        .route("/p/{project}/updates/{update}", page(updates::show))
        .route("/p/{project}/leads", page(leads::list))
        .route("/p/{project}/leads/{lead}", page(leads::show))
        .route("/p/{project}/deliveries", page(deliveries::list))
        .route("/p/{project}/deliveries/{delivery}", page(deliveries::show))
        .route("/p/{project}/callbacks", page(callbacks::list))
        .route("/p/{project}/callbacks/{callback}", page(callbacks::show))
        .route("/p/{project}/processes", page(processes::list))
        .route("/p/{project}/processes/{process}", page(processes::show))
        .merge(assets::routes())
        .fallback(async |State(app): State<Arc<App>>, headers: HeaderMap, uri: Uri| {
            respond(app, headers, uri, vec![], async |_| Err(Fault::no_page())).await
        })
        .layer(middleware::map_response(with_security_headers))
        .with_state(app)
}

//! The pages, a row each.

use std::{future::Future, sync::Arc};

use axum::{
    Router,
    extract::{RawPathParams, State},
    http::{HeaderMap, Uri},
    middleware,
    routing::{MethodRouter, get, post},
};

use crate::{
    app::App,
    assets,
    fault::Fault,
    page_stream,
    pages::{
        actions, board, callbacks, calls, dead_letters, deliveries, go, keys, leads, login, portal, processes,
        projects, system, updates,
    },
    respond::{Page, action, large_action, respond, with_security_headers},
    visit::Visit,
};

/// The console's pages.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/login", get(login::form).post(login::submit))
        .route("/logout", post(login::end))
        .route("/", page(projects::list))
        .route("/system", page(system::show))
        .route("/system/dead-letters/{number}", page(dead_letters::show))
        .route(
            "/system/dead-letters/{number}/replay",
            confirm(actions::dead_letters::confirm).merge(large_action(actions::dead_letters::replay)),
        )
        .route("/go/{id}", page(go::anywhere))
        .route("/p/{project}", page(board::show))
        .route("/p/{project}/go", page(go::in_project))
        .route("/p/{project}/updates", page(updates::list))
        .route("/p/{project}/updates/{update}", page(updates::show))
        .route("/p/{project}/leads", page(leads::list))
        .route("/p/{project}/leads/{lead}", page(leads::show))
        .route("/p/{project}/calls", page(calls::list))
        .route("/p/{project}/deliveries", page(deliveries::list))
        .route("/p/{project}/deliveries/{delivery}", page(deliveries::show))
        .route("/p/{project}/callbacks", page(callbacks::list))
        .route("/p/{project}/callbacks/{callback}", page(callbacks::show))
        .route("/p/{project}/processes", page(processes::list))
        .route("/p/{project}/processes/{process}", page(processes::show))
        .route("/p/{project}/keys", page(keys::list))
        .merge(portal_pages())
        .merge(actions())
        .merge(assets::routes())
        .fallback(async |State(app): State<Arc<App>>, headers: HeaderMap, uri: Uri| {
            respond(app, headers, uri, vec![], vec![], async |_| Err(Fault::no_page())).await
        })
        .layer(middleware::map_response(with_security_headers))
        .with_state(app)
}

/// Serves a page to signed-in visitors.
fn page<F>(show: impl Fn(Visit) -> F + Clone + Send + Sync + 'static) -> MethodRouter<Arc<App>>
where
    F: Future<Output = Result<Page, Fault>> + Send + 'static,
{
    get(async move |State(app): State<Arc<App>>, path: RawPathParams, headers: HeaderMap, uri: Uri| {
        let path = path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        if page_stream::is_wanted(&headers) {
            return page_stream::stream(app, headers, &uri, path, Arc::new(move |visit| Box::pin(show(visit)))).await;
        }
        respond(app, headers, uri, path, vec![], show).await
    })
}

/// Serves the page of an action to signed-in visitors who may act.
fn confirm<F>(show: impl Fn(Visit) -> F + Clone + Send + Sync + 'static) -> MethodRouter<Arc<App>>
where
    F: Future<Output = Result<Page, Fault>> + Send + 'static,
{
    page(move |visit: Visit| {
        let allowed = visit.session.check_action();
        let shown = allowed.map(|()| show(visit));
        async move { shown?.await }
    })
}

/// The pages of portal links: no other page exists for their visitors.
fn portal_pages() -> Router<Arc<App>> {
    Router::new()
        .route("/portal", page(portal::show))
        .route("/portal/callbacks/{callback}", page(portal::callback))
        .route("/portal/callbacks/{callback}/test", confirm(portal::confirm_test).merge(action(portal::test)))
        .route("/portal/deliveries/{delivery}", page(portal::delivery))
        .route(
            "/portal/deliveries/{delivery}/redeliver",
            confirm(portal::confirm_redelivery).merge(action(portal::redeliver)),
        )
}

/// The actions: each is a page that says what it does, and its form.
fn actions() -> Router<Arc<App>> {
    use crate::pages::actions::{callbacks, calls, deliveries, edit, keys, leads, recovery, share};
    // The pages that share are open to viewers: they see the open links, but no form.
    let rows = [
        ("/deliveries/redeliver", confirm(deliveries::confirm_selected).merge(action(deliveries::redeliver_selected))),
        ("/deliveries/{delivery}/redeliver", confirm(deliveries::confirm).merge(action(deliveries::redeliver))),
        ("/leads/{lead}/update", confirm(leads::form).merge(action(leads::submit))),
        ("/leads/{lead}/end-call", confirm(calls::confirm).merge(action(calls::end))),
        ("/callbacks/{callback}/test", confirm(callbacks::confirm_test).merge(action(callbacks::test))),
        ("/callbacks/{callback}/enable", confirm(callbacks::confirm_enable).merge(action(callbacks::enable))),
        ("/callbacks/{callback}/pause", confirm(callbacks::confirm_pause).merge(action(callbacks::pause))),
        ("/callbacks/{callback}/resume", confirm(callbacks::confirm_resume).merge(action(callbacks::resume))),
        ("/callbacks/{callback}/rotate-secret", confirm(callbacks::confirm_rotation).merge(action(callbacks::rotate))),
        ("/callbacks/{callback}/recover", confirm(recovery::confirm).merge(action(recovery::recover))),
        ("/callbacks/{callback}/backfill", confirm(recovery::confirm_backfill).merge(action(recovery::backfill))),
        ("/processes/{process}/edit", confirm(edit::form).merge(large_action(edit::submit))),
        ("/callbacks/{callback}/share", page(share::form).merge(action(share::submit))),
        ("/processes/{process}/share", page(share::form).merge(action(share::submit))),
        ("/keys/{key}/revoke", confirm(keys::confirm).merge(action(keys::revoke))),
    ];
    rows.into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(&format!("/p/{{project}}{path}"), methods))
}

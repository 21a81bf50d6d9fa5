//! 1 Accept: `PUT /api/v1/processes/{processId}/callbacks/{callbackId}`.

use std::sync::Arc;

use contract::{key::ApiKey, process::CallbackSpec, rpc::ProcessChange};

use crate::{
    app::App,
    request::{Body, IfMatch, path::CallbackPath},
    response::HandlerResult,
    routes::{callbacks::get::find, processes::change},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
    IfMatch(expected): IfMatch,
    Body(callback): Body<CallbackSpec>,
) -> HandlerResult {
    change::check_urls(&app, &key, std::slice::from_ref(&callback)).await?;
    let change = ProcessChange::PutCallback { callback_id, callback };
    let result = change::change(&app, &key, process.selector(), expected, change).await?;
    change::respond(result, |process| find(process, |callback| callback.callback_id == callback_id))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredCallback;
    crate::openapi::Operation::new("Callbacks", "putCallback", "Configure a callback")
        .description("The body replaces the configuration. Secrets that are left out stay.")
        .body_component("CallbackRequest")
        .changes::<ConfiguredCallback>()
}

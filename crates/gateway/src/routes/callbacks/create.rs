//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks`.

use std::sync::Arc;

use contract::{key::ApiKey, process::CallbackSpec, rpc::ProcessChange};

use crate::{
    app::App,
    request::{Body, IfMatch, path::ProcessPath},
    response::HandlerResult,
    routes::{callbacks::get::find, processes::change},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    process: ProcessPath,
    IfMatch(expected): IfMatch,
    Body(callback): Body<CallbackSpec>,
) -> HandlerResult {
    change::check_urls(&app, &key, std::slice::from_ref(&callback)).await?;
    let name = callback.name.clone();
    let result =
        change::change(&app, &key, process.selector(), expected, ProcessChange::AddCallback { callback }).await?;
    change::respond(result, |process| find(process, |callback| callback.name == name))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredCallback;
    crate::openapi::Operation::new("Callbacks", "createCallback", "Create a callback")
        .description("A signing secret that is generated for it is shown in this response, and never again.")
        .body_component("CallbackRequest")
        .changes::<ConfiguredCallback>()
}

//! 1 Accept: `GET /api/v1/processes/{processId}/callbacks`.

use std::sync::Arc;

use contract::key::ApiKey;
use http_api::ListResponse;

use crate::{
    app::App,
    request::path::ProcessPath,
    response::{self, HandlerResult},
    routes::processes::change,
};

/// All callbacks are on one page.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, process: ProcessPath) -> HandlerResult {
    let process = change::read(&app, &key, process).await?;
    let version = process.revision;
    let page = contract::rpc::Page { items: process.callbacks, next: None };
    response::versioned(version, &ListResponse::<http_api::ConfiguredCallback>::new(page, Vec::new()))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredCallback;
    crate::openapi::Operation::new("Callbacks", "listCallbacks", "List callbacks")
        .description("All on one page.")
        .returns::<ListResponse<ConfiguredCallback>>()
        .response_header("ETag")
        .errors(&[404])
}

//! 1 Accept: `GET /api/v1/processes/{processId}/callbacks`.

use std::sync::Arc;

use contract::key::ApiKey;
use http_api::{CallbackWithHealth, ListResponse};

use crate::{
    app::App,
    request::path::ProcessPath,
    response::{self, HandlerResult},
    routes::callbacks::get,
};

/// All callbacks are on one page.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, process: ProcessPath) -> HandlerResult {
    let (process, mut health) = get::read(&app, &key, process).await?;
    let with_health = process.callbacks.into_iter().map(|callback| {
        let health = health.take(callback.callback_id);
        CallbackWithHealth { callback: callback.into(), health }
    });
    let data = with_health.collect();
    let list = ListResponse { success: true, data, next: None, warnings: health.warnings() };
    response::versioned(process.revision, &list)
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "listCallbacks", "List callbacks")
        .description("All on one page, each with its health.")
        .returns::<ListResponse<CallbackWithHealth>>()
        .response_header("ETag")
        .errors(&[404])
}

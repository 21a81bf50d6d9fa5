//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/resume`.

use std::sync::Arc;

use contract::key::ApiKey;

use super::pause::set_paused;
use crate::{app::App, request::path::CallbackPath, response::HandlerResult};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, callback: CallbackPath) -> HandlerResult {
    set_paused(app, key, callback, false).await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{DataResponse, PauseResult};
    crate::openapi::Operation::new("Callbacks", "resumeCallback", "Resume a callback")
        .description(
            "Ends a pause; the deliveries that waited are sent, the oldest first, within the callback's limits. A \
             callback that its failures disabled stays disabled.",
        )
        .returns::<DataResponse<PauseResult>>()
        .errors(&[404])
}

//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/enable`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::EnableCallback};
use http_api::{DataResponse, EnableResult};

use crate::{
    app::App,
    request::path::CallbackPath,
    response::{self, HandlerResult},
    routes::{callbacks::get::find, processes::change},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
) -> HandlerResult {
    // webhook-notifier enables any callback, so the gateway checks that this one belongs to the project.
    let process = change::read(&app, &key, process).await?;
    find(process, |callback| callback.callback_id == callback_id)?;
    let enabled = app.request(&EnableCallback { callback_id }).await?;
    response::ok(&DataResponse::new(EnableResult::from(enabled)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "enableCallback", "Enable a callback")
        .description(
            "Ends the disabling that the callback's failures caused; its waiting deliveries are sent. Its configuration \
             is not changed.",
        )
        .returns::<DataResponse<EnableResult>>()
        .errors(&[404])
}

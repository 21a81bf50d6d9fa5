//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/pause`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::PauseCallback};
use http_api::{DataResponse, PauseResult};

use crate::{
    app::App,
    request::path::CallbackPath,
    response::{self, HandlerResult},
    routes::{callbacks::get::find, processes::change},
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, callback: CallbackPath) -> HandlerResult {
    set_paused(app, key, callback, true).await
}

pub(super) async fn set_paused(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
    paused: bool,
) -> HandlerResult {
    // webhook-notifier pauses any callback, so the gateway checks that this one belongs to the project.
    let process = change::read(&app, &key, process).await?;
    find(process, |callback| callback.callback_id == callback_id)?;
    let result = app.request(&PauseCallback { callback_id, paused }).await?;
    response::ok(&DataResponse::new(PauseResult::from(result)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "pauseCallback", "Pause a callback")
        .description(
            "Its deliveries are recorded and wait until it is resumed. Attempts in progress end. Its configuration is \
             not changed.",
        )
        .returns::<DataResponse<PauseResult>>()
        .errors(&[404])
}

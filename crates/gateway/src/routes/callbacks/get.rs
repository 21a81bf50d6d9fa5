//! 1 Accept: `GET /api/v1/processes/{processId}/callbacks/{callbackId}`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    process::{Callback, Process},
    rpc::{ErrorCode, RpcError},
};
use http_api::{ConfiguredCallback, DataResponse};

use crate::{
    app::App,
    error::ApiError,
    request::path::CallbackPath,
    response::{self, HandlerResult},
    routes::processes::change,
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
) -> HandlerResult {
    let process = change::read(&app, &key, process).await?;
    let version = process.revision;
    let callback = find(process, |callback| callback.callback_id == callback_id)?;
    response::versioned(version, &DataResponse::new(callback))
}

/// The callback of a process that matches.
pub(crate) fn find(process: Process, matches: impl Fn(&Callback) -> bool) -> Result<ConfiguredCallback, ApiError> {
    let callback = process.callbacks.into_iter().find(|callback| matches(callback));
    callback
        .map(ConfiguredCallback::from)
        .ok_or_else(|| ApiError::Query(RpcError::new(ErrorCode::CallbackNotFound, "Callback not found")))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "getCallback", "Read a callback")
        .description("Secrets are never shown.")
        .returns::<DataResponse<ConfiguredCallback>>()
        .response_header("ETag")
        .errors(&[404])
}

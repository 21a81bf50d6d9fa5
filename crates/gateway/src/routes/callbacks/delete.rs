//! 1 Accept: `DELETE /api/v1/processes/{processId}/callbacks/{callbackId}`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ProcessChange};
use http_api::ConfiguredCallback;

use crate::{
    app::App,
    request::{IfMatch, path::CallbackPath},
    response::HandlerResult,
    routes::processes::change,
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
    IfMatch(expected): IfMatch,
) -> HandlerResult {
    let change = ProcessChange::RemoveCallback { callback_id };
    let result = change::change(&app, &key, process.selector(), expected, change).await?;
    change::respond(result, |_| Ok(None::<ConfiguredCallback>))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "removeCallback", "Remove a callback")
        .description("Its pending deliveries end as exhausted.")
        .changes::<Option<ConfiguredCallback>>()
}

//! 1 Accept: `PUT /api/v1/processes/{processId}`.

use std::sync::Arc;

use bytes::Bytes;
use contract::key::ApiKey;

use crate::{
    app::App,
    request::{IfMatch, path::ProcessPath},
    response::HandlerResult,
    routes::processes::{change, spec},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    process: ProcessPath,
    IfMatch(expected): IfMatch,
    body: Bytes,
) -> HandlerResult {
    let spec = spec::parse(&body, &key, Some(process))?;
    change::put(&app, &key, process.selector(), expected, spec).await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredProcess;
    crate::openapi::Operation::new("Processes", "putProcess", "Configure a process")
        .description(
            "The body replaces the configuration. Without `callbacks` the callbacks stay as they are; with it, callbacks \
             that are not in the list are removed. Callbacks keep their ids and secrets.",
        )
        .body_component("ProcessRequest")
        .changes::<ConfiguredProcess>()
}

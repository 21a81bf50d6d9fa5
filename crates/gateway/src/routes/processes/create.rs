//! 1 Accept: `POST /api/v1/processes`.

use std::sync::Arc;

use bytes::Bytes;
use contract::key::ApiKey;

use crate::{
    app::App,
    request::IfMatch,
    response::HandlerResult,
    routes::processes::{change, spec},
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, IfMatch(expected): IfMatch, body: Bytes) -> HandlerResult {
    let spec = spec::parse(&body, &key, None)?;
    change::put(&app, &key, contract::rpc::ProcessSelector::New, expected, spec).await
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredProcess;
    crate::openapi::Operation::new("Processes", "createProcess", "Create a process")
        .description(
            "Signing secrets that are generated for its callbacks are shown in this response, and never again.",
        )
        .body_component("ProcessRequest")
        .changes::<ConfiguredProcess>()
}

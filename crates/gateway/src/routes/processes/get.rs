//! 1 Accept: `GET /api/v1/processes/{processId}`.

use std::sync::Arc;

use contract::key::ApiKey;
use http_api::{ConfiguredProcess, DataResponse};

use crate::{
    app::App,
    request::path::ProcessPath,
    response::{self, HandlerResult},
    routes::processes::change,
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, process: ProcessPath) -> HandlerResult {
    let process = change::read(&app, &key, process).await?;
    response::versioned(process.revision, &DataResponse::new(ConfiguredProcess::from(process)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Processes", "getProcess", "Read a process")
        .description("The response can be sent back with `PUT`. Secrets are never shown.")
        .returns::<DataResponse<ConfiguredProcess>>()
        .response_header("ETag")
        .errors(&[404])
}

//! 1 Accept: `GET /api/v1/processes/{processId}/sources/{sourceId}`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    process::{Process, Source},
    rpc::{ErrorCode, RpcError},
};
use http_api::{ConfiguredSource, DataResponse};

use crate::{
    app::App,
    error::ApiError,
    request::path::SourcePath,
    response::{self, HandlerResult},
    routes::processes::change,
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    SourcePath { process, source_id }: SourcePath,
) -> HandlerResult {
    let process = change::read(&app, &key, process).await?;
    let version = process.revision;
    let source = find(process, |source| source.source_id == source_id)?;
    response::versioned(version, &DataResponse::new(source))
}

/// The source of a process that matches.
pub(crate) fn find(process: Process, matches: impl Fn(&Source) -> bool) -> Result<ConfiguredSource, ApiError> {
    let (project_id, process_id) = (process.project_id, process.process_id);
    let source = process.sources.into_iter().find(|source| matches(source));
    source
        .map(|source| ConfiguredSource::new(project_id, process_id, source))
        .ok_or_else(|| ApiError::Query(RpcError::new(ErrorCode::SourceNotFound, "Source not found")))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Sources", "getSource", "Read a source of call reports")
        .description("Secrets are never shown.")
        .returns::<DataResponse<ConfiguredSource>>()
        .response_header("ETag")
        .errors(&[404])
}

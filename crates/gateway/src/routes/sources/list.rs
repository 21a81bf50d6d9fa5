//! 1 Accept: `GET /api/v1/processes/{processId}/sources`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::Page};
use http_api::{ConfiguredSource, ListResponse};

use crate::{
    app::App,
    request::path::ProcessPath,
    response::{self, HandlerResult},
    routes::processes::change,
};

/// All sources are on one page.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, process: ProcessPath) -> HandlerResult {
    let process = change::read(&app, &key, process).await?;
    let version = process.revision;
    let (project_id, process_id) = (process.project_id, process.process_id);
    let sources = process.sources.into_iter().map(|source| ConfiguredSource::new(project_id, process_id, source));
    let page = Page { items: sources.collect(), next: None };
    response::versioned(version, &ListResponse::<ConfiguredSource>::new(page, Vec::new()))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Sources", "listSources", "List sources of call reports")
        .description("All on one page.")
        .returns::<ListResponse<ConfiguredSource>>()
        .response_header("ETag")
        .errors(&[404])
}

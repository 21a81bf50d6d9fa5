//! 1 Accept: `DELETE /api/v1/processes/{processId}/sources/{sourceId}`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ProcessChange};
use http_api::ConfiguredSource;

use crate::{
    app::App,
    request::{IfMatch, path::SourcePath},
    response::HandlerResult,
    routes::processes::change,
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    SourcePath { process, source_id }: SourcePath,
    IfMatch(expected): IfMatch,
) -> HandlerResult {
    let change = ProcessChange::RemoveSource { source_id };
    let result = change::change(&app, &key, process.selector(), expected, change).await?;
    change::respond(result, |_| Ok(None::<ConfiguredSource>))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Sources", "removeSource", "Remove a source of call reports")
        .description("Its reports are refused from then on.")
        .changes::<Option<ConfiguredSource>>()
}

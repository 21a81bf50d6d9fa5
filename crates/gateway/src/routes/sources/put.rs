//! 1 Accept: `PUT /api/v1/processes/{processId}/sources/{sourceId}`.

use std::sync::Arc;

use contract::{key::ApiKey, process::SourceSpec, rpc::ProcessChange};

use crate::{
    app::App,
    request::{Body, IfMatch, path::SourcePath},
    response::HandlerResult,
    routes::{processes::change, sources::get::find},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    SourcePath { process, source_id }: SourcePath,
    IfMatch(expected): IfMatch,
    Body(source): Body<SourceSpec>,
) -> HandlerResult {
    let change = ProcessChange::PutSource { source_id, source };
    let result = change::change(&app, &key, process.selector(), expected, change).await?;
    change::respond(result, |process| find(process, |source| source.source_id == source_id))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredSource;
    crate::openapi::Operation::new("Sources", "putSource", "Configure a source of call reports")
        .description(
            "The body replaces the configuration. Secrets that are left out stay, unless the platform changes.",
        )
        .body_component("SourceRequest")
        .changes::<ConfiguredSource>()
}

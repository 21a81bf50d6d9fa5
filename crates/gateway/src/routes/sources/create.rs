//! 1 Accept: `POST /api/v1/processes/{processId}/sources`.

use std::sync::Arc;

use contract::{key::ApiKey, process::SourceSpec, rpc::ProcessChange};

use crate::{
    app::App,
    request::{Body, IfMatch, path::ProcessPath},
    response::HandlerResult,
    routes::{processes::change, sources::get::find},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    process: ProcessPath,
    IfMatch(expected): IfMatch,
    Body(source): Body<SourceSpec>,
) -> HandlerResult {
    let name = source.name.clone();
    let result = change::change(&app, &key, process.selector(), expected, ProcessChange::AddSource { source }).await?;
    change::respond(result, |process| find(process, |source| source.name == name))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::ConfiguredSource;
    crate::openapi::Operation::new("Sources", "createSource", "Create a source of call reports")
        .description("The platform's webhooks are sent to the `ingestPath` of the response.")
        .body_component("SourceRequest")
        .changes::<ConfiguredSource>()
}

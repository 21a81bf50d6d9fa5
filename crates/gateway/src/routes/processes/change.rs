//! 1 Accept: reading and changing the configuration of processes, which lead-state stores.

use contract::{
    key::ApiKey,
    process::{CallbackSpec, Process, RequestedUrl},
    rpc::{
        ChangeProcess, CheckUrls, ErrorCode, GetProcess, ProcessChange, ProcessChangeResult, ProcessSelector, RpcError,
    },
};
use http_api::{ChangeResponse, ConfiguredProcess};
use serde::Serialize;

use super::spec::ProcessBody;
use crate::{
    app::App,
    error::ApiError,
    request::path::ProcessPath,
    response::{self, HandlerResult},
};

pub(crate) async fn read(app: &App, key: &ApiKey, process: ProcessPath) -> Result<Process, ApiError> {
    let query = GetProcess { project_id: key.project_id, process: process.selector() };
    app.request(&query).await
}

/// Creates or configures a process.
pub(crate) async fn put(
    app: &App,
    key: &ApiKey,
    process: ProcessSelector,
    expected_version: Option<u32>,
    ProcessBody { spec, keep_callbacks }: ProcessBody,
) -> HandlerResult {
    check_urls(app, key, &spec.callbacks).await?;
    let result = change(app, key, process, expected_version, ProcessChange::Put { spec, keep_callbacks }).await?;
    respond(result, |process| Ok(ConfiguredProcess::from(process)))
}

/// Makes a change atomically.
pub(crate) async fn change(
    app: &App,
    key: &ApiKey,
    process: ProcessSelector,
    expected_version: Option<u32>,
    change: ProcessChange,
) -> Result<ProcessChangeResult, ApiError> {
    let expected_revision = expected_version.map(i64::from);
    let change = ChangeProcess { project_id: key.project_id, process, change, expected_revision, dry_run: false };
    app.request(&change).await
}

/// The response to a change: `data` of the changed process, and the list of changes.
pub(crate) fn respond<T: Serialize>(
    result: ProcessChangeResult,
    data: impl FnOnce(Process) -> Result<T, ApiError>,
) -> HandlerResult {
    let ProcessChangeResult { process, changed, changes, warnings, .. } = result;
    let version = process.revision;
    response::versioned(version, &ChangeResponse { success: true, data: data(process)?, changed, changes, warnings })
}

/// Refuses URLs that webhook-notifier would not call.
pub(crate) async fn check_urls(app: &App, key: &ApiKey, callbacks: &[CallbackSpec]) -> Result<(), ApiError> {
    app.connection()?;
    if callbacks.is_empty() {
        return Ok(());
    }
    let requested = || callbacks.iter().flat_map(|callback| callback.urls().map(move |url| (&callback.name, url)));
    let urls = requested().map(|(_, (_, url))| url.to_owned()).collect();
    let checks = app.request(&CheckUrls { project_id: key.project_id, urls }).await?;
    let refused = requested().zip(checks).find_map(|((name, (kind, _)), check)| Some((name, kind, check.refused?)));
    let message = match refused {
        None => return Ok(()),
        Some((name, RequestedUrl::Callback, why)) => format!("callback {name:?}: {why}"),
        Some((name, RequestedUrl::TokenEndpoint, why)) => format!("callback {name:?}: auth.tokenUrl: {why}"),
    };
    Err(ApiError::Query(RpcError::new(ErrorCode::UrlRefused, message)))
}

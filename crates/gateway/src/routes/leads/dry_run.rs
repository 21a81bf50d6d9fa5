//! 1 Accept: `dryRun`: the outcome that an update would have, decided by lead-state for the lead as it is. Nothing is
//! logged.

use std::time::Instant;

use contract::{key::ApiKey, rpc::DryRunUpdate, update_body::UpdateBody};
use http_api::DryRunResponse;
use http_body::Body as _;

use crate::{
    app::App,
    error::ApiError,
    response::{self, HandlerResult},
};

pub(crate) async fn respond(app: &App, key: &ApiKey, update: UpdateBody) -> HandlerResult {
    let UpdateBody { command, mut warnings } = update;
    let query = DryRunUpdate { project_id: key.project_id, command };
    app.read_budget.admit_read(key.project_id, Instant::now()).map_err(ApiError::WorkLimited)?;
    let mut event = app.request(&query).await?;
    warnings.append(&mut event.warnings);
    let response = response::ok(&DryRunResponse {
        success: true,
        message: "Dry run: nothing was changed".into(),
        dry_run: true,
        outcome: event.into(),
        warnings,
    })?;
    // It reads the lead, as a query does.
    app.read_budget.spend(key.project_id, response.body().size_hint().exact().unwrap_or_default(), Instant::now());
    Ok(response)
}

//! 1 Accept: `dryRun`: the outcome that an update would have, decided by lead-state for the lead as it is. Nothing is logged.

use contract::{key::ApiKey, rpc::DryRunUpdate, update_body::UpdateBody};
use http_api::DryRunResponse;

use crate::{
    app::App,
    response::{self, HandlerResult},
};

pub(crate) async fn respond(app: &App, key: &ApiKey, update: UpdateBody) -> HandlerResult {
    let UpdateBody { command, mut warnings } = update;
    let query = DryRunUpdate { project_id: key.project_id, command };
    let mut event = app.request(&query).await?;
    warnings.append(&mut event.warnings);
    response::ok(&DryRunResponse {
        success: true,
        message: "Dry run: nothing was changed".into(),
        dry_run: true,
        outcome: event.into(),
        warnings,
    })
}

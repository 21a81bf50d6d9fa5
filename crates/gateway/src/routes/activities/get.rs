//! 1 Accept: `GET /api/v1/activities/{activityId}`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{ErrorCode, GetUpdate, RpcError},
};
use http_api::{CallActivity, DataResponse};

use crate::{
    app::App,
    error::ApiError,
    request::path::ActivityPath,
    response::{self, HandlerResult},
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, ActivityPath(id): ActivityPath) -> HandlerResult {
    let not_found = || ApiError::Query(RpcError::new(ErrorCode::ActivityNotFound, "Activity not found"));
    let update = app.request(&GetUpdate { project_id: key.project_id, update_id: id }).await;
    let update = update.map_err(|error| match error {
        // An activity is stored as the update that ended its call, so a missing update means a missing activity.
        ApiError::Query(error) if error.code == ErrorCode::UpdateNotFound.as_str() => not_found(),
        error => error,
    })?;
    response::ok(&DataResponse::new(CallActivity::of(update).ok_or_else(not_found)?))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Calls", "getActivity", "Read an activity")
        .description("The reported result of a call: `result` of `POST /api/v1/calls/ended`. Its id is the `updateId` of that event.")
        .returns::<DataResponse<CallActivity>>()
        .errors(&[404])
}

//! 1 Accept: `GET /api/v1/updates/{updateId}`: an update's timeline, from lead-state and webhook-notifier.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{GetUpdate, ListUpdateDeliveries, Update, UpdateDeliveries},
    warning::Warning,
};
use http_api::{TimelineResponse, UpdateTimeline};

use crate::{
    app::App,
    error::ApiError,
    request::path::UpdatePath,
    response::{self, HandlerResult},
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, UpdatePath(update_id): UpdatePath) -> HandlerResult {
    let project_id = key.project_id;
    let get_update = GetUpdate { project_id, update_id };
    let list_deliveries = ListUpdateDeliveries { project_id, update_id };
    let (update, deliveries) = tokio::join!(app.request(&get_update), app.request(&list_deliveries));
    response::ok(&timeline(update?, deliveries))
}

/// The timeline, with a warning instead of the deliveries if webhook-notifier did not answer.
fn timeline(update: Update, deliveries: Result<UpdateDeliveries, ApiError>) -> TimelineResponse {
    let mut timeline = UpdateTimeline::from(update);
    let mut warnings = Vec::new();
    match deliveries {
        Ok(UpdateDeliveries { deliveries, parked, unrecorded }) => {
            timeline.deliveries = Some(deliveries.into_iter().map(Into::into).collect());
            timeline.parked = parked.map(Into::into);
            timeline.unrecorded = unrecorded;
        }
        Err(error) => warnings.push(Warning::DELIVERIES_MISSING.with(&[&error])),
    }
    TimelineResponse { success: true, data: timeline, warnings }
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Updates", "getUpdate", "Read an update's timeline")
        .description("The command, the outcome, every delivery and every attempt of an update.")
        .returns::<TimelineResponse>()
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use contract::ObjectId;

    use super::*;

    #[test]
    fn a_timeline_without_the_notifier_has_a_warning() {
        let update = Update::pending(ObjectId::from_bytes([1; 12]));

        let timeline = timeline(update, Err(ApiError::Unavailable));

        assert_eq!(timeline.data.deliveries, None);
        assert_eq!(
            timeline.warnings,
            ["deliveries are missing: The request could not be answered because a service is unavailable; retry"]
        );
    }
}

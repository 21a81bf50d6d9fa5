//! 1 Accept: `GET /api/v1/processes/{processId}/callbacks/{callbackId}/failures`.

use std::{sync::Arc, time::Duration};

use contract::{Timestamp, key::ApiKey, rpc::GroupFailures};
use http_api::CallbackFailuresResponse;
use service_kit::clock;

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters, path::CallbackPath},
    response::{self, HandlerResult},
    routes::{callbacks::get::find, processes::change},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Since when the failures are grouped.
pub(crate) struct FailuresQuery {
    since: Timestamp,
}

impl FromQuery for FailuresQuery {
    fn from_query(parameters: &mut Fields<'_>, _: &ApiKey) -> Result<Self, ApiError> {
        Ok(Self { since: parameters.time("since")?.unwrap_or_else(|| clock::now().minus(DAY)) })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
    Query { query: FailuresQuery { since }, warnings }: Query<FailuresQuery>,
) -> HandlerResult {
    let group = GroupFailures { project_id: key.project_id, callback_id, since };
    let (process, failures) = tokio::join!(change::read(&app, &key, process), app.request(&group));
    find(process?, |callback| callback.callback_id == callback_id)?;
    response::ok(&CallbackFailuresResponse { success: true, data: failures?.into(), warnings })
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "listCallbackFailures", "List a callback's failures")
        .description(
            "The deliveries that failed and are pending or exhausted, grouped by the status and the error of their last \
             attempt, each group with one of them as a sample.",
        )
        .query_example("since=2026-01-12T00:00:00Z")
        .query(
            "since",
            "Only deliveries that failed at this time or later; by default 24 hours ago",
            crate::openapi::date_time(),
        )
        .returns::<CallbackFailuresResponse>()
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    #[test]
    fn failures_of_a_day_are_grouped_by_default() {
        let since = |query: &str| Query::<FailuresQuery>::parse(query, &key()).map(|parsed| parsed.query.since);

        let default = since("").unwrap();
        let age = clock::now().millis() - default.millis();
        assert!((86_400_000..86_460_000).contains(&age), "{age}");
        assert_eq!(since("since=2026-01-12T04:55:59Z").unwrap(), Timestamp::from_millis(1_768_193_759_000));
        assert_eq!(since("since=soon").map_err(|e| e.status().as_u16()), Err(400));
    }
}

//! 1 Accept: `GET /api/v1/stats`: counts of updates and deliveries, from lead-state and webhook-notifier.

use std::sync::Arc;

use contract::{
    ObjectId,
    key::ApiKey,
    rpc::{self, CountDeliveries, CountUpdates, StatisticsGroup, StatisticsRange, StatisticsStep},
    warning::Warning,
};
use http_api::{Statistics, StatisticsResponse};
use service_kit::clock;

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

pub(crate) struct StatisticsQuery {
    range: StatisticsRange,
    by: Option<StatisticsGroup>,
    callback_id: Option<ObjectId>,
}

impl FromQuery for StatisticsQuery {
    fn from_query(parameters: &mut Fields<'_>, _: &ApiKey) -> Result<Self, ApiError> {
        let (from, to) = (parameters.time("from")?, parameters.time("to")?);
        let step = parameters.text("step")?.map(|text| text.parse::<StatisticsStep>());
        let step = step.transpose().map_err(|e| ApiError::field("step", e.to_string()))?;
        let by = parameters.text("by")?.map(|text| text.parse::<StatisticsGroup>());
        let by = by.transpose().map_err(|e| ApiError::field("by", e.to_string()))?;
        let range = StatisticsRange::new(from, to, step, clock::now()).map_err(|e| ApiError::Query(e.into()))?;
        Ok(Self { range, by, callback_id: parameters.id("callbackId")? })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    Query { query, warnings }: Query<StatisticsQuery>,
) -> HandlerResult {
    let StatisticsQuery { range, by, callback_id } = query;
    let project_id = key.project_id;
    let count_updates = CountUpdates { project_id, range, by };
    let count_deliveries = CountDeliveries { project_id, range, by, callback_id };
    let (updates, deliveries) = tokio::join!(app.request(&count_updates), app.request(&count_deliveries));
    response::ok(&statistics(range, by, updates?, deliveries, warnings)?)
}

/// The statistics, with a warning instead of the deliveries if webhook-notifier did not answer.
fn statistics(
    StatisticsRange { from, to, step }: StatisticsRange,
    by: Option<StatisticsGroup>,
    updates: Vec<rpc::UpdateCounts>,
    deliveries: Result<Vec<rpc::DeliveryCounts>, ApiError>,
    mut warnings: Vec<String>,
) -> Result<StatisticsResponse, ApiError> {
    let deliveries = match deliveries {
        Ok(deliveries) => Some(deliveries.into_iter().map(Into::into).collect()),
        Err(ApiError::Query(refused)) if refused.status < 500 => return Err(ApiError::Query(refused)),
        Err(error) => {
            warnings.push(Warning::DELIVERIES_MISSING.with(&[&error]));
            None
        }
    };
    let updates = updates.into_iter().map(Into::into).collect();
    let data = Statistics { from: http_api::DateTime(from), to: http_api::DateTime(to), step, by, updates, deliveries };
    Ok(StatisticsResponse { success: true, data, warnings })
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use crate::openapi::{date_time, id, one_of};
    crate::openapi::Operation::new("Statistics", "getStatistics", "Count updates and deliveries")
        .description(
            "Exact counts per minute, hour or day (UTC), by default of the last 24 hours by the hour. A range is at most 1 day \
             long with `step=minute`, otherwise 31 days. `from` is rounded down and `to` up to whole steps. Steps without \
             anything are left out.",
        )
        .query("from", "The start; by default 24 hours before `to`", date_time())
        .query("to", "The end, not included; by default now", date_time())
        .query("step", "The length of a step; by default `hour`", one_of(&["minute", "hour", "day"]))
        .query(
            "by",
            "What to group the counts by. Updates have no callback, and deliveries no error code: these counts are not grouped then",
            one_of(&["process", "kind", "code", "callback"]),
        )
        .query("callbackId", "Only attempts and deliveries of this callback; the updates are all of the project", id())
        .query_example("step=hour&by=code")
        .returns::<StatisticsResponse>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    #[test]
    fn parameters_are_parsed() {
        let answer = |query: &str| match Query::<StatisticsQuery>::parse(query, &key()) {
            Ok(Query { query: StatisticsQuery { range, by, callback_id }, warnings }) => {
                let (range, callback_id) =
                    (serde_json::to_string(&range).unwrap(), callback_id.map(|id| id.to_string()));
                format!("?{query}\n    {range} {by:?} {callback_id:?} {warnings:?}")
            }
            Err(e) => format!("?{query}\n    {} {}: {e}", e.status().as_u16(), e.code()),
        };
        let answers = [
            "from=2026-01-12T04:10:00Z&to=2026-01-12T05:00:01Z&step=hour&by=code&group=7",
            "to=2026-01-12T05:00:00Z&step=minute&callbackId=696102a4b8c1d2e3f4a5b604",
            "callbackId=crm",
            "from=2026-01-12T04:10:00Z&to=2026-01-12T04:00:00Z",
            "from=2026-01-10T04:10:00Z&to=2026-01-12T04:00:00Z&step=minute",
            "step=week",
            "by=lead",
        ]
        .map(answer);
        insta::assert_snapshot!(answers.join("\n"), @r#"
        ?from=2026-01-12T04:10:00Z&to=2026-01-12T05:00:01Z&step=hour&by=code&group=7
            {"from":1768190400000,"to":1768197600000,"step":"hour"} Some(Code) None ["ignored as unknown: group"]
        ?to=2026-01-12T05:00:00Z&step=minute&callbackId=696102a4b8c1d2e3f4a5b604
            {"from":1768107600000,"to":1768194000000,"step":"minute"} None Some("696102a4b8c1d2e3f4a5b604") []
        ?callbackId=crm
            400 invalid_field: callbackId must be 24 hex digits
        ?from=2026-01-12T04:10:00Z&to=2026-01-12T04:00:00Z
            400 invalid_field: to must be later than from
        ?from=2026-01-10T04:10:00Z&to=2026-01-12T04:00:00Z&step=minute
            400 invalid_field: the range is longer than 1 d, the limit of step=minute: choose a shorter range, or a longer step
        ?step=week
            400 invalid_field: step must be minute, hour or day
        ?by=lead
            400 invalid_field: by must be process, kind, code or callback
        "#);
    }

    #[test]
    fn statistics_without_the_notifier_have_a_warning() {
        let now = contract::Timestamp::from_millis(0);
        let range = StatisticsRange::new(None, None, None, now).unwrap();

        let response = statistics(range, None, vec![], Err(ApiError::Unavailable), vec![]).unwrap();

        assert_eq!(response.data.deliveries, None);
        assert!(response.warnings[0].starts_with("deliveries are missing: "), "{:?}", response.warnings);
    }
}

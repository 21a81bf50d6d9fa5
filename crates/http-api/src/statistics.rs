//! Statistics of updates and deliveries.

use contract::{
    ObjectId,
    rpc::{self, StatisticsGroup, StatisticsStep},
};
use serde::{Deserialize, Serialize};

use crate::{convert::response_from, examples::example, time::DateTime};

/// The body of `GET /api/v1/stats`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct StatisticsResponse {
    /// Always true.
    pub success: bool,
    /// The counts.
    pub data: Statistics,
    /// Warnings about ignored parts of the request and about missing deliveries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Counts of updates and deliveries per step, in order of time, without empty steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Statistics {
    /// The start of the first step.
    pub from: DateTime,
    /// The end of the last step.
    pub to: DateTime,
    /// The length of a step.
    pub step: StatisticsStep,
    /// What the counts are grouped by.
    pub by: Option<StatisticsGroup>,
    /// Updates and call events, by when they were accepted. Those that are not decided yet are not counted.
    pub updates: Vec<UpdateCounts>,
    /// Attempts by when they started, and exhausted deliveries by when they ended; null if webhook-notifier did not
    /// answer.
    pub deliveries: Option<Vec<DeliveryCounts>>,
}

/// How the updates of one step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateCounts {
    /// The start of the step.
    pub at: DateTime,
    /// What `by` names: `processId`, kind or error code; null without it, for successes by code, and for an unknown
    /// lead.
    pub group: Option<String>,
    /// How many succeeded.
    pub succeeded: i64,
    /// How many failed.
    pub failed: i64,
}

response_from!(counts: rpc::UpdateCounts => UpdateCounts { at, group, succeeded, failed });

/// How attempts and deliveries of one step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeliveryCounts {
    /// The start of the step.
    pub at: DateTime,
    /// What `by` names: `processId`, kind or `callbackId`; null without it, and for the fallback process.
    pub group: Option<String>,
    /// How many attempts the endpoints accepted.
    pub delivered: i64,
    /// How many of these took at most 100 ms.
    pub within_100ms: i64,
    /// How many of these took at most a second.
    pub within_1s: i64,
    /// How many of these took at most ten seconds.
    pub within_10s: i64,
    /// How many attempts failed.
    pub failed: i64,
    /// How many deliveries were exhausted.
    pub exhausted: i64,
}

response_from!(counts: rpc::DeliveryCounts => DeliveryCounts {
    at, group, delivered, within_100ms, within_1s, within_10s, failed, exhausted,
});

/// The body of `POST /api/v1/analytics/customer/stats`. Unknown fields and empty texts are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallStatisticsRequest {
    /// The start, in milliseconds. A call counts when its result was accepted, which is the time in its `activityId`,
    /// to the second.
    pub start: i64,
    /// The end, in milliseconds, not included; at most 32 days after `start`.
    pub end: i64,
    /// The API key's project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// Only calls with leads of this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// Only calls with leads of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub group_id: Option<String>,
    /// How many minutes local time is ahead of UTC, for the days of `interested.data`: 330 in India, -300 in New York
    /// in winter. By default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = -840, max = 840)))]
    pub timezone_offset_minutes: Option<i32>,
    /// Whether to count leads in `unique`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub include_unique_leads: Option<bool>,
}

/// Counts of the calls that ended with a result: the activities. A call whose end was reported without one does not
/// count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallStatistics {
    /// Outgoing calls: all but the incoming ones.
    pub attempts: i64,
    /// Answered calls, outgoing or incoming: `connected` of their result is true.
    pub connected: i64,
    /// Incoming calls: `direction` of their result is `incoming`.
    pub incoming: i64,
    /// Connected calls that have a disposition or moved the lead to another state.
    pub meaningfully_handled: i64,
    /// Calls that ended with an interested lead.
    pub interested: InterestedCalls,
    /// The same counts by lead; null without `includeUniqueLeads`.
    pub unique: Option<UniqueLeads>,
}

/// Calls whose end moved the lead to the state `interested`, or confirmed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct InterestedCalls {
    /// The number of these calls.
    pub total: i64,
    /// By day, in order of time, without days that have none.
    pub data: Vec<InterestedDay>,
}

/// The calls of one day that ended with an interested lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct InterestedDay {
    /// The day, by `timezoneOffsetMinutes`.
    #[cfg_attr(feature = "schema", schemars(extend("format" = "date")))]
    pub date: String,
    /// The number of these calls.
    pub count: i64,
}

/// How many different leads had at least one such call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UniqueLeads {
    /// Leads that were called.
    pub attempts: i64,
    /// Leads with a connected call.
    pub connected: i64,
    /// Leads that called.
    pub incoming: i64,
    /// Leads with a call that was handled meaningfully.
    pub meaningfully_handled: i64,
    /// Leads with a call that ended with an interested lead.
    pub interested: i64,
}

response_from!(day: rpc::DayCount => InterestedDay { date, count });
response_from!(counts: rpc::CallCounts => UniqueLeads {
    attempts, connected, incoming, meaningfully_handled, interested,
});

impl From<rpc::ActivityCounts> for CallStatistics {
    fn from(counts: rpc::ActivityCounts) -> Self {
        let rpc::ActivityCounts { calls, interested_by_day, leads } = counts;
        let data = interested_by_day.into_iter().map(Into::into).collect();
        Self {
            attempts: calls.attempts,
            connected: calls.connected,
            incoming: calls.incoming,
            meaningfully_handled: calls.meaningfully_handled,
            interested: InterestedCalls { total: calls.interested, data },
            unique: leads.map(Into::into),
        }
    }
}

example!(
    call_statistics_request: CallStatisticsRequest,
    r#"{"start":1768176000000,"end":1768262400000,"processId":"696102a4b8c1d2e3f4a5b602","timezoneOffsetMinutes":330,"includeUniqueLeads":true}"#
);
example!(
    call_statistics: CallStatistics,
    r#"{"attempts":214,"connected":131,"incoming":12,"meaningfullyHandled":96,"interested":{"total":31,"data":[{"date":"2026-01-12","count":31}]},"unique":{"attempts":180,"connected":122,"incoming":11,"meaningfullyHandled":90,"interested":30}}"#
);
example!(
    statistics_response: StatisticsResponse,
    r#"{"success":true,"data":{"from":"2026-01-12T04:00:00.000Z","to":"2026-01-12T05:00:00.000Z","step":"hour","by":"code","updates":[{"at":"2026-01-12T04:00:00.000Z","group":null,"succeeded":118,"failed":0},{"at":"2026-01-12T04:00:00.000Z","group":"transition_not_allowed","succeeded":0,"failed":2}],"deliveries":[{"at":"2026-01-12T04:00:00.000Z","group":null,"delivered":119,"within100ms":104,"within1s":119,"within10s":119,"failed":3,"exhausted":1}]}}"#
);

//! Statistics of updates and deliveries.

use contract::rpc::{self, StatisticsGroup, StatisticsStep};
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
    /// What the request contained and was ignored; and whether deliveries are missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Counts of updates and deliveries per step, in order of time, without empty steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Statistics {
    /// The begin of the first step.
    pub from: DateTime,
    /// The end of the last step.
    pub to: DateTime,
    /// The length of a step.
    pub step: StatisticsStep,
    /// What the counts are divided by.
    pub by: Option<StatisticsGroup>,
    /// Updates and call events, by when they were accepted. Those that are not decided yet are not counted.
    pub updates: Vec<UpdateCounts>,
    /// Attempts by when they started, and exhausted deliveries by when they were given up; null if webhook-notifier did not
    /// answer.
    pub deliveries: Option<Vec<DeliveryCounts>>,
}

/// How the updates of one step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateCounts {
    /// The begin of the step.
    pub at: DateTime,
    /// What `by` names: `processId`, kind or error code; null without it, for successes by code, and for an unknown lead.
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
    /// The begin of the step.
    pub at: DateTime,
    /// What `by` names: `processId`, kind or `callbackId`; null without it, and for the fallback process.
    pub group: Option<String>,
    /// How many attempts the endpoints accepted.
    pub delivered: i64,
    /// How many of these within 100 ms.
    pub within_100ms: i64,
    /// How many of these within a second.
    pub within_1s: i64,
    /// How many of these within ten seconds.
    pub within_10s: i64,
    /// How many attempts failed.
    pub failed: i64,
    /// How many deliveries were exhausted.
    pub exhausted: i64,
}

response_from!(counts: rpc::DeliveryCounts => DeliveryCounts {
    at, group, delivered, within_100ms, within_1s, within_10s, failed, exhausted,
});

example!(
    statistics_response: StatisticsResponse,
    r#"{"success":true,"data":{"from":"2026-01-12T04:00:00.000Z","to":"2026-01-12T05:00:00.000Z","step":"hour","by":"code","updates":[{"at":"2026-01-12T04:00:00.000Z","group":null,"succeeded":118,"failed":0},{"at":"2026-01-12T04:00:00.000Z","group":"transition_not_allowed","succeeded":0,"failed":2}],"deliveries":[{"at":"2026-01-12T04:00:00.000Z","group":null,"delivered":119,"within100ms":104,"within1s":119,"within10s":119,"failed":3,"exhausted":1}]}}"#
);

//! Deliveries: lists, details, failures, recovery and backfill.

use contract::{
    ObjectId,
    event_kind::DeliveryKind,
    rpc::{self, Cursor, DeliveryId, DeliveryStatus},
};
use serde::{Deserialize, Serialize};

use crate::{convert::response_from, examples::example, time::DateTime, updates::Delivery};

/// An item of `GET /api/v1/deliveries`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedDelivery {
    /// `{updateId}-{callbackId}`; with a suffix `-{kind}` if it does not report the outcome of an update.
    pub delivery_id: String,
    /// The update.
    pub update_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// The kind of the event; absent for the outcome of an update.
    #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
    pub kind: DeliveryKind,
    /// The callback's process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// `pending`, `delivered`, or `exhausted`: ended without success.
    pub status: DeliveryStatus,
    /// The number of attempts so far.
    pub attempts: u32,
    /// When the next attempt is due.
    pub next_attempt_at: Option<DateTime>,
    /// When it was recorded.
    pub created_at: DateTime,
    /// When it last changed.
    pub updated_at: DateTime,
    /// The status of the response to the last attempt, if there was one.
    pub status_code: Option<u16>,
    /// The error of the last attempt.
    pub error: Option<String>,
}

response_from!(delivery: rpc::ListedDelivery => ListedDelivery {
    process_id, status, attempts, next_attempt_at, created_at, updated_at, status_code, error,
} with {
    delivery_id: delivery.id.to_string(),
    update_id: delivery.id.update_id,
    callback_id: delivery.id.callback_id,
    kind: delivery.id.kind,
});

/// `data` of `GET /api/v1/deliveries/{deliveryId}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeliveryDetails {
    /// `{updateId}-{callbackId}`; with a suffix `-{kind}` if it does not report the outcome of an update.
    pub delivery_id: String,
    /// The update.
    pub update_id: ObjectId,
    /// The delivery and its attempts.
    #[serde(flatten)]
    pub delivery: Delivery,
}

impl From<rpc::Delivery> for DeliveryDetails {
    fn from(delivery: rpc::Delivery) -> Self {
        let rpc::Delivery { update_id, callback_id, kind, .. } = delivery;
        let delivery_id = DeliveryId { update_id, callback_id, kind }.to_string();
        Self { delivery_id, update_id, delivery: delivery.into() }
    }
}

/// The body of `GET …/callbacks/{callbackId}/failures`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackFailuresResponse {
    /// Always true.
    pub success: bool,
    /// The failures.
    pub data: CallbackFailures,
    /// Warnings about ignored parts of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The failures of a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackFailures {
    /// The groups, the largest first; at most 100.
    pub groups: Vec<FailureGroup>,
    /// Whether every failed delivery is counted. At most 500 pending and 500 exhausted ones are read, and at most 50
    /// 000 exhausted ones of the project are searched.
    pub complete: bool,
}

/// Deliveries whose last attempt failed in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct FailureGroup {
    /// The status of the response to the last attempt, if there was one.
    pub status_code: Option<u16>,
    /// The error of the last attempt, or the reason why the delivery is exhausted.
    pub error: Option<String>,
    /// How many of the deliveries are pending: they are attempted again.
    pub pending: i64,
    /// How many of the deliveries are exhausted.
    pub exhausted: i64,
    /// When the last of them failed.
    pub last_at: DateTime,
    /// The delivery that failed last, as `deliveryId`.
    pub sample: String,
    /// The first bytes of the response to its last attempt.
    pub response: Option<String>,
}

response_from!(group: rpc::FailureGroup => FailureGroup {
    status_code, error, pending, exhausted, last_at, response,
} with { sample: group.sample.to_string() });

impl From<rpc::CallbackFailures> for CallbackFailures {
    fn from(failures: rpc::CallbackFailures) -> Self {
        let rpc::CallbackFailures { groups, complete } = failures;
        Self { groups: groups.into_iter().map(Into::into).collect(), complete }
    }
}

/// The body of `POST /api/v1/deliveries/recover`. Unknown fields are refused: ignoring a misspelt filter would repeat
/// more deliveries than intended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RecoverRequest {
    /// Only deliveries of updates made at this time or later.
    pub since: DateTime,
    /// `exhausted` (the default) or `delivered`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<DeliveryStatus>,
    /// Only to this callback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback_id: Option<ObjectId>,
    /// How many deliveries become due per second; 10 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000)))]
    pub per_second: Option<u32>,
    /// Only count the deliveries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// `next` of the previous response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// The body of `POST …/callbacks/{callbackId}/backfill`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackfillRequest {
    /// Only events of updates made at this time or later.
    pub since: DateTime,
    /// How many deliveries become due per second; 10 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000)))]
    pub per_second: Option<u32>,
    /// Only count the deliveries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// `next` of the previous response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// `data` of `POST /api/v1/deliveries/recover` and of a backfill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoverResult {
    /// How many deliveries this request makes or repeats; in a dry run, how many it would.
    pub deliveries: u64,
    /// Whether the deliveries were only counted.
    pub dry_run: bool,
    /// When the last of the deliveries is due.
    pub until: Option<DateTime>,
    /// If not null, there are more deliveries: repeat the request with this value as `cursor`.
    pub next: Option<Cursor>,
}

impl RecoverResult {
    /// The response to a recovery or backfill, or to a dry run of one.
    pub fn new(recovered: rpc::RecoveredDeliveries, dry_run: bool) -> Self {
        let rpc::RecoveredDeliveries { deliveries, until, next } = recovered;
        Self { deliveries, dry_run, until: until.map(DateTime), next }
    }
}

example!(
    listed_delivery: ListedDelivery,
    r#"{"deliveryId":"6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604","updateId":"6b0426971c73026dafa27e40","callbackId":"696102a4b8c1d2e3f4a5b604","processId":"696102a4b8c1d2e3f4a5b602","status":"exhausted","attempts":10,"nextAttemptAt":null,"createdAt":"2026-01-12T09:30:00.004Z","updatedAt":"2026-01-13T18:02:11.310Z","statusCode":500,"error":"the endpoint answered 500 Internal Server Error"}"#
);
example!(
    delivery_details: DeliveryDetails,
    r#"{"deliveryId":"6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604","updateId":"6b0426971c73026dafa27e40","callbackId":"696102a4b8c1d2e3f4a5b604","status":"pending","nextAttemptAt":"2026-01-12T09:30:05.053Z","attempts":[{"number":1,"startedAt":"2026-01-12T09:30:00.012Z","durationMs":41,"statusCode":500,"error":"the endpoint answered 500 Internal Server Error","response":"out of memory"}]}"#
);
example!(
    recover_request: RecoverRequest,
    r#"{"since":"2026-01-12T00:00:00.000Z","status":"exhausted","callbackId":"696102a4b8c1d2e3f4a5b604","perSecond":50}"#
);
example!(backfill_request: BackfillRequest, r#"{"since":"2026-01-12T00:00:00.000Z","perSecond":50,"dryRun":true}"#);
example!(recover_result: RecoverResult, r#"{"deliveries":1250,"dryRun":false,"until":"2026-01-14T08:00:25.000Z","next":null}"#);
example!(
    callback_failures_response: CallbackFailuresResponse,
    r#"{"success":true,"data":{"groups":[{"statusCode":503,"error":"the endpoint answered 503 Service Unavailable","pending":41,"exhausted":3,"lastAt":"2026-01-12T09:30:00.053Z","sample":"6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604","response":"maintenance until noon"}],"complete":true}}"#
);

//! Deliveries: listed, read, and sent again.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{ObjectId, Timestamp, event_kind::DeliveryKind, named::named};

/// Identifies a delivery: `{updateId}-{callbackId}` for people and in URLs, and `{updateId}-{callbackId}-{kind}` for
/// other kinds than the outcome of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeliveryId {
    /// The update that it reports.
    pub update_id: ObjectId,
    /// The callback that it is sent to.
    pub callback_id: ObjectId,
    /// The kind of the delivery; the outcome of an update if absent.
    #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
    pub kind: DeliveryKind,
}

/// The text is not the id of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be the updateId and the callbackId, joined by a hyphen, and for other events than updates -{{kind}}")]
pub struct InvalidDeliveryId;

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.update_id, self.callback_id)?;
        if self.kind.is_update() { Ok(()) } else { write!(f, "-{}", self.kind) }
    }
}

impl FromStr for DeliveryId {
    type Err = InvalidDeliveryId;

    fn from_str(text: &str) -> Result<Self, InvalidDeliveryId> {
        let (update, rest) = text.split_once('-').ok_or(InvalidDeliveryId)?;
        let (callback, kind) = rest.split_once('-').map_or((rest, None), |(callback, kind)| (callback, Some(kind)));
        let id = |text: &str| text.parse().map_err(|_| InvalidDeliveryId);
        let kind = match kind.map(str::parse) {
            None => DeliveryKind::Update,
            // The outcome of an update has only the id without a kind.
            Some(Ok(DeliveryKind::Update) | Err(_)) => return Err(InvalidDeliveryId),
            Some(Ok(kind)) => kind,
        };
        Ok(Self { update_id: id(update)?, callback_id: id(callback)?, kind })
    }
}

named! {
    /// The status of a delivery.
    DeliveryStatus, InvalidDeliveryStatus,
    /// It will be attempted (again).
    Pending = "pending",
    /// The endpoint accepted it.
    Delivered = "delivered",
    /// It will not be attempted again.
    Exhausted = "exhausted",
}

/// A completion event on its way to one callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Delivery {
    /// The update that it reports.
    pub update_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// The kind of the delivery; the outcome of an update if absent.
    #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
    pub kind: DeliveryKind,
    /// Its status.
    pub status: DeliveryStatus,
    /// When it is attempted next.
    pub next_attempt_at: Option<Timestamp>,
    /// Its attempts, in order.
    pub attempts: Vec<Attempt>,
}

/// One POST to a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// 1 for the first.
    pub number: u32,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u32,
    /// The status of the endpoint's response, if there was one.
    pub status_code: Option<u16>,
    /// Why it failed; null if the endpoint accepted it.
    pub error: Option<String>,
    /// The first bytes of the response body, for failed attempts.
    pub response: Option<String>,
}

/// The deliveries of one update.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateDeliveries {
    /// Ordered by callback and kind.
    pub deliveries: Vec<Delivery>,
    /// Present while the update's event is parked; further deliveries follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parked: Option<ParkedUpdate>,
    /// How many deliveries of the update's event are not recorded yet, because their first attempt has not ended or the
    /// event has not arrived. Absent while the update is pending, or if its event or process cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unrecorded: Option<u64>,
}

/// The event of an update waits until the update's process can be read in its bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ParkedUpdate {
    /// When the event was parked.
    pub since: Timestamp,
    /// Why the process cannot be read.
    pub reason: String,
}

/// Lists the deliveries of one update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListUpdateDeliveries {
    /// The update's project.
    pub project_id: ObjectId,
    /// The update.
    pub update_id: ObjectId,
}

/// Lists the deliveries of a project that meet all conditions, those of the newest updates first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListDeliveries {
    /// The project.
    pub project_id: ObjectId,
    /// Only deliveries with this status.
    pub status: Option<DeliveryStatus>,
    /// Only deliveries to this callback.
    pub callback_id: Option<ObjectId>,
    /// Only deliveries of this update.
    pub update_id: Option<ObjectId>,
    /// Only deliveries of this lead's updates.
    pub lead_id: Option<ObjectId>,
    /// Only deliveries of updates made at this time or later, to the second.
    pub since: Option<Timestamp>,
    /// Only deliveries of updates made before this time, to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Only deliveries to callbacks of this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// Only deliveries whose last attempt was answered with this status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_code: Option<u16>,
    /// Only deliveries whose last attempt failed with an error that contains this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

impl ListDeliveries {
    /// The first page of all deliveries of a project.
    pub fn of_project(project_id: ObjectId, limit: u32) -> Self {
        Self {
            project_id,
            status: None,
            callback_id: None,
            update_id: None,
            lead_id: None,
            since: None,
            until: None,
            process_id: None,
            status_code: None,
            error: None,
            cursor: None,
            limit,
        }
    }
}

/// A delivery in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedDelivery {
    /// The delivery.
    #[serde(flatten)]
    pub id: DeliveryId,
    /// The process that configures the callback; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// Its status.
    pub status: DeliveryStatus,
    /// The number of attempts so far.
    pub attempts: u32,
    /// When it is attempted next.
    pub next_attempt_at: Option<Timestamp>,
    /// When it was first recorded.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// The status of the response to the last attempt, if there was one.
    pub status_code: Option<u16>,
    /// Why the last attempt failed.
    pub error: Option<String>,
}

/// The most pending deliveries, and the most exhausted ones, that are grouped by failure. Reading more takes longer
/// than a page should.
pub const MAX_FAILURES_READ: i64 = 500;

/// How many of a project's newest exhausted deliveries are searched for those of a callback. A larger number takes
/// longer, and finds older failures of a callback that rarely fails in a project where another one always fails.
pub const MAX_FAILURES_SEARCHED: i64 = 50_000;

/// The most groups of failures in a reply. More may not fit into a message.
pub const MAX_FAILURE_GROUPS: i64 = 100;

/// Groups the failed deliveries of a callback by the status and the error of their last attempt: pending ones that were
/// attempted, and exhausted ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GroupFailures {
    /// The callback's project.
    pub project_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// Only deliveries that failed at this time or later.
    pub since: Timestamp,
}

/// The failures of a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackFailures {
    /// The groups, those with most deliveries first; at most [`MAX_FAILURE_GROUPS`].
    pub groups: Vec<FailureGroup>,
    /// Whether every failed delivery is counted. At most [`MAX_FAILURES_READ`] pending and as many exhausted ones are
    /// read, and [`MAX_FAILURES_SEARCHED`] are searched.
    pub complete: bool,
}

/// Deliveries whose last attempt failed in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct FailureGroup {
    /// The status of the response to the last attempt, if there was one.
    pub status_code: Option<u16>,
    /// Why it failed.
    pub error: Option<String>,
    /// How many of the deliveries are pending.
    pub pending: i64,
    /// How many of the deliveries are exhausted.
    pub exhausted: i64,
    /// When the last of them failed.
    pub last_at: Timestamp,
    /// The delivery that failed last.
    pub sample: DeliveryId,
    /// The first bytes of the response to its last attempt.
    pub response: Option<String>,
}

/// Reads a delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetDelivery {
    /// The delivery's project.
    pub project_id: ObjectId,
    /// The delivery.
    #[serde(flatten)]
    pub id: DeliveryId,
}

/// Sends one delivered or exhausted delivery again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Redeliver {
    /// The delivery's project.
    pub project_id: ObjectId,
    /// The delivery.
    #[serde(flatten)]
    pub id: DeliveryId,
}

/// Sends delivered or exhausted deliveries again at a limited rate, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RecoverDeliveries {
    /// The deliveries' project.
    pub project_id: ObjectId,
    /// Only deliveries of updates made at this time or later, to the second.
    pub since: Timestamp,
    /// Only deliveries with this status, exhausted or delivered.
    pub status: DeliveryStatus,
    /// Only deliveries to this callback.
    pub callback_id: Option<ObjectId>,
    /// How many become due per second.
    pub per_second: u32,
    /// Only count the deliveries.
    #[serde(default)]
    pub dry_run: bool,
    /// The previous reply's `next`.
    pub cursor: Option<Cursor>,
}

/// The most deliveries per second that a recovery makes due.
pub const MAX_PER_SECOND: u32 = 1000;

/// The result of one step of a recovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoveredDeliveries {
    /// How many deliveries this call sends again, or would send.
    pub deliveries: u64,
    /// When the last of them is due.
    pub until: Option<Timestamp>,
    /// Continues the recovery, if this call ran out of time.
    pub next: Option<Cursor>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_listed_delivery_has_this_wire_form() {
        let at = Timestamp::from_millis(5);
        let delivery = ListedDelivery {
            id: DeliveryId {
                update_id: ObjectId::from_bytes([1; 12]),
                callback_id: ObjectId::from_bytes([2; 12]),
                kind: DeliveryKind::Update,
            },
            process_id: None,
            status: DeliveryStatus::Exhausted,
            attempts: 3,
            next_attempt_at: None,
            created_at: at,
            updated_at: at,
            status_code: Some(500),
            error: Some("e".into()),
        };
        let text = serde_json::to_string(&delivery).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","callbackId":"020202020202020202020202","processId":null,"status":"exhausted","attempts":3,"nextAttemptAt":null,"createdAt":5,"updatedAt":5,"statusCode":500,"error":"e"}"#);
        assert_eq!(serde_json::from_str::<ListedDelivery>(&text).unwrap(), delivery);
    }

    proptest! {
        #[test]
        fn ids_round_trip(update: [u8; 12], callback: [u8; 12], kind in 0..DeliveryKind::ALL.len()) {
            let (update_id, callback_id) = (ObjectId::from_bytes(update), ObjectId::from_bytes(callback));
            let id = DeliveryId { update_id, callback_id, kind: DeliveryKind::ALL[kind] };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(serde_json::from_str::<DeliveryId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
            prop_assert_eq!(format!("{update_id}-{callback_id}-update").parse::<DeliveryId>(), Err(InvalidDeliveryId));
        }

        #[test]
        fn arbitrary_ids_never_panic(text in ".*") {
            let _ = text.parse::<DeliveryId>();
        }
    }
}

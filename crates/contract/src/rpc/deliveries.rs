//! Deliveries: listed, looked at, and made again.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{Cursor, DeliveryStatus};
use crate::{JsonObject, ObjectId, Timestamp};

/// Which delivery: `{updateId}-{callbackId}` for people and in URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeliveryId {
    /// The update that it tells of.
    pub update_id: ObjectId,
    /// The callback that is told.
    pub callback_id: ObjectId,
}

/// The text is no id of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be the updateId and the callbackId, with a hyphen between")]
pub struct InvalidDeliveryId;

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.update_id, self.callback_id)
    }
}

impl FromStr for DeliveryId {
    type Err = InvalidDeliveryId;

    fn from_str(text: &str) -> Result<Self, InvalidDeliveryId> {
        let (update, callback) = text.split_once('-').ok_or(InvalidDeliveryId)?;
        let id = |text: &str| text.parse().map_err(|_| InvalidDeliveryId);
        Ok(Self { update_id: id(update)?, callback_id: id(callback)? })
    }
}

/// Which deliveries, those of the newest updates first. All that is given must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListDeliveries {
    /// Whose deliveries.
    pub project_id: ObjectId,
    /// Only those that stand so.
    #[serde(default)]
    pub status: Option<DeliveryStatus>,
    /// Only to this callback.
    #[serde(default)]
    pub callback_id: Option<ObjectId>,
    /// Only of this update.
    #[serde(default)]
    pub update_id: Option<ObjectId>,
    /// Only of this lead's updates.
    #[serde(default)]
    pub lead_id: Option<ObjectId>,
    /// Only of updates that were made at this time or later, to the second.
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// At most so many.
    pub limit: u32,
}

/// A delivery in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedDelivery {
    /// Which one.
    #[serde(flatten)]
    pub id: DeliveryId,
    /// The process in whose configuration the callback stands; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// Where it stands.
    pub status: DeliveryStatus,
    /// How often it was tried.
    pub attempts: u32,
    /// When it is tried next.
    pub next_attempt_at: Option<Timestamp>,
    /// When it was first recorded.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// What went wrong the last time.
    pub error: Option<String>,
}

/// Which delivery to show.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetDelivery {
    /// Whose delivery.
    pub project_id: ObjectId,
    /// Which one.
    #[serde(flatten)]
    pub id: DeliveryId,
}

/// Sends one completed or exhausted delivery again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Redeliver {
    /// The delivery's project.
    pub project_id: ObjectId,
    /// The delivery.
    #[serde(flatten)]
    pub id: DeliveryId,
}

/// Has deliveries made again that are settled, so many a second, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoverDeliveries {
    /// Whose deliveries.
    pub project_id: ObjectId,
    /// Those of updates that were made at this time or later, to the second.
    pub since: Timestamp,
    /// Those that stand so: exhausted or delivered.
    pub status: DeliveryStatus,
    /// Only to this callback.
    #[serde(default)]
    pub callback_id: Option<ObjectId>,
    /// How many are due in a second.
    pub per_second: u32,
    /// Only count them.
    #[serde(default)]
    pub dry_run: bool,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
}

/// Most deliveries that a recovery makes due in a second.
pub const MAX_PER_SECOND: u32 = 1000;

/// What a recovery came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoveredDeliveries {
    /// How many deliveries will be made again, by this call; or would be.
    pub deliveries: u64,
    /// When the last of them is due.
    pub until: Option<Timestamp>,
    /// Time did not suffice for all: call again with this.
    pub next: Option<Cursor>,
}

/// Which updates of a project, by their ids; or of a lead, in the order of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListUpdates {
    /// Whose updates.
    pub project_id: ObjectId,
    /// Only of this lead.
    #[serde(default)]
    pub lead_id: Option<ObjectId>,
    /// Only those that were made at this time or later, to the second.
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// From the oldest to the newest; not of a lead.
    #[serde(default)]
    pub oldest_first: bool,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// At most so many.
    pub limit: u32,
}

/// An update in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedUpdate {
    /// The update.
    pub update_id: ObjectId,
    /// The place behind it.
    pub cursor: Cursor,
}

/// Which outcomes to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetOutcomes {
    /// Whose updates.
    pub project_id: ObjectId,
    /// The updates, at most [`MAX_LIMIT`](super::MAX_LIMIT).
    pub update_ids: Vec<ObjectId>,
}

/// What became of an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The update.
    pub update_id: ObjectId,
    /// The body of its webhooks, byte for byte.
    pub payload: JsonObject,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_listed_delivery_on_the_wire() {
        let at = Timestamp::from_millis(5);
        let delivery = ListedDelivery {
            id: DeliveryId { update_id: ObjectId::from_bytes([1; 12]), callback_id: ObjectId::from_bytes([2; 12]) },
            process_id: None,
            status: DeliveryStatus::Exhausted,
            attempts: 3,
            next_attempt_at: None,
            created_at: at,
            updated_at: at,
            error: Some("e".into()),
        };
        let text = serde_json::to_string(&delivery).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","callbackId":"020202020202020202020202","processId":null,"status":"exhausted","attempts":3,"nextAttemptAt":null,"createdAt":5,"updatedAt":5,"error":"e"}"#);
        assert_eq!(serde_json::from_str::<ListedDelivery>(&text).unwrap(), delivery);
    }

    proptest! {
        #[test]
        fn ids_round_trip(update: [u8; 12], callback: [u8; 12]) {
            let id = DeliveryId { update_id: ObjectId::from_bytes(update), callback_id: ObjectId::from_bytes(callback) };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn arbitrary_ids_never_panic(text in ".*") {
            let _ = text.parse::<DeliveryId>();
        }
    }
}

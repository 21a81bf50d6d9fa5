//! Updates: read, listed, previewed, and their outcomes.

use serde::{Deserialize, Serialize};

use super::{Cursor, HistoryEntry};
use crate::{
    JsonObject, ObjectId, Timestamp,
    command::UpdateCommand,
    event::{CompletionEvent, OutcomeKind},
    event_kind::DeliveryKind,
    named::named,
    position::LogPosition,
};

/// Reads an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetUpdate {
    /// The update's project.
    pub project_id: ObjectId,
    /// The update.
    pub update_id: ObjectId,
}

named! {
    /// The status of an update.
    UpdateStatus, InvalidUpdateStatus,
    /// In the log, not decided yet.
    Pending = "pending",
    /// Applied.
    Succeeded = "succeeded",
    /// Refused: nothing was changed.
    Failed = "failed",
}

/// An update, with its outcome once it is decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// The kind, once the command is decided; an update if absent.
    #[serde(default, skip_serializing_if = "OutcomeKind::is_update")]
    pub kind: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// Its status. The other fields of a pending update are null, except the known ones of a queued update.
    pub status: UpdateStatus,
    /// The command, as it is in the log.
    pub command: Option<JsonObject>,
    /// The command's sequence in the log.
    pub log_sequence: Option<u64>,
    /// When the log stored the command.
    pub logged_at: Option<Timestamp>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's process.
    pub process_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// Why it failed, for people.
    pub error: Option<String>,
    /// Why it failed, for programs.
    pub error_code: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The lead's version after the update.
    pub version: Option<i64>,
    /// The user whom the command names.
    pub user_id: Option<String>,
    /// The API key of the request; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// Warnings about ignored input, in sentences.
    pub warnings: Vec<String>,
    /// When the update was decided and applied.
    pub applied_at: Option<Timestamp>,
    /// The lead's metadata after the update.
    pub data: Option<JsonObject>,
    /// When the call that a queued update waits for expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_until: Option<Timestamp>,
}

impl Update {
    /// An update that is in the log and not decided yet.
    pub fn pending(update_id: ObjectId) -> Self {
        Self {
            kind: OutcomeKind::Update,
            update_id,
            status: UpdateStatus::Pending,
            command: None,
            log_sequence: None,
            logged_at: None,
            lead_id: None,
            process_id: None,
            reference_id: None,
            error: None,
            error_code: None,
            from_state: None,
            to_state: None,
            version: None,
            user_id: None,
            api_key_id: None,
            warnings: vec![],
            applied_at: None,
            data: None,
            queued_until: None,
        }
    }
}

/// Decides an update without applying it. The reply is the event that would be announced, under an id that no update
/// has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DryRunUpdate {
    /// The update's project.
    pub project_id: ObjectId,
    /// The update.
    pub command: UpdateCommand,
}

/// Lists the updates and call events of a project by their ids, or those of a lead in the order of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListUpdates {
    /// The project.
    pub project_id: ObjectId,
    /// Only updates of this lead.
    pub lead_id: Option<ObjectId>,
    /// Only updates made at this time or later, to the second.
    pub since: Option<Timestamp>,
    /// Only updates made before this time, to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Oldest first; not with `lead_id`.
    #[serde(default)]
    pub oldest_first: bool,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// An update in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedUpdate {
    /// The update.
    pub update_id: ObjectId,
    /// The cursor that continues the list after this update.
    pub cursor: Cursor,
}

/// The longest range of time that updates may be found in, in days: it bounds how much of the ledger all pages read.
pub const MAX_UPDATES_DAYS: u32 = 31;

/// Finds the decided updates and call events of a project that meet all conditions, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FindUpdates {
    /// The project.
    pub project_id: ObjectId,
    /// Only updates made at this time or later, to the second; by default 24 hours before `to`.
    pub from: Option<Timestamp>,
    /// Only updates made before this time, to the second; by default there is no end.
    pub to: Option<Timestamp>,
    /// Only updates that succeeded, or failed.
    pub success: Option<bool>,
    /// Only updates that failed with this code.
    pub error_code: Option<String>,
    /// Only updates to leads of this process.
    pub process_id: Option<ObjectId>,
    /// Only updates that were sent with this API key.
    pub api_key_id: Option<ObjectId>,
    /// Only updates that name this user.
    pub user_id: Option<String>,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// An update or call event of a project. [`Update`] has more fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct FoundUpdate {
    /// The lead; if the lead is unknown, the command's `leadId`.
    pub lead_id: Option<ObjectId>,
    /// The lead's process; null for an unknown lead.
    pub process_id: Option<ObjectId>,
    /// The lead's external id; if the lead is unknown, the command's `referenceId`.
    pub reference_id: Option<String>,
    /// The other fields, as in the lead's history.
    #[serde(flatten)]
    pub entry: HistoryEntry,
}

/// Reads the bodies of webhooks from the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetOutcomes {
    /// The updates' project.
    pub project_id: ObjectId,
    /// The updates, at most [`MAX_LIMIT`](super::MAX_LIMIT).
    pub update_ids: Vec<ObjectId>,
    /// The kind of each body, one for each of `update_ids`; absent means the outcomes of updates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<DeliveryKind>,
}

/// Reads events from the ledger. Those of erased leads are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetEvents {
    /// The updates' project.
    pub project_id: ObjectId,
    /// The updates, at most [`MAX_LIMIT`](super::MAX_LIMIT).
    pub update_ids: Vec<ObjectId>,
}

/// An event as it was announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LedgerEvent {
    /// The position of its command in the log.
    pub position: LogPosition,
    /// The event, without warnings.
    pub event: CompletionEvent,
}

/// The body of a webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// The kind of the body; the outcome of an update if absent.
    #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
    pub kind: DeliveryKind,
    /// The lead; if the lead is unknown, the command's `leadId`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The body, byte for byte.
    pub payload: JsonObject,
}

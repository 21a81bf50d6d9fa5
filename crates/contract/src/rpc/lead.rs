//! Leads: created, read, listed, and their history.

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{JsonObject, ObjectId, Timestamp, event::OutcomeKind, position::LogPosition, text};

/// Finds a lead of a project by its id, or by its external id and process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetLead {
    /// The lead's project.
    pub project_id: ObjectId,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    #[serde(default, deserialize_with = "text::reference_id")]
    pub reference_id: Option<String>,
    /// The process of the external id.
    pub process_id: Option<ObjectId>,
}

/// Creates a lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InitiateLead {
    /// The lead's project.
    pub project_id: ObjectId,
    /// The lead's process.
    pub process_id: ObjectId,
    /// The group of the vendor's API; stored, not interpreted.
    pub group_id: Option<String>,
    /// The lead's external id, unique in its process.
    #[serde(default, deserialize_with = "text::reference_id")]
    pub reference_id: Option<String>,
    /// The lead's name.
    pub name: Option<String>,
    /// The lead's phone number.
    pub phone: Option<String>,
    /// The lead's e-mail address, lower case.
    pub email: Option<String>,
    /// The lead's metadata.
    pub metadata: JsonObject,
}

/// A lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Lead {
    /// The lead.
    pub lead_id: ObjectId,
    /// Its project.
    pub project_id: ObjectId,
    /// Its process.
    pub process_id: ObjectId,
    /// Its external id.
    pub reference_id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its phone number.
    pub phone: Option<String>,
    /// Its e-mail address.
    pub email: Option<String>,
    /// Its state.
    pub state: String,
    /// The disposition that was given with the last state that takes one.
    pub disposition: Option<String>,
    /// Its metadata.
    pub metadata: JsonObject,
    /// 1 for a new lead; grows by one with every applied update, and with every call event that sets the state.
    pub version: i64,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Its last updates and call events, newest first, at most [`LEAD_ACTIVITIES`]; empty in lists.
    pub activities: Vec<Activity>,
}

/// How many activities a lead shows.
pub const LEAD_ACTIVITIES: i64 = 20;

/// One of a lead's last updates and call events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// The kind of the activity.
    pub kind: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// Whether it was applied.
    pub success: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition that the update gave.
    pub disposition: Option<String>,
    /// The user whom the command names.
    pub user_id: Option<String>,
    /// When it was decided.
    pub timestamp: Timestamp,
    /// A summary of the call's result; absent if no result was reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ShortResult>,
}

/// The part of a call's result that lists of activities show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ShortResult {
    /// How the call ended.
    pub status: Option<String>,
    /// Whether the call was answered.
    pub connected: Option<bool>,
    /// The disposition.
    pub disposition: Option<String>,
    /// The duration of the call, in seconds.
    pub duration_seconds: Option<u32>,
}

/// The longest text to search leads for, in characters.
pub const MAX_SEARCH_CHARS: usize = 255;

/// Lists the leads of a project that meet all conditions, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListLeads {
    /// The project.
    pub project_id: ObjectId,
    /// Only leads of this process.
    pub process_id: Option<ObjectId>,
    /// Only leads in this state.
    pub state: Option<String>,
    /// Only leads that changed at this time or later.
    pub updated_since: Option<Timestamp>,
    /// Only leads with this id, external id or e-mail address, a phone number that ends with these digits, or a name
    /// that begins with this text. Case is ignored in names and e-mail addresses.
    pub search: Option<String>,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// Lists the updates and call events of a lead, last one first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetLeadHistory {
    /// The lead's project.
    pub project_id: ObjectId,
    /// The lead.
    pub lead_id: ObjectId,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// An update or call event in a lead's history. [`Update`](super::Update) has more fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// The kind of the entry.
    pub kind: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// Whether it was applied.
    pub success: bool,
    /// Why it failed, for people.
    pub error: Option<String>,
    /// Why it failed, for programs.
    pub error_code: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition that the update gave.
    pub disposition: Option<String>,
    /// The lead's version after the update.
    pub version: Option<i64>,
    /// The user whom the command names.
    pub user_id: Option<String>,
    /// The API key of the request; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// Warnings about ignored input, in sentences.
    pub warnings: Vec<String>,
    /// The epoch of the command log.
    pub epoch: i32,
    /// The log sequence of the command, or of its pack.
    pub log_sequence: u64,
    /// The command's index in its pack.
    #[serde(default)]
    pub log_index: u32,
    /// When the log stored the command.
    pub logged_at: Timestamp,
    /// When the update was decided and applied.
    pub applied_at: Timestamp,
}

impl HistoryEntry {
    /// The command's position in the log.
    pub fn position(&self) -> LogPosition {
        LogPosition { epoch: self.epoch, sequence: self.log_sequence, index: self.log_index }
    }
}

/// Lists the calls of a project that are in progress, by lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListCalls {
    /// The project.
    pub project_id: ObjectId,
    /// Only calls with this lead.
    pub lead_id: Option<ObjectId>,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// A call in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Call {
    /// The lead.
    pub lead_id: ObjectId,
    /// The lead's process.
    pub process_id: ObjectId,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// The call's id; null if its start had none.
    pub call_id: Option<String>,
    /// When the log stored its start.
    pub started_at: Timestamp,
    /// When the call expires, unless its end is reported before.
    pub expires_at: Timestamp,
}

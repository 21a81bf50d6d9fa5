//! Lists of leads, and the history of one.

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{ObjectId, Timestamp};

/// Which leads, the newest first. All that is given must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListLeads {
    /// Whose leads.
    pub project_id: ObjectId,
    /// Only of this process.
    #[serde(default)]
    pub process_id: Option<ObjectId>,
    /// Only in this state.
    #[serde(default)]
    pub state: Option<String>,
    /// Only those that changed at this time or later.
    #[serde(default)]
    pub updated_since: Option<Timestamp>,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// At most so many.
    pub limit: u32,
}

/// Which lead's updates, the last first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetLeadHistory {
    /// Whose lead.
    pub project_id: ObjectId,
    /// The lead.
    pub lead_id: ObjectId,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// At most so many.
    pub limit: u32,
}

/// An update in a lead's history: who changed what from where to where, and when. [`Update`](super::Update) has all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// The update.
    pub update_id: ObjectId,
    /// Whether the lead was changed.
    pub success: bool,
    /// Why not, for people.
    pub error: Option<String>,
    /// Why not, for programs.
    pub error_code: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition given with it.
    pub disposition: Option<String>,
    /// The lead's version after.
    pub version: Option<i64>,
    /// Who changed it, as the command said.
    pub user_id: Option<String>,
    /// The API key it came under; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// What it asked for and was ignored.
    pub warnings: Vec<String>,
    /// Which of the logs it was in.
    pub epoch: i32,
    /// Its place there.
    pub log_sequence: u64,
    /// When the log stored it.
    pub logged_at: Timestamp,
    /// When it was decided and applied.
    pub applied_at: Timestamp,
}

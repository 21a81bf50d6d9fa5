//! How far lead-state lags behind the command log.

use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// Reads how far applying and announcing lag behind the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GetLag {}

/// How far applying and announcing lag behind the log, of all projects together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Lag {
    /// When it was measured: every five seconds. Null until the first measurement.
    pub measured_at: Option<Timestamp>,
    /// When the log stored the oldest command that is not applied; null if all are.
    pub unapplied_since: Option<Timestamp>,
    /// How many messages of the log are not applied; a message may hold several updates. Null until the first
    /// measurement.
    pub unapplied_messages: Option<u64>,
    /// When the oldest update was applied whose event is not announced; null if all are.
    pub unannounced_since: Option<Timestamp>,
}

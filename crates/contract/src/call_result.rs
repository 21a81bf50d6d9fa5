//! The result of a call, as its end brings it. `call_body` parses it.

use serde::{Deserialize, Serialize};

use crate::JsonObject;

/// The largest result of a call, in bytes of JSON: with its address it fits into a request of 256 KiB, and with everything
/// else into a NATS message.
pub const MAX_RESULT_BYTES: usize = 240 << 10;

/// Who called whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum CallDirection {
    /// The lead was called.
    Outgoing,
    /// The lead called.
    Incoming,
}

/// What a voice platform reports of a call that ended. All of it is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallResult {
    /// How it ended, in the platform's word, e.g. `completed` or `no-answer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub status: Option<String>,
    /// Whether somebody took the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<bool>,
    /// Who called whom. A call without it counts as outgoing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<CallDirection>,
    /// The disposition. It is stored with the lead if `toState` is a state that takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub disposition: Option<String>,
    /// What was said, in short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// What the platform found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<JsonObject>,
    /// Where the recording is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub recording_url: Option<String>,
    /// Where the transcript is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub transcript_url: Option<String>,
    /// How long the call took, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<u32>,
    /// Anything else about the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<JsonObject>,
}

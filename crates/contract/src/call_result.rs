//! The result of a call, reported with the call's end. `call_body` parses it.

use serde::{Deserialize, Serialize};

use crate::JsonObject;

/// The largest result of a call, in bytes of JSON. With the lead's address it fits into a request of 256 KiB, and a
/// command or event with such a result fits into a NATS message.
pub const MAX_RESULT_BYTES: usize = 240 << 10;

/// The direction of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum CallDirection {
    /// The lead was called.
    Outgoing,
    /// The lead called.
    Incoming,
}

/// A voice platform's report of a call that ended. Every field is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallResult {
    /// How the call ended, in the platform's words, e.g. `completed` or `no-answer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub status: Option<String>,
    /// Whether the call was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<bool>,
    /// The direction of the call. A call without it counts as outgoing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<CallDirection>,
    /// The disposition. It is stored with the lead if `toState` is a state that takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub disposition: Option<String>,
    /// A short summary of the conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// The platform's analysis of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<JsonObject>,
    /// The URL of the recording.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub recording_url: Option<String>,
    /// The URL of the transcript.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub transcript_url: Option<String>,
    /// The duration of the call, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<u32>,
    /// Other data about the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<JsonObject>,
}

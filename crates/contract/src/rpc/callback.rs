//! Callbacks: their health, the check of their URLs, and test deliveries.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{ObjectId, Timestamp, named::named};

/// Lists the callbacks of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListCallbacks {
    /// The project.
    pub project_id: ObjectId,
    /// Whether to read [`CallbackStatus::details`] from the database.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub details: bool,
}

named! {
    /// The health of a callback.
    CallbackState, InvalidCallbackState,
    /// Its last attempt succeeded, or there was none.
    Healthy = "healthy",
    /// All of its attempts have failed for a while.
    Failing = "failing",
    /// Its failures disabled it: its deliveries wait until it is enabled again.
    Disabled = "disabled",
    /// Its deliveries wait until it is resumed.
    Paused = "paused",
    /// It is switched off in its process: its deliveries wait until it is switched on.
    Off = "off",
}

/// A callback and its health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackStatus {
    /// The callback.
    pub callback_id: ObjectId,
    /// Its name.
    pub name: String,
    /// Its process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// The name of its process.
    pub process: String,
    /// Its health.
    pub state: CallbackState,
    /// Since when all of its attempts have failed.
    pub failing_since: Option<Timestamp>,
    /// Why it is disabled.
    pub reason: Option<String>,
    /// Details from the database, if the query requests them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<CallbackDetails>,
}

/// The most pending deliveries that are counted for a callback. A larger number makes the query slower for each
/// callback with a backlog.
pub const MAX_PENDING_COUNTED: u32 = 1000;

/// Details of a callback from the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackDetails {
    /// When the callback was disabled. Null for a moment after that, until the time is recorded.
    pub disabled_since: Option<Timestamp>,
    /// How many of its deliveries are pending; at most [`MAX_PENDING_COUNTED`] are counted, those that are due first.
    pub pending: u32,
    /// When the oldest of them was recorded.
    pub oldest_pending_at: Option<Timestamp>,
    /// Why the latest attempt of one of them failed.
    pub last_error: Option<String>,
}

/// Enables a callback that was disabled because it kept failing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnableCallback {
    /// The callback.
    pub callback_id: ObjectId,
}

/// The result of enabling a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EnableResult {
    /// Whether it was disabled before.
    pub was_disabled: bool,
}

/// Pauses a callback, so that its deliveries are recorded and wait; or resumes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PauseCallback {
    /// The callback.
    pub callback_id: ObjectId,
    /// True pauses the callback; false resumes it.
    pub paused: bool,
}

/// The result of pausing or resuming a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct PauseResult {
    /// Whether it was paused before.
    pub was_paused: bool,
}

/// Makes the deliveries of past events that a callback does not have, at a limited rate, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackfillCallback {
    /// The callback's project.
    pub project_id: ObjectId,
    /// The callback's process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// The callback.
    pub callback_id: ObjectId,
    /// Only events of updates made at this time or later, to the second.
    pub since: Timestamp,
    /// How many become due per second.
    pub per_second: u32,
    /// Only count the deliveries.
    #[serde(default)]
    pub dry_run: bool,
    /// The previous reply's `next`.
    pub cursor: Option<Cursor>,
}

/// Checks whether callbacks may have these URLs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckUrls {
    /// The callbacks' project.
    pub project_id: ObjectId,
    /// The URLs.
    pub urls: Vec<String>,
}

/// Whether a callback may have a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UrlCheck {
    /// Why the callback may not have the URL; null if it may.
    pub refused: Option<String>,
}

/// How long a test may take: the longest timeout of a callback, and the overhead.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(35);

/// Sends a test delivery to a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TestCallback {
    /// The callback's project.
    pub project_id: ObjectId,
    /// The callback's process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// The callback.
    pub callback_id: ObjectId,
}

/// The result of a test delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TestResult {
    /// Its `webhook-id`.
    pub webhook_id: ObjectId,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u32,
    /// The status of the endpoint's response, if there was one.
    pub status_code: Option<u16>,
    /// Why it failed; null if the endpoint accepted it.
    pub error: Option<String>,
    /// The first bytes of the response body.
    pub response: Option<String>,
}

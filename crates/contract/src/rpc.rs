//! Queries and administration: NATS micro services (ADR-32), request and reply in JSON.
//!
//! An error comes in the `Nats-Service-Error-Code` header (an HTTP status) and `Nats-Service-Error`
//! (`{code}: {message}`), the body empty.
//! [`Query`] says which reply belongs to which request, and on which subject.

mod config;
mod deliveries;
mod lists;
mod page;
mod query;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    JsonObject, ObjectId, Timestamp,
    command::UpdateCommand,
    key::{ApiKey, Scope},
    position::LogPosition,
    process::{Process, ProcessSpec},
    secret::KeyId,
};

#[cfg(feature = "schema")]
pub use self::query::catalog;
pub use self::{
    config::{
        ChangeProcess, CheckUrls, GetProcess, ListProcesses, ProcessChange, ProcessSelector, TEST_TIMEOUT,
        TestCallback, TestResult, UrlCheck,
    },
    deliveries::{
        DeliveryId, GetDelivery, GetOutcomes, InvalidDeliveryId, ListDeliveries, ListUpdates, ListedDelivery,
        ListedUpdate, MAX_PER_SECOND, Outcome, RecoverDeliveries, RecoveredDeliveries, Redeliver,
    },
    lists::{GetLeadHistory, HistoryEntry, ListLeads},
    page::{Cursor, DEFAULT_LIMIT, MAX_LIMIT, Page, clamp},
    query::{DEFAULT_TIMEOUT, Query},
};

/// [`GetLead`] → [`Lead`].
pub const LEAD_GET: &str = "leads.rpc.lead.get";
/// [`InitiateLead`] → [`Lead`].
pub const LEAD_INITIATE: &str = "leads.rpc.lead.initiate";
/// [`ListLeads`] → [`Page`] of [`Lead`], without their activities.
pub const LEAD_LIST: &str = "leads.rpc.lead.list";
/// [`GetLeadHistory`] → [`Page`] of [`HistoryEntry`].
pub const LEAD_HISTORY: &str = "leads.rpc.lead.history";
/// [`GetUpdate`] → [`Update`].
pub const UPDATE_GET: &str = "leads.rpc.update.get";
/// [`DryRunUpdate`] → [`CompletionEvent`](crate::event::CompletionEvent).
pub const UPDATE_DRY_RUN: &str = "leads.rpc.update.dry_run";
/// [`ListUpdates`] → [`Page`] of [`ListedUpdate`].
pub const UPDATE_LIST: &str = "leads.rpc.update.list";
/// [`GetOutcomes`] → list of [`Outcome`], in the order of the question: as many as fit, and at least one if there is any.
pub const UPDATE_OUTCOMES: &str = "leads.rpc.update.outcomes";
/// [`CreateProject`] → [`Project`].
pub const PROJECT_CREATE: &str = "leads.rpc.project.create";
/// [`ProcessSpec`](crate::process::ProcessSpec) → [`ProcessChangeResult`].
pub const PROCESS_APPLY: &str = "leads.rpc.process.apply";
/// [`ListProcesses`] → [`Page`] of [`Process`], without secrets.
pub const PROCESS_LIST: &str = "leads.rpc.process.list";
/// [`GetProcess`] → [`Process`], without secrets.
pub const PROCESS_GET: &str = "leads.rpc.process.get";
/// [`ChangeProcess`] → [`ProcessChangeResult`].
pub const PROCESS_CHANGE: &str = "leads.rpc.process.change";
/// [`CreateKey`] → [`ApiKey`].
pub const KEY_CREATE: &str = "leads.rpc.key.create";
/// [`RevokeKey`] → [`ApiKey`].
pub const KEY_REVOKE: &str = "leads.rpc.key.revoke";
/// [`ListKeys`] → list of [`ApiKey`].
pub const KEY_LIST: &str = "leads.rpc.key.list";
/// [`RotateSecrets`] → [`RotationResult`].
pub const SECRETS_ROTATE: &str = "leads.rpc.secrets.rotate";
/// [`GetRecovery`] → [`RecoveryStatus`].
pub const RECOVERY_GET: &str = "leads.rpc.recovery.get";
/// [`Recover`] → [`RecoveryStatus`].
pub const RECOVERY_RECOVER: &str = "leads.rpc.recovery.recover";
/// [`GetUpdate`] → list of [`Delivery`].
pub const DELIVERY_OF_UPDATE: &str = "webhooks.rpc.delivery.list_of_update";
/// [`ListDeliveries`] → [`Page`] of [`ListedDelivery`].
pub const DELIVERY_LIST: &str = "webhooks.rpc.delivery.list";
/// [`GetDelivery`] → [`Delivery`].
pub const DELIVERY_GET: &str = "webhooks.rpc.delivery.get";
/// [`GetDelivery`] → [`ListedDelivery`].
pub const DELIVERY_REDELIVER: &str = "webhooks.rpc.delivery.redeliver";
/// [`RecoverDeliveries`] → [`RecoveredDeliveries`].
pub const DELIVERY_RECOVER: &str = "webhooks.rpc.delivery.recover";
/// [`ListCallbacks`] → list of [`CallbackStatus`].
pub const CALLBACK_LIST: &str = "webhooks.rpc.callback.list";
/// [`EnableCallback`] → [`EnableResult`].
pub const CALLBACK_ENABLE: &str = "webhooks.rpc.callback.enable";
/// [`CheckUrls`] → list of [`UrlCheck`], in the order of the question.
pub const CALLBACK_CHECK: &str = "webhooks.rpc.callback.check";
/// [`TestCallback`] → [`TestResult`]. It may take [`TEST_TIMEOUT`].
pub const CALLBACK_TEST: &str = "webhooks.rpc.callback.test";

/// Why a query was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// The HTTP status that fits.
    pub status: u16,
    /// Stable, snake_case, for programs.
    pub code: String,
    /// One sentence, for people.
    pub message: String,
}

impl RpcError {
    /// Makes an error.
    pub fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into() }
    }
}

/// How a lead is found: by id, or by reference and process. The project is the caller's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetLead {
    /// Whose lead.
    pub project_id: ObjectId,
    /// The lead.
    #[serde(default)]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    #[serde(default)]
    pub reference_id: Option<String>,
    /// The process of the external id.
    #[serde(default)]
    pub process_id: Option<ObjectId>,
}

/// A new lead.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct InitiateLead {
    /// Whose lead.
    pub project_id: ObjectId,
    /// In which process.
    pub process_id: ObjectId,
    /// The group of the vendor's API; stored, not interpreted.
    #[serde(default)]
    pub group_id: Option<String>,
    /// The lead's external id, unique in its process.
    #[serde(default)]
    pub reference_id: Option<String>,
    /// The lead's name.
    #[serde(default)]
    pub name: Option<String>,
    /// The lead's phone number.
    #[serde(default)]
    pub phone: Option<String>,
    /// The lead's e-mail address, lower case.
    #[serde(default)]
    pub email: Option<String>,
    /// What else is known of it.
    pub metadata: JsonObject,
}

/// A lead as it stands.
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
    /// The disposition stored with the state that last took one.
    pub disposition: Option<String>,
    /// What else is known of it.
    pub metadata: JsonObject,
    /// Grows by one with every applied update; 1 for a new lead.
    pub version: i64,
    /// When it was initiated.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Its last updates, newest first, at most [`LEAD_ACTIVITIES`]; none in lists.
    pub activities: Vec<Activity>,
}

/// How many activities a lead shows.
pub const LEAD_ACTIVITIES: i64 = 20;

/// An update in a lead's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// The update.
    pub update_id: ObjectId,
    /// Whether the lead was changed.
    pub success: bool,
    /// Why not.
    pub error: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition given with it.
    pub disposition: Option<String>,
    /// Who changed it.
    pub user_id: Option<String>,
    /// When it was decided.
    pub timestamp: Timestamp,
}

/// Which update.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetUpdate {
    /// Whose update.
    pub project_id: ObjectId,
    /// The update.
    pub update_id: ObjectId,
}

/// Where an update stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum UpdateStatus {
    /// In the log, not decided yet.
    Pending,
    /// The lead was changed.
    Succeeded,
    /// The lead was not changed.
    Failed,
}

/// An update's story up to its outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Update {
    /// The update.
    pub update_id: ObjectId,
    /// Where it stands. While it is pending, all else is null, but for what is known of one that is held during a call.
    pub status: UpdateStatus,
    /// What was asked, as it stood in the log.
    pub command: Option<JsonObject>,
    /// Its place in the command log.
    pub log_sequence: Option<u64>,
    /// When the log stored it.
    pub logged_at: Option<Timestamp>,
    /// The lead it was for.
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
    /// The lead's version after.
    pub version: Option<i64>,
    /// Who changed it, as the command said.
    pub user_id: Option<String>,
    /// The API key it came under; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// What it asked for and was ignored.
    pub warnings: Vec<String>,
    /// When it was decided and applied.
    pub applied_at: Option<Timestamp>,
    /// The lead's metadata after it.
    pub data: Option<JsonObject>,
    /// While it is held during a call: when the call expires unless it ends before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_until: Option<Timestamp>,
}

impl Update {
    /// An update that waits in the log.
    pub fn pending(update_id: ObjectId) -> Self {
        Self {
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

/// An update that is decided and not made. The reply is the event that would be announced, under an id that no update has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DryRunUpdate {
    /// Whose update.
    pub project_id: ObjectId,
    /// What is asked.
    pub command: UpdateCommand,
}

/// A new project.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CreateProject {
    /// Its name, unique.
    pub name: String,
}

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Project {
    /// The project.
    pub project_id: ObjectId,
    /// Its name.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
}

/// Creates the process of this name, or makes it what the specification says.
pub type ApplyProcess = ProcessSpec;

/// What applying a process did.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ProcessChangeResult {
    /// The process as it stands now. Secrets are shown only of the callbacks named in `new_secrets`.
    pub process: Process,
    /// Whether anything changed, or would in a dry run.
    pub changed: bool,
    /// Whether there was no such process before.
    #[serde(default)]
    pub created: bool,
    /// What is different from before, for people, a line each; none for a new process.
    #[serde(default)]
    pub changes: Vec<String>,
    /// The callbacks for which a signing secret was made just now: the one time that it is shown.
    pub new_secrets: Vec<ObjectId>,
}

/// Seals everything anew with the present key of whoever answers. Safe to repeat.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RotateSecrets {}

/// How far a rotation came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RotationResult {
    /// The present key.
    pub key_id: KeyId,
    /// Processes that were sealed anew by this call.
    pub resealed: u64,
    /// Processes that had nothing to seal anew.
    pub unchanged: u64,
    /// Processes that time did not suffice for: ask again.
    pub remaining: u64,
    /// Callbacks that stay as they are, because they cannot be opened.
    pub locked: Vec<LockedCallback>,
}

/// A callback whose secrets cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LockedCallback {
    /// Its process, by name.
    pub process: String,
    /// Its project.
    pub project_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// Why, for people. It names the key.
    pub error: String,
}

/// A new API key. The key itself is made by the caller and does not travel.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CreateKey {
    /// The project that the key is for.
    pub project_id: ObjectId,
    /// What it is for, for people.
    pub name: String,
    /// [`hash`](crate::key::hash) of the key.
    pub sha256: String,
    /// What it may do.
    pub scopes: BTreeSet<Scope>,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
}

/// Which key to revoke.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RevokeKey {
    /// The key.
    pub key_id: ObjectId,
}

/// Whose keys to list.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListKeys {
    /// The project.
    pub project_id: ObjectId,
}

/// The reply of [`KEY_LIST`].
pub type Keys = Vec<ApiKey>;

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum DeliveryStatus {
    /// It will be tried (again).
    Pending,
    /// The endpoint took it.
    Delivered,
    /// It will not be tried again.
    Exhausted,
}

/// A completion event on its way to one callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Delivery {
    /// The update it tells of; also its `webhook-id`.
    pub update_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// Where it stands.
    pub status: DeliveryStatus,
    /// When it is tried next.
    pub next_attempt_at: Option<Timestamp>,
    /// Its attempts, in order.
    pub attempts: Vec<Attempt>,
}

/// The deliveries of one update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListUpdateDeliveries {
    /// The update's project.
    pub project_id: ObjectId,
    /// The update.
    pub update_id: ObjectId,
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
    /// The status that the endpoint answered with, if it did.
    pub status_code: Option<u16>,
    /// What went wrong; null when the endpoint took it.
    pub error: Option<String>,
    /// The first bytes of the answer's body, of attempts that failed.
    pub response: Option<String>,
}

/// Whose callbacks to list.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListCallbacks {
    /// The project.
    pub project_id: ObjectId,
}

/// How a callback stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum CallbackState {
    /// Its last attempt that there was, if any, was taken.
    Healthy,
    /// It has had nothing but failures for a while.
    Failing,
    /// It gets nothing until it is enabled again.
    Disabled,
    /// Its process switches it off.
    Off,
}

/// A callback, and how it fares.
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
    /// Its process's name.
    pub process: String,
    /// How it stands.
    pub state: CallbackState,
    /// Since when it has had nothing but failures.
    pub failing_since: Option<Timestamp>,
    /// Why it is disabled.
    pub reason: Option<String>,
}

/// Which callback to enable after it was disabled by its failures.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EnableCallback {
    /// The callback.
    pub callback_id: ObjectId,
}

/// The reply of [`CALLBACK_ENABLE`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EnableResult {
    /// Whether it had been disabled.
    pub was_disabled: bool,
}

/// How do log, checkpoint and events stand to each other?
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetRecovery {}

/// A way out of what halted lead-state, or of what was not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryKind {
    /// Apply again what Postgres forgot: the log still holds it.
    Replay,
    /// Go on with the log as it is.
    NewEpoch,
    /// Announce again what was applied since some time.
    Reannounce,
}

impl std::fmt::Display for RecoveryKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Replay => "replay",
            Self::NewEpoch => "new-epoch",
            Self::Reannounce => "reannounce",
        })
    }
}

/// Why lead-state does not go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Halted {
    /// For programs: `database_restored`, `log_lost_end`, `log_begins_late` or `log_replaced`.
    pub reason: std::borrow::Cow<'static, str>,
    /// For people.
    pub text: String,
    /// What mends it.
    pub remedy: RecoveryKind,
}

/// How log, checkpoint and events stand to each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoveryStatus {
    /// How often the announcements were taken back.
    pub generation: i32,
    /// The last update that was applied.
    pub applied: LogPosition,
    /// The last update whose event was announced.
    pub announced: LogPosition,
    /// The last update up to which the webhook-notifier acknowledged every event, as recorded every ten seconds.
    pub delivered: LogPosition,
    /// The first entry that the log holds.
    pub log_first: u64,
    /// The last entry of the log.
    pub log_last: u64,
    /// Why lead-state does not go on; null when it does.
    pub halted: Option<Halted>,
}

/// Recover, if the checkpoint is still where it was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Recover {
    /// How.
    pub kind: RecoveryKind,
    /// From when on to announce again; only for [`RecoveryKind::Reannounce`].
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// [`RecoveryStatus::generation`] as it was seen.
    pub generation: i32,
    /// [`RecoveryStatus::applied`] as it was seen.
    pub applied: LogPosition,
}

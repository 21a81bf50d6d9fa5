//! Updates and their outcomes.

use std::borrow::Cow;

use contract::{
    JsonObject, ObjectId, Timestamp,
    event::{CompletionEvent, OutcomeKind},
    event_kind::DeliveryKind,
    rpc::{self, DeliveryStatus, UpdateStatus},
};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    convert::{read_both, response_from},
    examples::example,
    time::DateTime,
};

/// The body of `POST /api/v1/leads/update`.
///
/// At least one of `metadata` (with a member), `name` and `targetState` is required. Where `metadata` is absent or
/// null, every field that is not named here is merged into the lead's metadata. Null and the empty text count as
/// absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(extend("anyOf" = [{"required": ["leadId"]}, {"required": ["referenceId", "projectId", "processId"]}]))
)]
#[serde(rename_all = "camelCase", default)]
pub struct UpdateRequest {
    /// The lead; required without `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; requires `projectId` and `processId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// The API key's project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// The process of `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The lead's new name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub name: Option<String>,
    /// The state to move the lead to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub target_state: Option<String>,
    /// Why; stored with states that take a disposition, ignored without `targetState`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub disposition: Option<String>,
    /// Who changes the lead, for the audit trail.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub user_id: Option<String>,
    /// Merged into the lead's metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<JsonObject>,
}

/// A line of `POST /api/v1/leads/update/bulk`: an update, and the conditions that a single update has outside of its
/// body. Other names that begin with `$` are rejected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BulkUpdateLine {
    /// The update.
    #[serde(flatten)]
    pub update: UpdateRequest,
    /// What the update expects of its lead.
    #[serde(flatten)]
    pub expectations: LineExpectations,
}

/// What an update in a bulk request expects of its lead.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct LineExpectations {
    /// Change the lead only if it is still at this version.
    #[serde(rename = "$expectedVersion", skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Change the lead only if it is still in this state.
    #[serde(rename = "$expectedState", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub state: Option<String>,
}

impl<'de> Deserialize<'de> for BulkUpdateLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_both(deserializer).map(|(update, expectations)| Self { update, expectations })
    }
}

/// The response of `POST /api/v1/leads/update`, `/calls/started` and `/calls/ended`: the update or call event is in the
/// log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateAccepted {
    /// Always true.
    pub success: bool,
    /// For people.
    pub message: Cow<'static, str>,
    /// The update, for `GET /api/v1/updates/{updateId}`.
    pub update_id: ObjectId,
    /// Warnings about ignored parts of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The outcome, as webhooks report it; only with `Prefer: wait`, and if it arrived in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// The outcome of an update, which is the body of its webhooks, or of a call event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// `update`; `call.started` or `call.ended` of a call event; `erase` of an erasure; `lead.created` of a creation.
    #[serde(rename = "action_type")]
    pub action_type: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// Whether it was applied.
    pub success: bool,
    /// Why not.
    pub error: Option<String>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// When it was decided, in milliseconds since 1970.
    pub timestamp: Timestamp,
    /// The lead's metadata after the merge; null on failure and of a call event.
    pub data: Option<JsonObject>,
}

response_from!(event: CompletionEvent => Outcome {
    update_id, success, error, lead_id, reference_id, timestamp, data,
} with { action_type: event.kind });

/// `data` of an event of `GET /api/v1/events`: the body of the webhooks, and why the update failed for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// The outcome.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Why it failed, for programs.
    pub error_code: Option<String>,
}

impl From<CompletionEvent> for Event {
    fn from(mut event: CompletionEvent) -> Self {
        let error_code = event.error_code.take();
        Self { outcome: event.into(), error_code }
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Rest {
            error_code: Option<String>,
        }
        read_both(deserializer).map(|(outcome, Rest { error_code })| Self { outcome, error_code })
    }
}

/// The response of `POST /api/v1/leads/update` with `dryRun=true`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DryRunResponse {
    /// Always true: `outcome` says whether the update would succeed.
    pub success: bool,
    /// For people.
    pub message: Cow<'static, str>,
    /// Always true.
    pub dry_run: bool,
    /// What the update would do.
    pub outcome: DryRunOutcome,
    /// Warnings about parts of the request that would be ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What an update would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DryRunOutcome {
    /// Whether the lead would be changed.
    pub success: bool,
    /// Why not, for people.
    pub error: Option<String>,
    /// Why not, for programs.
    pub error_code: Option<String>,
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// The state it is in.
    pub from_state: Option<String>,
    /// The state it would be in.
    pub to_state: Option<String>,
    /// The version it would have.
    pub version: Option<i64>,
    /// The metadata it would have.
    pub data: Option<JsonObject>,
}

response_from!(event: CompletionEvent => DryRunOutcome {
    success, error, error_code, lead_id, reference_id, from_state, to_state, version, data,
});

/// A line of the response of `POST /api/v1/leads/update/bulk`, `/calls/started/bulk` and `/calls/ended/bulk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct BulkUpdateResult {
    /// The position of the update or call event in the request, from 1.
    pub line: usize,
    /// Whether it is in the log.
    pub success: bool,
    /// The update, if it is in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// Why it is not in the log, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why it is not in the log, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Cow<'static, str>>,
    /// Warnings about ignored parts of the line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The response of `GET /api/v1/updates/{updateId}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TimelineResponse {
    /// Always true.
    pub success: bool,
    /// The timeline.
    pub data: UpdateTimeline,
    /// Warnings about data that could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// An update or a call event from the request to the last attempt of its last delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateTimeline {
    /// The update.
    pub update_id: ObjectId,
    /// `pending` until it is decided. While it is pending most fields are null.
    pub status: UpdateStatus,
    /// The command, as it was logged.
    pub command: Option<JsonObject>,
    /// The outcome, as its webhooks report it.
    pub outcome: Option<Outcome>,
    /// Why it failed, for programs.
    pub error_code: Option<String>,
    /// Warnings about ignored fields.
    pub warnings: Vec<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The lead's version after it.
    pub version: Option<i64>,
    /// Who changed the lead, as the update said.
    pub user_id: Option<String>,
    /// The API key of the request; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// Present while it is queued during a call: when the call expires unless it ends earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_until: Option<DateTime>,
    /// When it was accepted.
    pub logged_at: Option<DateTime>,
    /// When it was decided and applied.
    pub applied_at: Option<DateTime>,
    /// Its deliveries; null while webhook-notifier is unavailable.
    pub deliveries: Option<Vec<Delivery>>,
    /// Present while its webhooks wait, because its process cannot be read; the operator is alerted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parked: Option<Parked>,
    /// How many webhooks are not among its deliveries yet, because their first attempt has not ended or not begun.
    /// Absent while it is pending, and if this is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unrecorded: Option<u64>,
}

impl From<rpc::Update> for UpdateTimeline {
    /// The timeline without its deliveries, which webhook-notifier has.
    fn from(mut update: rpc::Update) -> Self {
        let outcome = Outcome::of(&mut update);
        Self {
            update_id: update.update_id,
            status: update.status,
            command: update.command,
            outcome,
            error_code: update.error_code,
            warnings: update.warnings,
            from_state: update.from_state,
            to_state: update.to_state,
            version: update.version,
            user_id: update.user_id,
            api_key_id: update.api_key_id,
            queued_until: update.queued_until.map(DateTime),
            logged_at: update.logged_at.map(DateTime),
            applied_at: update.applied_at.map(DateTime),
            deliveries: None,
            parked: None,
            unrecorded: None,
        }
    }
}

impl Outcome {
    /// Moves the outcome out of an update. None while the update is pending.
    pub fn of(update: &mut rpc::Update) -> Option<Self> {
        let timestamp = (update.status != UpdateStatus::Pending).then_some(update.applied_at)??;
        Some(Self {
            action_type: update.kind,
            update_id: update.update_id,
            success: update.status == UpdateStatus::Succeeded,
            error: update.error.take(),
            lead_id: update.lead_id,
            reference_id: update.reference_id.take(),
            timestamp,
            data: update.data.take(),
        })
    }
}

/// Why the webhooks of an update wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Parked {
    /// Since when the webhooks wait.
    pub since: DateTime,
    /// Why the process cannot be read.
    pub reason: String,
}

response_from!(parked: rpc::ParkedUpdate => Parked { since, reason });

/// The delivery of an update to one callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Delivery {
    /// The callback.
    pub callback_id: ObjectId,
    /// The kind of the event; absent for the outcome of an update.
    #[serde(default, skip_serializing_if = "DeliveryKind::is_update")]
    pub kind: DeliveryKind,
    /// `pending`, `delivered`, or `exhausted`: ended without success.
    pub status: DeliveryStatus,
    /// When the next attempt is due.
    pub next_attempt_at: Option<DateTime>,
    /// Its attempts, in order.
    pub attempts: Vec<Attempt>,
}

response_from!(delivery: rpc::Delivery => Delivery { callback_id, kind, status, next_attempt_at } with {
    attempts: delivery.attempts.into_iter().map(Into::into).collect(),
});

/// One request to a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// 1 for the first.
    pub number: u32,
    /// When it began.
    pub started_at: DateTime,
    /// How long it took, in milliseconds.
    pub duration_ms: u32,
    /// The status of the endpoint's response, if there was one.
    pub status_code: Option<u16>,
    /// The error; null if the attempt succeeded.
    pub error: Option<String>,
    /// The first bytes of the response's body, of attempts that failed.
    pub response: Option<String>,
}

response_from!(attempt: rpc::Attempt => Attempt { number, started_at, duration_ms, status_code, error, response });

example!(
    update_request: UpdateRequest,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","targetState":"interested","metadata":{"make":"Toyota","model":"Camry"}}"#
);
example!(
    bulk_update_line: BulkUpdateLine,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","targetState":"interested","metadata":{"make":"Toyota","model":"Camry"},"$expectedState":"new"}"#
);
example!(
    update_accepted: UpdateAccepted,
    r#"{"success":true,"message":"Lead update initiated","updateId":"6b0426971c73026dafa27e40"}"#
);
example!(
    dry_run_response: DryRunResponse,
    r#"{"success":true,"message":"Dry run: nothing was changed","dryRun":true,"outcome":{"success":true,"error":null,"errorCode":null,"leadId":"696102a4b8c1d2e3f4a5b6c7","referenceId":null,"fromState":"new","toState":"interested","version":2,"data":{"make":"Toyota","model":"Camry"}}}"#
);
example!(bulk_update_result: BulkUpdateResult, r#"{"line":1,"success":true,"updateId":"6b0426971c73026dafa27e40"}"#);
example!(
    event: Event,
    r#"{"action_type":"update","updateId":"6b0426971c73026dafa27e40","success":true,"error":null,"leadId":"696102a4b8c1d2e3f4a5b6c7","referenceId":"AB123456789","timestamp":1768210200000,"data":{"make":"Toyota","model":"Camry"},"errorCode":null}"#
);
example!(
    timeline_response: TimelineResponse,
    r#"{"success":true,"data":{"updateId":"6b0426971c73026dafa27e40","status":"succeeded","command":{"updateId":"6b0426971c73026dafa27e40","leadId":"696102a4b8c1d2e3f4a5b6c7","metadata":{"make":"Toyota","model":"Camry"},"targetState":"interested"},"outcome":{"action_type":"update","updateId":"6b0426971c73026dafa27e40","success":true,"error":null,"leadId":"696102a4b8c1d2e3f4a5b6c7","referenceId":"AB123456789","timestamp":1768210200000,"data":{"make":"Toyota","model":"Camry"}},"errorCode":null,"warnings":[],"fromState":"new","toState":"interested","version":2,"userId":null,"apiKeyId":"696102a4b8c1d2e3f4a5b603","loggedAt":"2026-01-12T09:29:59.991Z","appliedAt":"2026-01-12T09:30:00.000Z","deliveries":[{"callbackId":"696102a4b8c1d2e3f4a5b604","status":"delivered","nextAttemptAt":null,"attempts":[{"number":1,"startedAt":"2026-01-12T09:30:00.012Z","durationMs":41,"statusCode":200,"error":null,"response":null}]}]}}"#
);

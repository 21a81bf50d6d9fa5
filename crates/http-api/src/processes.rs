//! Processes, callbacks and sources in responses. Requests configure them with
//! [`ProcessSpec`](contract::process::ProcessSpec), [`CallbackSpec`](contract::process::CallbackSpec) and
//! [`SourceSpec`](contract::process::SourceSpec).

use contract::{
    ObjectId,
    process::{Callback, IngestId, Process, Rules, Source},
    rpc::{self, CallbackState},
};
use serde::{Deserialize, Serialize};

use crate::{
    convert::response_from,
    examples::{Example, example},
    time::DateTime,
};

/// A process without its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ConfiguredProcess {
    /// The process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// Its project.
    pub project_id: ObjectId,
    /// Grows with every change; also in `ETag`, for `If-Match`.
    pub version: i64,
    /// Its name, unique in its project.
    pub name: String,
    /// The rules by which its leads change.
    #[serde(flatten)]
    pub rules: Rules,
    /// The callbacks that its updates are delivered to.
    pub callbacks: Vec<ConfiguredCallback>,
    /// The platforms that report calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<ConfiguredSource>,
}

response_from!(process: Process => ConfiguredProcess { process_id, project_id, name, rules } with {
    version: process.revision,
    callbacks: process.callbacks.into_iter().map(Into::into).collect(),
    sources: {
        let (project_id, process_id) = (process.project_id, process.process_id);
        process.sources.into_iter().map(|source| ConfiguredSource::new(project_id, process_id, source)).collect()
    },
});

/// A source of call reports, without its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ConfiguredSource {
    /// The source.
    #[serde(flatten)]
    pub source: Source,
    /// The path for the platform's webhooks, at the address of the gateway.
    pub ingest_path: String,
}

impl ConfiguredSource {
    /// A source of this process.
    pub fn new(project_id: ObjectId, process_id: Option<ObjectId>, source: Source) -> Self {
        let id = IngestId { project_id, process_id, source_id: source.source_id };
        let ingest_path = id.path(source.platform);
        Self { source, ingest_path }
    }
}

/// A callback without its secrets, except for those that this request created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ConfiguredCallback {
    /// The callback.
    #[serde(flatten)]
    pub callback: Callback,
    /// The secrets that a rotation replaced and that still sign.
    pub retiring_secrets: Vec<SecretExpiry>,
}

/// The response of `GET /api/v1/processes/{processId}/callbacks/{callbackId}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CallbackResponse {
    /// Always true.
    pub success: bool,
    /// The callback.
    pub data: CallbackWithHealth,
    /// Warnings about data that could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A callback and its health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CallbackWithHealth {
    /// The callback.
    #[serde(flatten)]
    pub callback: ConfiguredCallback,
    /// Its health; null while webhook-notifier is unavailable, and until it has read a new callback.
    pub health: Option<CallbackHealth>,
}

/// The health of a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallbackHealth {
    /// `healthy`; `failing`: all attempts for a while failed; `disabled` by its failures; `paused`;
    /// `off` by its configuration.
    pub state: CallbackState,
    /// Since when all attempts failed.
    pub failing_since: Option<DateTime>,
    /// Since when it is disabled. Null until the disabling is recorded.
    pub disabled_since: Option<DateTime>,
    /// Why it is disabled.
    pub reason: Option<String>,
    /// How many of its deliveries are pending; at most 1000 are counted, those that are due first.
    pub pending: u32,
    /// When the oldest pending delivery was recorded.
    pub oldest_pending_at: Option<DateTime>,
    /// The error of the latest attempt of a pending delivery.
    pub last_error: Option<String>,
}

impl CallbackHealth {
    /// The health of a callback. None if the status has no details.
    pub fn of(status: rpc::CallbackStatus) -> Option<Self> {
        let rpc::CallbackDetails { disabled_since, pending, oldest_pending_at, last_error } = status.details?;
        Some(Self {
            state: status.state,
            failing_since: status.failing_since.map(DateTime),
            disabled_since: disabled_since.map(DateTime),
            reason: status.reason,
            pending,
            oldest_pending_at: oldest_pending_at.map(DateTime),
            last_error,
        })
    }
}

/// A secret that a rotation replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SecretExpiry {
    /// When it stops signing.
    pub until: DateTime,
}

impl From<Callback> for ConfiguredCallback {
    fn from(mut callback: Callback) -> Self {
        let retiring = std::mem::take(&mut callback.retiring_secrets).into_iter();
        let retiring_secrets = retiring.map(|secret| SecretExpiry { until: DateTime(secret.until) }).collect();
        Self { callback, retiring_secrets }
    }
}

/// The response to a change of a process or callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "{T}Change"))]
pub struct ChangeResponse<T> {
    /// Always true.
    pub success: bool,
    /// The process, callback or source after the change; null where one was removed.
    pub data: T,
    /// Whether anything changed.
    pub changed: bool,
    /// What changed, a line each, for people.
    pub changes: Vec<String>,
    /// Warnings about accepted settings that will cause problems.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The body of `POST /api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RotateSecretRequest {
    /// How long the replaced secrets still sign, in seconds; a day by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 604_800)))]
    pub overlap_seconds: Option<u32>,
}

/// The result of testing a callback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TestResult {
    /// The `webhook-id` of the ping.
    pub webhook_id: ObjectId,
    /// Whether the endpoint accepted it.
    pub delivered: bool,
    /// When it was sent.
    pub started_at: DateTime,
    /// How long it took, in milliseconds.
    pub duration_ms: u32,
    /// The status of the endpoint's response, if there was one.
    pub status_code: Option<u16>,
    /// The error; null if the ping was delivered.
    pub error: Option<String>,
    /// The first bytes of the response's body.
    pub response: Option<String>,
}

response_from!(tested: rpc::TestResult => TestResult {
    webhook_id, started_at, duration_ms, status_code, response,
} with { delivered: tested.error.is_none(), error: tested.error });

/// The result of enabling a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EnableResult {
    /// Whether its failures had disabled it.
    pub was_disabled: bool,
}

response_from!(enabled: rpc::EnableResult => EnableResult { was_disabled });

/// The result of pausing or resuming a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct PauseResult {
    /// Whether it was paused before.
    pub was_paused: bool,
}

response_from!(paused: rpc::PauseResult => PauseResult { was_paused });

impl<T: Example> Example for ChangeResponse<T> {
    fn example() -> Self {
        let changes = vec![
            r#"callback "crm": url "https://old.example.com/leadrelay" -> "https://crm.example.com/leadrelay""#.into(),
        ];
        Self { success: true, data: T::example(), changed: true, changes, warnings: Vec::new() }
    }
}

example!(
    configured_process: ConfiguredProcess,
    r#"{"processId":"696102a4b8c1d2e3f4a5b602","projectId":"696102a4b8c1d2e3f4a5b601","version":3,"name":"car-sales","states":[{"name":"new","kind":"initial"},{"name":"interested","kind":"active"},{"name":"lost","kind":"terminal"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[{"callbackId":"696102a4b8c1d2e3f4a5b604","name":"crm","url":"https://crm.example.com/leadrelay","enabled":true,"timeoutSeconds":15,"maxInFlight":64,"retiringSecrets":[]}]}"#
);
example!(
    configured_callback: ConfiguredCallback,
    r#"{"callbackId":"696102a4b8c1d2e3f4a5b604","name":"crm","url":"https://crm.example.com/leadrelay","enabled":true,"timeoutSeconds":15,"maxInFlight":64,"retiringSecrets":[]}"#
);
example!(
    callback_with_health: CallbackWithHealth,
    r#"{"callbackId":"696102a4b8c1d2e3f4a5b604","name":"crm","url":"https://crm.example.com/leadrelay","enabled":true,"timeoutSeconds":15,"maxInFlight":64,"retiringSecrets":[],"health":{"state":"failing","failingSince":"2026-01-12T09:30:00.012Z","disabledSince":null,"reason":null,"pending":3,"oldestPendingAt":"2026-01-12T09:30:00.012Z","lastError":"the endpoint answered 503 Service Unavailable"}}"#
);
impl Example for CallbackResponse {
    fn example() -> Self {
        Self { success: true, data: CallbackWithHealth::example(), warnings: Vec::new() }
    }
}
example!(
    configured_source: ConfiguredSource,
    r#"{"sourceId":"696102a4b8c1d2e3f4a5b605","name":"dialer","platform":"vapi","enabled":true,"ingestPath":"/api/v1/calls/ingest/vapi/696102a4b8c1d2e3f4a5b601-696102a4b8c1d2e3f4a5b602-696102a4b8c1d2e3f4a5b605"}"#
);
example!(rotate_secret_request: RotateSecretRequest, r#"{"overlapSeconds":3600}"#);
example!(
    test_result: TestResult,
    r#"{"webhookId":"6b0426971c73026dafa27e41","delivered":true,"startedAt":"2026-01-12T09:30:00.012Z","durationMs":41,"statusCode":200,"error":null,"response":null}"#
);
example!(enable_result: EnableResult, r#"{"wasDisabled":true}"#);
example!(pause_result: PauseResult, r#"{"wasPaused":false}"#);

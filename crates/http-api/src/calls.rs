//! Calls with leads.

use contract::{ObjectId, rpc};
use serde::{Deserialize, Serialize};

use crate::{convert::response_from, examples::example, time::DateTime};

/// The body of `POST /api/v1/calls/started`. Unknown fields and empty texts are refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(extend("anyOf" = [{"required": ["leadId"]}, {"required": ["referenceId", "processId"]}]))
)]
#[serde(rename_all = "camelCase", default)]
pub struct CallStartedRequest {
    /// The lead; required without `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; requires `processId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// The process of `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The API key's project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// The call, if a lead can have several calls at once. A second start of a call renews its expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub call_id: Option<String>,
    /// After how many seconds a call without an end counts as ended; by default the process's `callTimeoutSeconds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
}

/// The body of `POST /api/v1/calls/ended`. Unknown fields and empty texts are refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(extend("anyOf" = [{"required": ["leadId"]}, {"required": ["referenceId", "processId"]}]))
)]
#[serde(rename_all = "camelCase", default)]
pub struct CallEndedRequest {
    /// The lead; required without `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id; requires `processId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// The process of `referenceId`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The API key's project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
    /// The call that ended; without it, every call of the lead.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1024)))]
    pub call_id: Option<String>,
}

/// A call in progress: an item of `GET /api/v1/calls`.
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
    /// The call; null if its start had no `callId`.
    pub call_id: Option<String>,
    /// When its start was accepted.
    pub started_at: DateTime,
    /// When it counts as ended without an end.
    pub expires_at: DateTime,
}

response_from!(call: rpc::Call => Call { lead_id, process_id, reference_id, call_id, started_at, expires_at });

example!(
    call_started_request: CallStartedRequest,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","callId":"call-7","timeoutSeconds":1800}"#
);
example!(call_ended_request: CallEndedRequest, r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","callId":"call-7"}"#);
example!(
    call: Call,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","callId":"call-7","startedAt":"2026-01-12T09:30:00.000Z","expiresAt":"2026-01-12T10:00:00.000Z"}"#
);

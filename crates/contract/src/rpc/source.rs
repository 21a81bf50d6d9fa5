//! Sources of call reports: the authentication of their reports.

use serde::{Deserialize, Serialize};

use crate::ObjectId;

/// Checks whether a call report came from its source. webhook-notifier has the keys that open the source's secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyReport {
    /// The source's project.
    pub project_id: ObjectId,
    /// The source's process; null for the process `_`.
    pub process_id: Option<ObjectId>,
    /// The source.
    pub source_id: ObjectId,
    /// The signature that came with the report, as the platform writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// The SHA-256, in hex, of the secret that came with the report, for platforms that send it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_sha256: Option<String>,
    /// The signed body, in base64; empty without a signature.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub body: String,
}

/// The report came from its source. Other reports are refused with `invalid_signature`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct VerifiedReport {
    /// Always true.
    pub verified: bool,
}

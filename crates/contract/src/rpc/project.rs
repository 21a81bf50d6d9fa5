//! Projects, API keys, and the rotation of sealing keys.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Cursor, MAX_LIMIT};
use crate::{ObjectId, Timestamp, key::Scope, secret::KeyId};

/// Creates a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
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

/// Creates an API key. The caller makes the key; only its hash is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateKey {
    /// The project of the key.
    pub project_id: ObjectId,
    /// Its purpose, for people.
    pub name: String,
    /// The SHA-256 of the key in hex.
    pub sha256: String,
    /// The permissions of the key.
    pub scopes: BTreeSet<Scope>,
    /// When the key expires; null means never.
    pub expires_at: Option<Timestamp>,
}

/// Revokes an API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RevokeKey {
    /// The key.
    pub key_id: ObjectId,
    /// Revoke the key only if it belongs to this project. Absent for an operator, who may revoke any key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ObjectId>,
}

/// Lists the API keys of a project, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListKeys {
    /// The project.
    pub project_id: ObjectId,
    /// Only this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<ObjectId>,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most keys to return.
    pub limit: u32,
}

impl ListKeys {
    /// The first page of a project's keys.
    pub const fn of_project(project_id: ObjectId) -> Self {
        Self { project_id, key_id: None, cursor: None, limit: MAX_LIMIT }
    }

    /// A key of a project, if the project has it.
    pub const fn one(project_id: ObjectId, key_id: ObjectId) -> Self {
        Self { project_id, key_id: Some(key_id), cursor: None, limit: 1 }
    }
}

/// Seals all secrets again with lead-state's present key. Safe to repeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RotateSecrets {
    /// Where the previous call ended; absent to begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// The progress of a rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RotationResult {
    /// The present key.
    pub key_id: KeyId,
    /// Processes that this call sealed again.
    pub resealed: u64,
    /// Processes that were sealed with the present key already.
    pub unchanged: u64,
    /// Processes left when the time ran out: continue with `next`.
    pub remaining: u64,
    /// Where to continue; absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Cursor>,
    /// Callbacks and sources that were left as they are, because their secrets or their process cannot be read.
    pub locked: Vec<LockedCallback>,
}

/// A callback or source whose secrets cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LockedCallback {
    /// The name of its process.
    pub process: String,
    /// Its project.
    pub project_id: ObjectId,
    /// The callback. If there is no source either, the whole process cannot be read.
    pub callback_id: Option<ObjectId>,
    /// The source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_id: Option<ObjectId>,
    /// Why the secrets cannot be opened, for people. The text names the key.
    pub error: String,
}

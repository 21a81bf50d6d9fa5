//! API keys.

use std::collections::BTreeSet;

use contract::{
    ObjectId,
    key::{self, Scope},
};
use serde::{Deserialize, Serialize};

use crate::{convert::response_from, examples::example, time::DateTime};

/// An API key of the project. Its text is not stored, so it is not shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// The key's id, as `apiKeyId` in updates.
    pub key_id: ObjectId,
    /// The key's name.
    pub name: String,
    /// The key's scopes.
    pub scopes: BTreeSet<Scope>,
    /// When it was created.
    pub created_at: DateTime,
    /// When the key expires; null means never.
    pub expires_at: Option<DateTime>,
    /// When it was revoked.
    pub revoked_at: Option<DateTime>,
    /// The minute of the last accepted request with the key; null if there was none within 400 days.
    pub last_used_at: Option<DateTime>,
}

response_from!(key: key::ApiKey => ApiKey { key_id, name, scopes, created_at, expires_at, revoked_at, last_used_at });

example!(
    api_key: ApiKey,
    r#"{"keyId":"696102a4b8c1d2e3f4a5b603","name":"crm","scopes":["leads:read","leads:write"],"createdAt":"2026-01-12T04:55:59.048Z","expiresAt":"2026-04-12T04:55:59.048Z","revokedAt":null,"lastUsedAt":"2026-01-13T10:31:00.000Z"}"#
);

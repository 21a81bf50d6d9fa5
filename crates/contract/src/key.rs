//! API keys, as the services store and watch them: under the SHA-256 of the key's text.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{ObjectId, Timestamp, named::named};

named! {
    /// A permission of a key.
    Scope, InvalidScope,
    /// Read leads and updates.
    LeadsRead = "leads:read",
    /// Initiate and update leads.
    LeadsWrite = "leads:write",
    /// Erase leads.
    LeadsErase = "leads:erase",
    /// Report the starts and ends of calls with leads.
    CallsWrite = "calls:write",
    /// Read the configuration of processes and callbacks, and API keys, without secrets.
    ConfigRead = "config:read",
    /// Configure processes and callbacks, and so decide where every outcome is delivered; revoke API keys.
    ConfigWrite = "config:write",
}

impl Scope {
    /// The default scopes of a new key: a client that updates leads need not configure callbacks.
    pub const DEFAULT: [Self; 2] = [Self::LeadsRead, Self::LeadsWrite];
}

/// A key as it is stored, listed and watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// The key's id, as in logs, the ledger and `leadctl key list`.
    pub key_id: ObjectId,
    /// The only project that the key gives access to.
    pub project_id: ObjectId,
    /// The purpose of the key, for people.
    pub name: String,
    /// The permissions of the key.
    pub scopes: BTreeSet<Scope>,
    /// When the key was created.
    pub created_at: Timestamp,
    /// When the key expires; null means never.
    pub expires_at: Option<Timestamp>,
    /// When the key was revoked.
    pub revoked_at: Option<Timestamp>,
    /// The minute in which a gateway last accepted a request with the key. Only in lists; absent if the key was not
    /// used within 400 days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

impl ApiKey {
    /// Whether requests with this key are accepted at this time.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|at| now < at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_this_wire_form() {
        let key = ApiKey {
            key_id: ObjectId::from_bytes([1; 12]),
            project_id: ObjectId::from_bytes([2; 12]),
            name: "crm".into(),
            scopes: Scope::ALL.into(),
            created_at: Timestamp::from_millis(5),
            expires_at: Some(Timestamp::from_millis(10)),
            revoked_at: None,
            last_used_at: None,
        };
        insta::assert_snapshot!(serde_json::to_string(&key).unwrap(), @r#"{"keyId":"010101010101010101010101","projectId":"020202020202020202020202","name":"crm","scopes":["leads:read","leads:write","leads:erase","calls:write","config:read","config:write"],"createdAt":5,"expiresAt":10,"revokedAt":null}"#);
        assert!(key.is_valid(Timestamp::from_millis(9)));
        assert!(!key.is_valid(Timestamp::from_millis(10)));
        assert!(!ApiKey { revoked_at: Some(Timestamp::from_millis(1)), ..key }.is_valid(Timestamp::from_millis(9)));
    }
}

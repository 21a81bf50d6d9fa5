//! API keys, as the services store and watch them: under the SHA-256 of the key's text.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{ObjectId, Timestamp};

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Scope {
    /// Read leads and updates.
    #[serde(rename = "leads:read")]
    LeadsRead,
    /// Initiate and update leads.
    #[serde(rename = "leads:write")]
    LeadsWrite,
    /// Erase leads.
    #[serde(rename = "leads:erase")]
    LeadsErase,
    /// Report the starts and ends of calls with leads.
    #[serde(rename = "calls:write")]
    CallsWrite,
    /// Read the configuration of processes and callbacks, and API keys, without secrets.
    #[serde(rename = "config:read")]
    ConfigRead,
    /// Configure processes and callbacks, and so decide where every outcome is delivered; revoke API keys.
    #[serde(rename = "config:write")]
    ConfigWrite,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 6] =
        [Self::LeadsRead, Self::LeadsWrite, Self::LeadsErase, Self::CallsWrite, Self::ConfigRead, Self::ConfigWrite];
    /// The default scopes of a new key: a client that updates leads need not configure callbacks.
    pub const DEFAULT: [Self; 2] = [Self::LeadsRead, Self::LeadsWrite];

    /// The scope's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LeadsRead => "leads:read",
            Self::LeadsWrite => "leads:write",
            Self::LeadsErase => "leads:erase",
            Self::CallsWrite => "calls:write",
            Self::ConfigRead => "config:read",
            Self::ConfigWrite => "config:write",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::as_str).join(", ");
            format!("unknown scope {text:?}: it must be one of {known}")
        })
    }
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
    /// What the key is for, for people.
    pub name: String,
    /// What it may do.
    pub scopes: BTreeSet<Scope>,
    /// When it was created.
    pub created_at: Timestamp,
    /// From when on it is refused; null means never.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// The minute in which a gateway last accepted a request with it; only in lists, and absent if there is none within 400
    /// days.
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

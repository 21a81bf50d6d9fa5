//! Links of the operator console: entries of the bucket [`CONSOLE_LOGINS`](crate::streams::CONSOLE_LOGINS).
//!
//! The key of a one-time link is the SHA-256 of its token, which begins with `lrc_` for an operator and with `lrv_` for
//! a viewer. The key of a portal link has the tag of its project before the SHA-256. `leadctl` writes the entry of a
//! one-time link; the console removes the entry when the link is used. Both write entries of portal links, and remove
//! those of revoked links.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ObjectId, Timestamp};

/// How long a one-time link is valid. A longer time leaves more valid links in terminals and logs.
pub const LOGIN_AGE: Duration = Duration::from_hours(1);

/// A one-time link that was not used yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsoleLogin {
    /// When the link expires.
    pub expires_at: Timestamp,
}

/// The longest validity of a portal link. A longer time leaves more valid links in mailboxes and tickets.
pub const PORTAL_AGE: Duration = Duration::from_hours(7 * 24);

/// How long a portal link is valid by default.
pub const PORTAL_DEFAULT_AGE: Duration = Duration::from_hours(24);

/// How many portal links a project may make within [`PORTAL_AGE`], revoked ones included. More would make the list of
/// links longer than a page, and let one project fill the bucket.
pub const MAX_PORTAL_LINKS: usize = 200;

/// A link that shows one process or callback to people outside the project. It can be used until it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortalLink {
    /// The project.
    pub project_id: ObjectId,
    /// The process or callback that the link shows.
    #[serde(flatten)]
    pub target: PortalTarget,
    /// When the link expires.
    pub ends_at: Timestamp,
    /// The creator of the link, for people.
    pub made_by: String,
    /// The SHA-256 of the API key that made the link, which ends with the key. None for a link of an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_sha256: Option<String>,
    /// The API key with which visitors of the link act, sealed with the link's token. None for a link that only shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed_key: Option<String>,
}

/// A portal link in lists, without the secrets that open it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenPortalLink {
    /// Names the link in lists and logs. Does not open it.
    pub id: String,
    /// The process or callback that the link shows.
    #[serde(flatten)]
    pub target: PortalTarget,
    /// Whether visitors may test callbacks and redeliver.
    pub may_act: bool,
    /// The creator of the link, for people.
    pub made_by: String,
    /// When the link expires.
    pub ends_at: Timestamp,
}

/// The process or callback that a portal link shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortalTarget {
    /// A process: its callbacks and the outcomes of its updates.
    ProcessId(ObjectId),
    /// A callback.
    CallbackId(ObjectId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_has_this_wire_form() {
        let login = ConsoleLogin { expires_at: Timestamp::from_millis(7) };
        insta::assert_snapshot!(serde_json::to_string(&login).unwrap(), @r#"{"expiresAt":7}"#);
    }

    #[test]
    fn a_portal_link_has_this_wire_form() {
        let id = |byte| ObjectId::from_bytes([byte; 12]);
        let link = PortalLink {
            project_id: id(1),
            target: PortalTarget::CallbackId(id(2)),
            ends_at: Timestamp::from_millis(7),
            made_by: "operator".into(),
            key_sha256: Some("ab".into()),
            sealed_key: None,
        };
        let text = serde_json::to_string(&link).unwrap();
        insta::assert_snapshot!(text, @r#"{"projectId":"010101010101010101010101","callbackId":"020202020202020202020202","endsAt":7,"madeBy":"operator","keySha256":"ab"}"#);
        assert_eq!(serde_json::from_str::<PortalLink>(&text).unwrap(), link);
    }
}

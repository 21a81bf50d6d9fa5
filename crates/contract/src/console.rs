//! Links of the operator console: entries of the bucket [`CONSOLE_LOGINS`](crate::streams::CONSOLE_LOGINS). The key of a one-time
//! link is the SHA-256 of its token, which begins with `lrc_` for an operator and with `lrv_` for a viewer; that of a portal link has the tag of its project before it. `leadctl` writes the entry of a
//! one-time link, the console removes it when the link is used. Both write entries of portal links, and remove those that are
//! revoked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ObjectId, Timestamp};

/// How long a link can be used. A longer time leaves more of them in terminals and logs.
pub const LOGIN_AGE: Duration = Duration::from_hours(1);

/// A link that was not used yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsoleLogin {
    /// From when on it is refused.
    pub expires_at: Timestamp,
}

/// How long a portal link can be valid at most. A longer time leaves more of them in mailboxes and tickets.
pub const PORTAL_AGE: Duration = Duration::from_hours(7 * 24);

/// How long a portal link is valid unless its maker says otherwise.
pub const PORTAL_DEFAULT_AGE: Duration = Duration::from_hours(24);

/// How many portal links a project may make within [`PORTAL_AGE`], revoked ones included. More would make the list of links
/// longer than a page, and let one project fill the bucket.
pub const MAX_PORTAL_LINKS: usize = 200;

/// A link that shows one process or callback to people outside the project. It can be used until it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortalLink {
    /// The project.
    pub project_id: ObjectId,
    /// What it shows.
    #[serde(flatten)]
    pub target: PortalTarget,
    /// From when on it is refused.
    pub ends_at: Timestamp,
    /// Who made it, for people.
    pub made_by: String,
    /// The SHA-256 of the API key that made it: the link ends with the key. None for a link of an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_sha256: Option<String>,
    /// The API key that its visitors act with, sealed with the link's token. None if they may only look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed_key: Option<String>,
}

/// A portal link as it is listed, without anything that opens it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenPortalLink {
    /// Names the link in lists and logs. Does not open it.
    pub id: String,
    /// What it shows.
    #[serde(flatten)]
    pub target: PortalTarget,
    /// Whether its visitors may test callbacks and redeliver.
    pub may_act: bool,
    /// Who made it, for people.
    pub made_by: String,
    /// From when on it is refused.
    pub ends_at: Timestamp,
}

/// What a portal link shows.
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

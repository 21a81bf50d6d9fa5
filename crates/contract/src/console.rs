//! One-time links of the operator console: entries of the bucket [`CONSOLE_LOGINS`](crate::streams::CONSOLE_LOGINS), under
//! the SHA-256 of the link's token. `leadctl` writes an entry, the console removes it when the link is used.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// How long a link can be used. A longer time leaves more of them in terminals and logs.
pub const LOGIN_AGE: Duration = Duration::from_hours(1);

/// A link that was not used yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsoleLogin {
    /// From when on it is refused.
    pub expires_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_has_this_wire_form() {
        let login = ConsoleLogin { expires_at: Timestamp::from_millis(7) };
        insta::assert_snapshot!(serde_json::to_string(&login).unwrap(), @r#"{"expiresAt":7}"#);
    }
}

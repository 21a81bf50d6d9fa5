//! One-time links that sign an operator or a viewer in. An entry of the bucket [`CONSOLE_LOGINS`] is an unused link.

use anyhow::Context;
use async_nats::jetstream::{self, kv::Operation};
use contract::{
    Timestamp,
    console::{ConsoleLogin, LOGIN_AGE},
    streams::CONSOLE_LOGINS,
};
use secrets::api_key;
use serde::{Deserialize, Serialize};
use service_kit::{clock, nats::error_chain};

use crate::{app::Broker, fault::Fault};

/// The role that a one-time link gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum LoginRole {
    /// Sees every project, and acts with the API key of a project.
    Operator,
    /// Sees every project, and cannot act.
    Viewer,
}

impl LoginRole {
    const ALL: [Self; 2] = [Self::Operator, Self::Viewer];

    /// The prefix of the tokens of its links. The bucket has the hash of the whole token, so a token with a changed
    /// prefix is invalid.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Operator => "lrc_",
            Self::Viewer => "lrv_",
        }
    }

    /// The role that a link with this token gives.
    pub(crate) fn of_token(token: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| token.starts_with(role.prefix()))
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

/// Creates the token of a one-time link, which signs in within [`LOGIN_AGE`]. [`login_url`] makes the link.
///
/// # Errors
/// The bucket does not exist or cannot be written.
pub async fn create_login(js: &jetstream::Context, role: LoginRole) -> anyhow::Result<String> {
    let token = format!("{}{}", role.prefix(), hex::encode(rand::random::<[u8; 32]>()));
    let login = ConsoleLogin { expires_at: clock::now().plus(LOGIN_AGE) };
    let entry = serde_json::to_vec(&login).context("cannot write the login as JSON")?;
    let bucket = js.get_key_value(CONSOLE_LOGINS).await.context("cannot find the bucket of logins")?;
    bucket.create(api_key::hash(&token), entry.into()).await.context("cannot record the login")?;
    Ok(token)
}

/// The link of a token.
pub fn login_url(console_url: &str, token: &str) -> String {
    format!("{}/login?token={token}", console_url.trim_end_matches('/'))
}

/// Redeems a token, and returns its role. Of several requests with one token, only the first succeeds.
pub(crate) async fn redeem(broker: &Broker, token: &str, now: Timestamp) -> Result<LoginRole, Fault> {
    let used = || Fault::Refused("This link was used or has expired. Make a new one: leadctl console token".into());
    let role = LoginRole::of_token(token).filter(|_| is_login_token(token)).ok_or_else(used)?;
    let unavailable = |e: &(dyn std::error::Error + 'static)| {
        tracing::warn!("cannot read the bucket of logins: {}", error_chain(e));
        Fault::Unavailable("The bucket of logins cannot be read. Try again.".into())
    };
    let bucket = broker.logins().await.map_err(|e| unavailable(&e))?;
    let key = api_key::hash(token);
    let entry = bucket.entry(&key).await.map_err(|e| unavailable(&e))?.ok_or_else(used)?;
    if entry.operation != Operation::Put {
        return Err(used());
    }
    // The expected revision lets one of several requests win.
    if let Err(e) = bucket.delete_expect_revision(&key, Some(entry.revision)).await {
        tracing::warn!("a login link was not used up: {}", error_chain(&e));
        return Err(used());
    }
    let login: ConsoleLogin = serde_json::from_slice(&entry.value).map_err(|e| unavailable(&e))?;
    if now < login.expires_at { Ok(role) } else { Err(used()) }
}

/// Whether a text may be the token of a one-time link.
pub(crate) fn is_login_token(text: &str) -> bool {
    LoginRole::of_token(text).is_some_and(|role| is_token(role.prefix(), 0, text))
}

/// Whether a text is this prefix, a number of hex digits, and the random part of a token.
pub(crate) fn is_token(prefix: &str, digits: usize, text: &str) -> bool {
    let is_digit = |c: u8| c.is_ascii_hexdigit();
    text.strip_prefix(prefix).is_some_and(|rest| rest.len() == digits + 64 && rest.bytes().all(is_digit))
}

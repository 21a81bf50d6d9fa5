//! Links for people outside a project: each shows one process or callback until it ends. An entry of the bucket
//! [`CONSOLE_LOGINS`] under the SHA-256 of the link's token is a link that was not revoked.

use anyhow::{Context, ensure};
use async_nats::jetstream;
use contract::{
    ObjectId, Timestamp,
    console::{PORTAL_AGE, PortalLink, PortalTarget},
    secret::Secret,
    streams::CONSOLE_LOGINS,
};
use secrets::{TokenKey, api_key, new_sealing_key};
use service_kit::{clock, nats::error_chain};
use sha2::{Digest, Sha256};
use std::time::Duration;

use crate::{fault::Fault, login_link::is_token};

/// What every token begins with.
const PREFIX: &str = "lrp_";
const PURPOSE: &str = "portal link";

/// A portal link to make.
#[derive(Debug)]
pub struct NewPortalLink {
    /// The project.
    pub project_id: ObjectId,
    /// What it shows.
    pub target: PortalTarget,
    /// How long it is valid.
    pub age: Duration,
    /// The API key that makes it: the link ends with the key.
    pub key: Option<Secret>,
    /// Whether visitors may test callbacks and redeliver, with the key.
    pub may_act: bool,
}

/// Makes a portal link; its token. [`login_url`] makes the URL.
///
/// # Errors
/// The age is not allowed, a link to act with has no key, or the bucket cannot be written.
pub async fn create_portal_link(js: &jetstream::Context, new: NewPortalLink) -> anyhow::Result<String> {
    let NewPortalLink { project_id, target, age, key, may_act } = new;
    ensure!(!age.is_zero() && age <= PORTAL_AGE, "a portal link is valid for at most 7 days");
    let token = format!("{PREFIX}{}", hex::encode(rand::random::<[u8; 32]>()));
    let sealed_key = match (&key, may_act) {
        (_, false) => None,
        (Some(key), true) => Some(sealing_key(&token)?.seal(PURPOSE, rand::random(), key.expose().as_bytes())),
        (None, true) => anyhow::bail!("a portal link whose visitors may act needs an API key"),
    };
    let link = PortalLink {
        project_id,
        target,
        ends_at: clock::now().plus(age),
        key_sha256: key.map(|key| api_key::hash(key.expose())),
        sealed_key,
    };
    let entry = serde_json::to_vec(&link).context("cannot write the link as JSON")?;
    let bucket = js.get_key_value(CONSOLE_LOGINS).await.context("cannot find the bucket of links")?;
    bucket.create(api_key::hash(&token), entry.into()).await.context("cannot record the link")?;
    Ok(token)
}

/// Ends a portal link, given its URL or token.
///
/// # Errors
/// It is no portal link, or the bucket cannot be written.
pub async fn revoke_portal_link(js: &jetstream::Context, link: &str) -> anyhow::Result<()> {
    let token = token_in(link).context("this is not a portal link")?;
    let bucket = js.get_key_value(CONSOLE_LOGINS).await.context("cannot find the bucket of links")?;
    bucket.delete(api_key::hash(token)).await.context("cannot delete the link")
}

/// The token in a link's URL.
pub(crate) fn token_in(link: &str) -> Option<&str> {
    let link = link.trim();
    let token = link.split_once("?token=").map_or(link, |(_, token)| token);
    is_portal_token(token).then_some(token)
}

pub(crate) fn is_portal_token(text: &str) -> bool {
    is_token(PREFIX, text)
}

/// The link of a token, if it was not revoked and has not ended.
pub(crate) async fn find(js: &jetstream::Context, token: &str, now: Timestamp) -> Result<PortalLink, Fault> {
    let unavailable = |e: &(dyn std::error::Error + 'static)| {
        tracing::warn!("cannot read the bucket of links: {}", error_chain(e));
        Fault::Unavailable("The bucket of links cannot be read. Try again.".into())
    };
    let bucket = js.get_key_value(CONSOLE_LOGINS).await.map_err(|e| unavailable(&e))?;
    let entry = bucket.get(api_key::hash(token)).await.map_err(|e| unavailable(&e))?;
    let link = entry.and_then(|entry| serde_json::from_slice::<PortalLink>(&entry).ok());
    link.filter(|link| now < link.ends_at)
        .ok_or_else(|| Fault::Refused("This link has ended or was revoked. Ask its sender for a new one.".into()))
}

/// The API key that the link's visitors act with.
pub(crate) fn open_key(token: &str, link: &PortalLink) -> Option<Secret> {
    let clear = sealing_key(token).ok()?.open(PURPOSE, link.sealed_key.as_ref()?)?;
    std::str::from_utf8(&clear).ok().map(Secret::from)
}

/// The key that seals an API key for the holders of a token: readers of the bucket know the token's hash only.
fn sealing_key(token: &str) -> anyhow::Result<TokenKey> {
    let bytes = Sha256::digest(format!("{PURPOSE} key:{token}"));
    TokenKey::parse(&new_sealing_key(bytes.into())).map_err(|_| anyhow::anyhow!("the token is not a key"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::login_link::login_url;

    #[test]
    fn a_link_is_its_url_or_token() {
        let token = format!("{PREFIX}{}", "0a".repeat(32));
        assert_eq!(token_in(&login_url("https://console.example/", &token)), Some(token.as_str()));
        assert_eq!(token_in(&token), Some(token.as_str()));
        assert_eq!(token_in(&token.replace("lrp_", "lrc_")), None);
    }

    #[test]
    fn the_key_of_a_link_opens_with_its_token_only() {
        let sealed = sealing_key("lrp_1").unwrap().seal(PURPOSE, [7; 12], b"lr_key");
        let link = PortalLink {
            project_id: ObjectId::from_bytes([1; 12]),
            target: PortalTarget::CallbackId(ObjectId::from_bytes([2; 12])),
            ends_at: Timestamp::from_millis(1),
            key_sha256: None,
            sealed_key: Some(sealed),
        };
        assert_eq!(open_key("lrp_1", &link).unwrap().expose(), "lr_key");
        assert!(open_key("lrp_2", &link).is_none());
    }
}

//! Links for people outside a project: each shows one process or callback until it ends. An entry of the bucket
//! [`CONSOLE_LOGINS`] is a link that was not revoked. Its key is `{tag}.{SHA-256 of the token}`. The tag stands for the
//! project, so that the project's links can be listed. The token contains the tag, so that a link is found by one read.

use anyhow::{Context, bail, ensure};
use async_nats::jetstream::{self, kv::Store};
use contract::{
    ObjectId, Timestamp,
    console::{MAX_PORTAL_LINKS, OpenPortalLink, PORTAL_AGE, PortalLink, PortalTarget},
    key::ApiKey,
    secret::Secret,
    streams::{API_KEYS, CONSOLE_LOGINS},
};
use futures::{StreamExt, TryStreamExt};
use secrets::{TokenKey, api_key, new_sealing_key};
use service_kit::{clock, nats::error_chain};
use sha2::{Digest, Sha256};
use std::time::Duration;

use crate::{app::App, fault::Fault, login_link::is_token, visit_rate};

/// The prefix of every token.
const PREFIX: &str = "lrp_";
const PURPOSE: &str = "portal link";
/// How many hex digits of a token are the tag of its project.
const TAG_DIGITS: usize = 16;
/// How many hex digits of a token's hash name the link.
const ID_DIGITS: usize = 16;
/// How many links are read at once.
const READS: usize = 16;

/// A portal link to make.
#[derive(Debug)]
pub struct NewPortalLink {
    /// The project.
    pub project_id: ObjectId,
    /// What it shows.
    pub target: PortalTarget,
    /// How long it is valid.
    pub age: Duration,
    /// Who makes it, for people.
    pub made_by: String,
    /// The API key that makes it: the link ends with the key.
    pub key: Option<Secret>,
    /// Whether visitors may test callbacks and redeliver, with the key.
    pub may_act: bool,
}

/// Why a portal link was not made.
#[derive(Debug, thiserror::Error)]
pub enum PortalLinkError {
    /// The project has made as many links as it may.
    #[error("the project has made {0} portal links within 7 days, the maximum: try again later")]
    TooMany(usize),
    /// The link is not allowed, or the bucket cannot be written.
    #[error(transparent)]
    NotMade(#[from] anyhow::Error),
}

/// Makes a portal link, and returns its token. [`login_url`] makes the URL.
///
/// # Errors
/// The age is not allowed, a link whose visitors may act has no key, the project has made too many links, or the bucket
/// cannot be written.
pub async fn create_portal_link(js: &jetstream::Context, new: NewPortalLink) -> Result<String, PortalLinkError> {
    let project_id = new.project_id;
    let token = format!("{PREFIX}{}{}", tag(project_id), hex::encode(rand::random::<[u8; 32]>()));
    let entry = serde_json::to_vec(&sealed_link(new, &token)?).context("cannot write the link as JSON")?;
    let bucket = bucket(js).await?;
    let made = entries(&bucket, project_id).await?.len();
    if made >= MAX_PORTAL_LINKS {
        return Err(PortalLinkError::TooMany(made));
    }
    bucket.create(entry_key(&token), entry.into()).await.context("cannot record the link")?;
    Ok(token)
}

/// The entry of a link with this token.
fn sealed_link(new: NewPortalLink, token: &str) -> anyhow::Result<PortalLink> {
    let NewPortalLink { project_id, target, age, made_by, key, may_act } = new;
    ensure!(!age.is_zero() && age <= PORTAL_AGE, "a portal link is valid for at most 7 days");
    let sealed_key = match (&key, may_act) {
        (_, false) => None,
        (Some(key), true) => Some(sealing_key(token)?.seal(PURPOSE, rand::random(), key.expose().as_bytes())),
        (None, true) => bail!("a portal link whose visitors may act needs an API key"),
    };
    Ok(PortalLink {
        project_id,
        target,
        ends_at: clock::now().plus(age),
        made_by,
        key_sha256: key.map(|key| api_key::hash(key.expose())),
        sealed_key,
    })
}

/// The open links of a project, in the order in which they end.
///
/// # Errors
/// The buckets of links and keys cannot be read.
pub async fn list_portal_links(js: &jetstream::Context, project_id: ObjectId) -> anyhow::Result<Vec<OpenPortalLink>> {
    let keys = js.get_key_value(API_KEYS).await.context("cannot find the bucket of API keys")?;
    let (now, mut open) = (clock::now(), Vec::new());
    let bucket = bucket(js).await?;
    let entries = entries(&bucket, project_id).await?;
    for (id, link) in read(&bucket, entries, project_id).await? {
        if let Some(hash) = &link.key_sha256 {
            let key = keys.get(hash).await.context("cannot read an API key")?;
            let key = key.and_then(|key| serde_json::from_slice::<ApiKey>(&key).ok());
            if !key.is_some_and(|key| key.is_valid(now)) {
                continue;
            }
        }
        open.extend(listed(id, link, now));
    }
    Ok(sorted(open))
}

/// The open links of a project. Their API keys are checked in the console's cache. The links that are read count
/// towards the visitor's rate of pages.
pub(crate) async fn list(
    app: &App,
    visitor: &String,
    project_id: ObjectId,
    now: Timestamp,
) -> Result<Vec<OpenPortalLink>, Fault> {
    let unavailable = |e: anyhow::Error| {
        tracing::warn!("the portal links of a project cannot be read: {e:#}");
        Fault::Unavailable("The bucket of links cannot be read. Reload the page to try again.".into())
    };
    let bucket = app.broker()?.logins().await.map_err(|e| unavailable(e.into()))?;
    let keys = entries(bucket, project_id).await.map_err(unavailable)?;
    if !app.visit_rate.admits_entries(visitor, keys.len()) {
        return Err(visit_rate::fault());
    }
    let links = read(bucket, keys, project_id).await.map_err(unavailable)?;
    let is_valid = |hash: &String| app.keys.get(hash).is_some_and(|key| key.is_valid(now));
    let open = links.into_iter().filter(|(_, link)| link.key_sha256.as_ref().is_none_or(is_valid));
    Ok(sorted(open.filter_map(|(id, link)| listed(id, link, now)).collect()))
}

fn listed(id: String, link: PortalLink, now: Timestamp) -> Option<OpenPortalLink> {
    let PortalLink { target, ends_at, made_by, sealed_key, .. } = link;
    (now < ends_at).then(|| OpenPortalLink { id, target, may_act: sealed_key.is_some(), made_by, ends_at })
}

fn sorted(mut links: Vec<OpenPortalLink>) -> Vec<OpenPortalLink> {
    links.sort_by(|a, b| (a.ends_at, &a.id).cmp(&(b.ends_at, &b.id)));
    links
}

/// The links of a project under these keys of the bucket that were not revoked, with their ids. Some may have ended.
async fn read(bucket: &Store, keys: Vec<String>, project_id: ObjectId) -> anyhow::Result<Vec<(String, PortalLink)>> {
    let links = futures::stream::iter(keys).map(async |key| {
        let entry = bucket.get(&key).await.context("cannot read a link")?;
        let link = entry.and_then(|entry| serde_json::from_slice::<PortalLink>(&entry).ok());
        anyhow::Ok(link.map(|link| (id_of(&key), link)))
    });
    let links: Vec<_> = links.buffer_unordered(READS).try_collect().await?;
    Ok(links.into_iter().flatten().filter(|(_, link)| link.project_id == project_id).collect())
}

/// The keys of a project's entries in the bucket, including those of links that were revoked within [`PORTAL_AGE`].
async fn entries(bucket: &Store, project_id: ObjectId) -> anyhow::Result<Vec<String>> {
    let prefix = format!("$KV.{CONSOLE_LOGINS}.");
    let subjects = bucket.stream.info_with_subjects(format!("{prefix}{}.*", tag(project_id))).await;
    // Requests at the same moment may exceed the limit a little.
    let subjects = subjects.context("cannot list the links")?.take(2 * MAX_PORTAL_LINKS);
    let key = |(subject, _): (String, _)| subject.strip_prefix(&prefix).map(str::to_owned);
    subjects.try_filter_map(async |subject| Ok(key(subject))).try_collect().await.context("cannot list the links")
}

/// Revokes a portal link, given its URL or token, or, with a project, its id.
///
/// # Errors
/// There is no such link, or the bucket cannot be written.
pub async fn revoke_portal_link(
    js: &jetstream::Context,
    project_id: Option<ObjectId>,
    link: &str,
) -> anyhow::Result<()> {
    let bucket = bucket(js).await?;
    let key = match (token_in(link), project_id) {
        (Some(token), _) => Some(entry_key(token)),
        (None, Some(project_id)) => {
            entries(&bucket, project_id).await?.into_iter().find(|key| id_of(key) == link.trim())
        }
        (None, None) => None,
    };
    let key = key.context(
        "this is neither a portal link nor, with --project, the id of one: `leadctl console portal-links` lists them",
    )?;
    let open = bucket.get(&key).await.context("cannot read the link")?;
    ensure!(open.is_some(), "there is no such link: it was revoked, or has ended");
    bucket.delete(key).await.context("cannot delete the link")
}

async fn bucket(js: &jetstream::Context) -> anyhow::Result<Store> {
    js.get_key_value(CONSOLE_LOGINS).await.context("cannot find the bucket of links")
}

/// The digits that follow the prefix in the tokens of a project. They do not reveal the project's id.
fn tag(project_id: ObjectId) -> String {
    api_key::hash(&format!("{PURPOSE}s of {project_id}")).chars().take(TAG_DIGITS).collect()
}

/// The key of a link's entry.
fn entry_key(token: &str) -> String {
    let tag: String = token.chars().skip(PREFIX.len()).take(TAG_DIGITS).collect();
    format!("{tag}.{}", api_key::hash(token))
}

/// The id of the link with this token.
pub(crate) fn id(token: &str) -> String {
    id_of(&entry_key(token))
}

/// The id of the link whose entry has this key.
fn id_of(key: &str) -> String {
    key.chars().skip(TAG_DIGITS + 1).take(ID_DIGITS).collect()
}

/// The token in a link's URL.
pub(crate) fn token_in(link: &str) -> Option<&str> {
    let link = link.trim();
    let token = link.split_once("?token=").map_or(link, |(_, token)| token);
    is_portal_token(token).then_some(token)
}

pub(crate) fn is_portal_token(text: &str) -> bool {
    is_token(PREFIX, TAG_DIGITS, text)
}

/// The link of a token, if it was not revoked, has not ended, and its API key is valid.
pub(crate) async fn find(app: &App, token: &str, now: Timestamp) -> Result<PortalLink, Fault> {
    let unavailable = |e: &(dyn std::error::Error + 'static)| {
        tracing::warn!("cannot read the bucket of links: {}", error_chain(e));
        Fault::Unavailable("The bucket of links cannot be read. Try again.".into())
    };
    let bucket = app.broker()?.logins().await.map_err(|e| unavailable(&e))?;
    let entry = bucket.get(entry_key(token)).await.map_err(|e| unavailable(&e))?;
    let link = entry.and_then(|entry| serde_json::from_slice::<PortalLink>(&entry).ok());
    let refused = |text: &str| Fault::Refused(format!("{text} Ask its sender for a new one."));
    let link = link.filter(|link| now < link.ends_at);
    let link = link.ok_or_else(|| refused("This link has ended or was revoked."))?;
    let has_key = link.key_sha256.as_ref().is_none_or(|hash| app.keys.get(hash).is_some_and(|key| key.is_valid(now)));
    match has_key {
        true => Ok(link),
        false if app.keys.is_complete() => {
            Err(refused("This link has ended: the API key that made it was revoked or has expired."))
        }
        false => Err(Fault::Unavailable("The console is starting. Try again in a moment.".into())),
    }
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
        let token = format!("{PREFIX}{}", "0a".repeat(40));
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
            made_by: "operator".into(),
            key_sha256: None,
            sealed_key: Some(sealed),
        };
        assert_eq!(open_key("lrp_1", &link).unwrap().expose(), "lr_key");
        assert!(open_key("lrp_2", &link).is_none());
    }
}

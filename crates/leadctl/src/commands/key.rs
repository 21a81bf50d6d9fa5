//! `leadctl key`. leadctl generates a key and prints it once; only its hash is sent and stored.

use anyhow::Context;
use clap::Subcommand;
use contract::{
    ObjectId, Timestamp,
    key::{ApiKey, Scope},
    rpc::{CreateKey, ListKeys, RevokeKey},
};
use secrets::api_key;
use serde::Serialize;
use service_kit::clock;

use super::paging::Paging;
use crate::{arguments::InProject, clients::admin::Admin, output};

/// API keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Create an API key and print it, once.
    #[command(after_help = "Example:\n  leadctl key create --project 6b0426971c73026dafa27e40 --name crm \\\n    \
                      --scope leads:write --expires-in 90d")]
    Create {
        /// A name that says what the key is for.
        #[arg(long)]
        name: String,
        /// A permission: leads:read, leads:write, leads:erase, calls:write, config:read or config:write; can be
        /// repeated. Default: the first two.
        #[arg(long = "scope")]
        scopes: Vec<Scope>,
        /// Lifetime, e.g. 90d. By default the key does not expire.
        #[arg(long, value_name = "DURATION")]
        expires_in: Option<humantime::Duration>,
        #[command(flatten)]
        scope: InProject,
    },
    /// Revoke a key: the gateways reject it within a second.
    #[command(after_help = "Example:\n  leadctl key revoke 6b0426971c73026dafa27e40")]
    Revoke {
        /// The key's id, as shown by `key list`.
        key_id: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// List a project's keys, the oldest first; with --json one object per line.
    #[command(after_help = "Example:\n  leadctl key list --project 6b04…")]
    List {
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CreatedKey<'a> {
    api_key: &'a str,
    #[serde(flatten)]
    key: &'a ApiKey,
}

impl Key {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create { name, scopes, expires_in, scope: InProject { project_id, admin } } => {
                let secret = api_key::generate(rand::random());
                let scopes = if scopes.is_empty() { Scope::DEFAULT.into() } else { scopes.into_iter().collect() };
                let expires_at = expires_in.map(|after| clock::now().plus(after.into()));
                let query = CreateKey { project_id, name, sha256: api_key::hash(&secret), scopes, expires_at };
                let key = admin.request(&query).await.context("the key was not created")?;
                output::show(admin.json, &CreatedKey { api_key: &secret, key: &key }, |_| {
                    output::say(&secret);
                    output::field("keyId", key.key_id);
                    output::field("scopes", scopes_of(&key));
                    output::field("expires", key.expires_at.map_or("never".to_owned(), Timestamp::to_iso));
                    output::say("Save the key now: it is not stored and cannot be shown again.");
                })
            }
            Self::Revoke { key_id, admin } => {
                let show = |key: &ApiKey| output::say(format_args!("key {key_id} ({}) is revoked", key.name));
                admin.show(&RevokeKey { key_id, project_id: None }, show).await
            }
            Self::List { paging, scope: InProject { project_id, admin } } => {
                let head = ["KEY", "STATUS", "LAST USED", "SCOPES", "NAME"];
                let query = |cursor, limit| ListKeys { project_id, key_id: None, cursor, limit };
                let row = |key: &ApiKey| {
                    let last_used = key.last_used_at.map_or("never".to_owned(), output::minute);
                    [key.key_id.to_string(), status(key).to_owned(), last_used, scopes_of(key), key.name.clone()]
                };
                paging.print(&admin, "no keys", head, query, row).await
            }
        }
    }
}

fn scopes_of(key: &ApiKey) -> String {
    key.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",")
}

fn status(key: &ApiKey) -> &'static str {
    match key {
        ApiKey { revoked_at: Some(_), .. } => "revoked",
        key if !key.is_valid(clock::now()) => "expired",
        _ => "valid",
    }
}

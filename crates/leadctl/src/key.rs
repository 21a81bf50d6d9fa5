//! `leadctl key`. A key is made here and shown once: only its hash travels.

use anyhow::Context;
use clap::Subcommand;
use contract::{
    ObjectId, Timestamp,
    key::{ApiKey, Scope},
    rpc::{self, CreateKey, Keys, ListKeys, RevokeKey},
};
use secrets::api_key;
use serde::Serialize;
use service_kit::clock;

use crate::{admin::Admin, output};

/// API keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Make an API key and print it, once.
    #[command(after_help = "Example:\n  leadctl key create --project 6b0426971c73026dafa27e40 --name crm \\\n    \
                      --scope leads:write --expires-in 90d")]
    Create {
        /// The project that the key is for.
        #[arg(long)]
        project: ObjectId,
        /// What it is for.
        #[arg(long)]
        name: String,
        /// What it may do: leads:read, leads:write, config:read or config:write; may be given several times. The first two
        /// by default.
        #[arg(long = "scope")]
        scopes: Vec<Scope>,
        /// After how long it expires, e.g. 90d. Never by default.
        #[arg(long, value_name = "DURATION")]
        expires_in: Option<humantime::Duration>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Revoke a key: the gateways refuse it within a second.
    #[command(after_help = "Example:\n  leadctl key revoke 6b0426971c73026dafa27e40")]
    Revoke {
        /// The key's id, as `key list` shows it.
        key_id: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// List a project's keys.
    #[command(after_help = "Example:\n  leadctl key list --project 6b04…")]
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Created<'a> {
    api_key: &'a str,
    #[serde(flatten)]
    key: &'a ApiKey,
}

impl Key {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create { project, name, scopes, expires_in, admin } => {
                let secret = api_key::generate(rand::random());
                let scopes = if scopes.is_empty() { Scope::DEFAULT.into() } else { scopes.into_iter().collect() };
                let expires_at = expires_in.map(|after| clock::now().plus(after.into()));
                let query = CreateKey { project_id: project, name, sha256: api_key::hash(&secret), scopes, expires_at };
                let key: ApiKey = admin.call(rpc::KEY_CREATE, &query).await.context("the key was not made")?;
                if admin.json {
                    return output::json(&Created { api_key: &secret, key: &key });
                }
                output::say(secret);
                output::field("keyId", key.key_id);
                output::field("scopes", scopes_of(&key));
                output::field("expires", key.expires_at.map_or("never".to_owned(), Timestamp::to_iso));
                output::say("Keep the key now: it is not stored, and is not shown again.");
            }
            Self::Revoke { key_id, admin } => {
                let key: ApiKey = admin.call(rpc::KEY_REVOKE, &RevokeKey { key_id }).await?;
                if admin.json {
                    return output::json(&key);
                }
                output::say(format_args!("key {key_id} ({}) is revoked", key.name));
            }
            Self::List { project, admin } => {
                let keys: Keys = admin.call(rpc::KEY_LIST, &ListKeys { project_id: project }).await?;
                if admin.json {
                    return output::json(&keys);
                }
                if keys.is_empty() {
                    output::say("no keys");
                }
                for key in &keys {
                    output::say(format_args!(
                        "{}  {:<12} {:<24} {}",
                        key.key_id,
                        status(key),
                        scopes_of(key),
                        key.name
                    ));
                }
            }
        }
        Ok(())
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

//! `leadctl console`.

use anyhow::{Context, bail, ensure};
use async_nats::{Client, jetstream};
use clap::{Args, Subcommand};
use console::{LoginRole, NewPortalLink};
use contract::{
    ObjectId, Timestamp,
    console::{OpenPortalLink, PortalTarget},
    key::{ApiKey, Scope},
    rpc::{GetProcess, ListCallbacks, ProcessSelector},
    secret::Secret,
    streams::API_KEYS,
};
use secrets::api_key;
use serde::Serialize;
use service_kit::{clock, nats};

use crate::{
    arguments::InProject,
    clients::admin::{self, Admin},
    output,
};

/// The operator console.
#[derive(Debug, Subcommand)]
pub(crate) enum Console {
    /// Print a link that signs in to the console, once and within an hour. Operators and viewers see every project; a
    /// viewer only looks.
    #[command(after_help = "Examples:\n  leadctl console token --url https://console.example.com\n  \
                      leadctl console token --role viewer")]
    Token {
        /// Who signs in with the link.
        #[arg(long, value_enum, default_value = "operator")]
        role: LoginRole,
        /// The URL of the console.
        #[arg(long = "url", env = "LEADRELAY_CONSOLE_URL", default_value = "http://127.0.0.1:8090")]
        url: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Print a link that shows one process or callback to people outside the project, until it ends.
    #[command(after_help = "Example:\n  leadctl console portal-link --project 6b04… --callback 6b05… \\\n    \
                      --url https://console.example.com --valid-for 3d")]
    PortalLink {
        /// The URL of the console.
        #[arg(long = "url", env = "LEADRELAY_CONSOLE_URL", default_value = "http://127.0.0.1:8090")]
        url: String,
        #[command(flatten)]
        target: Target,
        /// How long it is valid, at most 7d.
        #[arg(long, value_name = "DURATION", default_value = "24h")]
        valid_for: humantime::Duration,
        /// Visitors may send tests and redeliver, with the API key of the option --api-key.
        #[arg(long, requires = "api_key")]
        may_act: bool,
        /// An API key of the project: the link ends when it is revoked. With --may-act it needs leads:write and
        /// config:write.
        #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true)]
        api_key: Option<Secret>,
        #[command(flatten)]
        scope: InProject,
    },
    /// List a project's open portal links: what they show, who made them, and when they end.
    #[command(after_help = "Example:\n  leadctl console portal-links --project 6b04…")]
    PortalLinks {
        #[command(flatten)]
        scope: InProject,
    },
    /// End a portal link.
    #[command(
        after_help = "Examples:\n  leadctl console revoke-portal-link 'https://console.example.com/login?token=lrp_…'\n  \
                      leadctl console revoke-portal-link 3f09ac… --project 6b04…"
    )]
    RevokePortalLink {
        /// The link; or its id, as shown by `console portal-links`.
        link: String,
        /// The project; needed with an id.
        #[arg(long = "project", value_name = "ID")]
        project_id: Option<ObjectId>,
        #[command(flatten)]
        admin: Admin,
    },
}

/// What a portal link shows.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Target {
    /// A process: its callbacks, and the outcomes of its updates.
    #[arg(long = "process", value_name = "ID")]
    process_id: Option<ObjectId>,
    /// A callback.
    #[arg(long = "callback", value_name = "ID")]
    callback_id: Option<ObjectId>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Login {
    url: String,
}

#[derive(Serialize)]
struct RevokedPortalLink {
    link: String,
}

impl Console {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Token { role, url, admin } => {
                let client = admin.connect().await?;
                let token = console::create_login(&nats::jetstream(&client), role).await.context("no link was made")?;
                show(&admin, console::login_url(&url, &token))
            }
            Self::PortalLink {
                url,
                target,
                valid_for,
                may_act,
                api_key: key,
                scope: InProject { project_id, admin },
            } => {
                let target = match (target.process_id, target.callback_id) {
                    (Some(id), _) => PortalTarget::ProcessId(id),
                    (None, Some(id)) => PortalTarget::CallbackId(id),
                    (None, None) => bail!("--process or --callback is required"),
                };
                let client = admin.connect().await?;
                check_target(&client, project_id, target).await.context("no link was made")?;
                let js = nats::jetstream(&client);
                if let Some(key) = &key {
                    let key = find_key(&js, key).await.context("no link was made")?;
                    check_key(key.as_ref(), project_id, may_act, clock::now()).context("no link was made")?;
                }
                let (age, made_by) = (valid_for.into(), "leadctl".to_owned());
                let link = NewPortalLink { project_id, target, age, made_by, key, may_act };
                let made = console::create_portal_link(&js, link).await;
                show(&admin, console::login_url(&url, &made.context("no link was made")?))
            }
            Self::PortalLinks { scope: InProject { project_id, admin } } => {
                let client = admin.connect().await?;
                let links = console::list_portal_links(&nats::jetstream(&client), project_id).await?;
                output::show(admin.json, &links, |links| {
                    let head = ["LINK", "SHOWS", "VISITORS MAY", "UNTIL", "MADE BY"];
                    output::list("no open portal links", head, links, row);
                })
            }
            Self::RevokePortalLink { link, project_id, admin } => {
                let client = admin.connect().await?;
                let revoked = console::revoke_portal_link(&nats::jetstream(&client), project_id, &link).await;
                revoked.context("no link was revoked")?;
                let revoked = RevokedPortalLink { link };
                output::show(admin.json, &revoked, |_| output::say("The link shows nothing any more."))
            }
        }
    }
}

fn row(link: &OpenPortalLink) -> [String; 5] {
    let shows = match link.target {
        PortalTarget::ProcessId(id) => format!("process {id}"),
        PortalTarget::CallbackId(id) => format!("callback {id}"),
    };
    let may = if link.may_act { "test, redeliver" } else { "only look" };
    [link.id.clone(), shows, may.to_owned(), output::minute(link.ends_at), link.made_by.clone()]
}

/// The API key with this text.
async fn find_key(js: &jetstream::Context, key: &Secret) -> anyhow::Result<Option<ApiKey>> {
    let keys = js.get_key_value(API_KEYS).await.context("cannot find the bucket of API keys")?;
    let entry = keys.get(api_key::hash(key.expose())).await.context("cannot read the API key")?;
    entry.map(|entry| serde_json::from_slice(&entry).context("cannot read the API key")).transpose()
}

/// Refuses a key with which the link would have ended at once, or with which its visitors could not act.
fn check_key(key: Option<&ApiKey>, project_id: ObjectId, may_act: bool, now: Timestamp) -> anyhow::Result<()> {
    let key = key.filter(|key| key.is_valid(now)).with_context(|| {
        format!("the API key is unknown, revoked or expired: `leadctl key list --project {project_id}` lists the keys")
    })?;
    ensure!(
        key.project_id == project_id,
        "the API key belongs to the project {}: use a key of the project {project_id}, or none",
        key.project_id
    );
    let needed: &[Scope] = if may_act { &[Scope::LeadsWrite, Scope::ConfigWrite] } else { &[] };
    let missing = needed.iter().find(|scope| !key.scopes.contains(scope));
    match missing {
        None => Ok(()),
        Some(scope) => bail!("--may-act needs an API key with the scope {}, which this key lacks", scope.as_str()),
    }
}

/// Refuses a link that would show nothing.
async fn check_target(client: &Client, project_id: ObjectId, target: PortalTarget) -> anyhow::Result<()> {
    match target {
        PortalTarget::ProcessId(id) => {
            let query = GetProcess { project_id, process: ProcessSelector::Id(id) };
            admin::request(client, &query).await.with_context(|| {
                format!("cannot find the process {id}: `leadctl process list --project {project_id}` lists them")
            })?;
        }
        PortalTarget::CallbackId(id) => {
            let callbacks = admin::request(client, &ListCallbacks { project_id, details: false }).await?;
            ensure!(
                callbacks.iter().any(|callback| callback.callback_id == id),
                "the project has no callback {id}: `leadctl callback list --project {project_id}` lists them"
            );
        }
    }
    Ok(())
}

fn show(admin: &Admin, url: String) -> anyhow::Result<()> {
    output::show(admin.json, &Login { url }, |login| output::say(&login.url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_needs_a_valid_key_of_its_project_with_the_scopes_to_act() {
        let (project_id, now) = (ObjectId::from_bytes([1; 12]), Timestamp::from_millis(1));
        let key = ApiKey {
            key_id: ObjectId::from_bytes([2; 12]),
            project_id,
            name: "crm".into(),
            scopes: [Scope::LeadsWrite].into(),
            created_at: now,
            expires_at: None,
            revoked_at: None,
            last_used_at: None,
        };
        let error = |key: Option<&ApiKey>, may_act| match check_key(key, project_id, may_act, now) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };

        assert_eq!(error(Some(&key), false), "");
        assert!(error(Some(&key), true).contains("config:write"));
        let acting = ApiKey { scopes: [Scope::LeadsWrite, Scope::ConfigWrite].into(), ..key.clone() };
        assert_eq!(error(Some(&acting), true), "");
        let foreign = ApiKey { project_id: ObjectId::from_bytes([3; 12]), ..key.clone() };
        assert!(error(Some(&foreign), false).contains("030303030303030303030303"));
        let revoked = ApiKey { revoked_at: Some(now), ..key };
        for unusable in [Some(&revoked), None] {
            assert!(error(unusable, false).contains("unknown, revoked or expired"));
        }
    }
}

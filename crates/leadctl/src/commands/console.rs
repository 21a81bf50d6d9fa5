//! `leadctl console`.

use anyhow::{Context, ensure};
use async_nats::Client;
use clap::{Args, Subcommand};
use console::{LoginRole, NewPortalLink};
use contract::{
    ObjectId,
    console::{OpenPortalLink, PortalTarget},
    rpc::{GetProcess, ListCallbacks, ProcessSelector},
    secret::Secret,
};
use serde::Serialize;
use service_kit::nats;

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
                    (None, None) => anyhow::bail!("--process or --callback is required"),
                };
                let client = admin.connect().await?;
                check_target(&client, project_id, target).await.context("no link was made")?;
                let (age, made_by) = (valid_for.into(), "leadctl".to_owned());
                let link = NewPortalLink { project_id, target, age, made_by, key, may_act };
                let made = console::create_portal_link(&nats::jetstream(&client), link).await;
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

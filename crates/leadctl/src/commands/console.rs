//! `leadctl console`.

use anyhow::Context;
use clap::{Args, Subcommand};
use console::NewPortalLink;
use contract::{ObjectId, console::PortalTarget, secret::Secret};
use serde::Serialize;
use service_kit::nats;

use crate::{arguments::InProject, clients::admin::Admin, output};

/// The operator console.
#[derive(Debug, Subcommand)]
pub(crate) enum Console {
    /// Print a link that signs an operator in to the console, once and within an hour. An operator sees every project.
    #[command(after_help = "Example:\n  leadctl console token --url https://console.example.com")]
    Token {
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
        /// An API key of the project: the link ends when it is revoked. With --may-act it needs leads:write and config:write.
        #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true)]
        api_key: Option<Secret>,
        #[command(flatten)]
        scope: InProject,
    },
    /// End a portal link.
    #[command(
        after_help = "Example:\n  leadctl console revoke-portal-link 'https://console.example.com/login?token=lrp_…'"
    )]
    RevokePortalLink {
        /// The link.
        link: String,
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

impl Console {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Token { url, admin } => {
                let client = admin.connect().await?;
                let token = console::create_login(&nats::jetstream(&client)).await.context("no link was made")?;
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
                let link = NewPortalLink { project_id, target, age: valid_for.into(), key, may_act };
                let client = admin.connect().await?;
                let made = console::create_portal_link(&nats::jetstream(&client), link).await;
                show(&admin, console::login_url(&url, &made.context("no link was made")?))
            }
            Self::RevokePortalLink { link, admin } => {
                let client = admin.connect().await?;
                console::revoke_portal_link(&nats::jetstream(&client), &link).await.context("no link was revoked")?;
                output::say("The link shows nothing any more.");
                Ok(())
            }
        }
    }
}

fn show(admin: &Admin, url: String) -> anyhow::Result<()> {
    output::show(admin.json, &Login { url }, |login| output::say(&login.url))
}

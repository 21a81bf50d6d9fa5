//! `leadctl console`.

use anyhow::Context;
use clap::Subcommand;
use serde::Serialize;
use service_kit::nats;

use crate::{clients::admin::Admin, output};

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
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Login {
    url: String,
}

impl Console {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self::Token { url, admin } = self;
        let client = admin.connect().await?;
        let token = console::create_login(&nats::jetstream(&client)).await.context("no link was made")?;
        let login = Login { url: console::login_url(&url, &token) };
        output::show(admin.json, &login, |login| output::say(&login.url))
    }
}

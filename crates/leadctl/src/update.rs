//! `leadctl update`: the gateway's HTTP API, from the command line.

use std::{collections::BTreeMap, process::ExitCode};

use clap::{Args, Subcommand};
use contract::ObjectId;
use serde::Deserialize;

use crate::{gateway_client::Gateway, output, send::SendUpdate, story::Found, watch::watch};

/// Updates.
#[derive(Debug, Subcommand)]
pub(crate) enum Update {
    Send(Box<SendUpdate>),
    /// Tell an update's story: what was asked, what came of it, and every attempt to tell the callbacks.
    #[command(after_help = "Example:\n  leadctl update get 6b0426971c73026dafa27e40")]
    Get {
        /// The update.
        update_id: ObjectId,
        #[command(flatten)]
        api: Api,
    },
    /// Watch an update until it is decided and every callback was told or given up on. Exits with 0 if it succeeded and all
    /// were told, 5 if it failed, 6 if a callback was given up on, 7 if time ran out.
    #[command(after_help = "Example:\n  leadctl update watch 6b0426971c73026dafa27e40 --timeout 10s && echo told")]
    Watch {
        /// The update.
        update_id: ObjectId,
        /// How long to watch at most.
        #[arg(long, default_value = "60s", value_name = "DURATION")]
        timeout: humantime::Duration,
        #[command(flatten)]
        api: Api,
    },
}

/// How to reach the gateway.
#[derive(Debug, Args)]
pub(crate) struct Api {
    /// Where the gateway is.
    #[arg(long, env = "LEADRELAY_GATEWAY_URL", default_value = "http://127.0.0.1:8080")]
    pub(crate) gateway_url: String,
    /// The API key.
    #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true)]
    pub(crate) api_key: String,
    /// Print JSON, for programs.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The answer to an update that is in the log.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Accepted {
    pub(crate) update_id: ObjectId,
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    /// Where it was waited for, and came in time.
    pub(crate) outcome: Option<Outcome>,
}

/// What became of it, as far as it is told here.
#[derive(Deserialize)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    pub(crate) error: Option<String>,
}

impl Update {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Send(send) => return send.run().await,
            Self::Get { update_id, api } => {
                let gateway = Gateway::new(&api.gateway_url, &api.api_key)?;
                let answer = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
                let found: Found = answer.read()?;
                if api.json {
                    output::say(&answer.body);
                } else {
                    output::say(found.data.tell(&BTreeMap::new()));
                }
            }
            Self::Watch { update_id, timeout, api } => {
                let gateway = Gateway::new(&api.gateway_url, &api.api_key)?;
                return watch(&gateway, update_id, timeout.into(), api.json).await;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

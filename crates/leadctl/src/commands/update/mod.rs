//! `leadctl update`: sends and follows updates over the HTTP API.

pub(crate) mod send;
mod watch;

use std::{collections::BTreeMap, process::ExitCode};

use clap::Subcommand;
use contract::ObjectId;
use http_api::TimelineResponse;

use self::{send::SendUpdate, watch::watch};
use crate::{
    arguments::GatewayArgs,
    output::{self, timeline},
};

/// Updates.
#[derive(Debug, Subcommand)]
pub(crate) enum Update {
    Send(Box<SendUpdate>),
    /// Show an update's timeline: the request, its outcome, and every delivery attempt.
    #[command(after_help = "Example:\n  leadctl update get 6b0426971c73026dafa27e40")]
    Get {
        /// The update.
        update_id: ObjectId,
        #[command(flatten)]
        gateway: GatewayArgs,
    },
    /// Watch an update until it is decided and every delivery is delivered or exhausted. Exits with 0 if it succeeded and was
    /// delivered, 5 if it failed, 6 if a delivery is exhausted, 7 after the timeout.
    #[command(after_help = "Example:\n  leadctl update watch 6b0426971c73026dafa27e40 --timeout 10s && echo delivered")]
    Watch {
        /// The update.
        update_id: ObjectId,
        /// How long to watch.
        #[arg(long, default_value = "60s", value_name = "DURATION")]
        timeout: humantime::Duration,
        #[command(flatten)]
        gateway: GatewayArgs,
    },
}

impl Update {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Send(send) => return send.run().await,
            Self::Get { update_id, gateway } => {
                let response = gateway.client()?.get(&format!("/api/v1/updates/{update_id}")).await?;
                let TimelineResponse { data, .. } = response.json()?;
                if gateway.json {
                    output::json_text(&response.body);
                } else {
                    output::say(timeline::render(&data, &BTreeMap::new()));
                }
            }
            Self::Watch { update_id, timeout, gateway } => {
                return watch(&gateway.client()?, update_id, timeout.into(), gateway.json).await;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

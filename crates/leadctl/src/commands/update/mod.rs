//! `leadctl update`: sends and follows updates over the HTTP API.

pub(crate) mod send;
mod watch;

use std::{collections::BTreeMap, process::ExitCode};

use clap::{Args, Subcommand, ValueEnum};
use contract::{
    ObjectId, Timestamp,
    rpc::{FindUpdates, FoundUpdate},
};
use http_api::TimelineResponse;

use self::{send::SendUpdate, watch::watch};
use crate::{
    arguments::{GatewayArgs, InProject, parse_since},
    commands::{lead::update_row, paging::Paging},
    output::{self, escape::escaped, timeline},
};

/// Updates.
#[derive(Debug, Subcommand)]
pub(crate) enum Update {
    Send(Box<SendUpdate>),
    /// List a project's decided updates and call events, newest first.
    #[command(
        after_help = "Examples:\n  leadctl update list --project 6b04… --status failed --code call_in_progress\n  \
                            leadctl update list --project 6b04… --key 6b05… \\\n    \
                            --from 2026-01-12T10:00:00Z --to 2026-01-12T10:05:00Z"
    )]
    List(Box<ListUpdates>),
    /// Show an update's timeline: the request, its outcome, and every delivery attempt.
    #[command(after_help = "Example:\n  leadctl update get 6b0426971c73026dafa27e40")]
    Get {
        /// The update.
        update_id: ObjectId,
        #[command(flatten)]
        gateway: GatewayArgs,
    },
    /// Watch an update until it is decided and every delivery is delivered or exhausted. Exits with 0 if it succeeded
    /// and was delivered, 5 if it failed, 6 if a delivery is exhausted, 7 after the timeout. A callback that was added
    /// less than a day after the update, and has no delivery of it, counts as pending.
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

#[derive(Debug, Args)]
pub(crate) struct ListUpdates {
    /// Only updates with this outcome.
    #[arg(long)]
    status: Option<Status>,
    /// Only updates that failed with this code.
    #[arg(long)]
    code: Option<String>,
    /// Only updates to leads of this process.
    #[arg(long)]
    process: Option<ObjectId>,
    /// Only updates of this API key.
    #[arg(long)]
    key: Option<ObjectId>,
    /// Only updates that name this user.
    #[arg(long)]
    user: Option<String>,
    /// Only updates made since this time, or this long ago, e.g. 1h; by default the last 24 hours. At most 31 days.
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    from: Option<Timestamp>,
    /// Only updates made before this time, or this long ago.
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    to: Option<Timestamp>,
    #[command(flatten)]
    paging: Paging,
    #[command(flatten)]
    scope: InProject,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Status {
    Succeeded,
    Failed,
}

impl ListUpdates {
    async fn run(self) -> anyhow::Result<()> {
        let Self { status, code, process, key, user, from, to, paging, scope: InProject { project_id, admin } } = self;
        let query = |cursor, limit| FindUpdates {
            project_id,
            from,
            to,
            success: status.map(|status| matches!(status, Status::Succeeded)),
            error_code: code.clone(),
            process_id: process,
            api_key_id: key,
            user_id: user.clone(),
            cursor,
            limit,
        };
        let head = ["UPDATE", "KIND", "OUTCOME", "VERSION", "APPLIED", "STATE", "USER", "ERROR", "LEAD"];
        paging.print(&admin, "no updates", head, query, row).await
    }
}

fn row(update: &FoundUpdate) -> [String; 9] {
    let [id, kind, outcome, version, at, state, by, error] = update_row(&update.entry);
    let reference = || update.reference_id.as_deref().map(escaped).unwrap_or_default();
    [id, kind, outcome, version, at, state, by, error, update.lead_id.map_or_else(reference, |lead| lead.to_string())]
}

impl Update {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Send(send) => return send.run().await,
            Self::List(list) => list.run().await?,
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

//! `leadctl update`: the gateway's HTTP API, from the command line.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use contract::{JsonObject, ObjectId, rpc::UpdateStatus};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::{
    gateway_client::Gateway,
    output,
    story::{Found, status},
    watch::watch,
};

/// How long `send` waits for the outcome before it says that the update is pending.
const OUTCOME: Duration = Duration::from_secs(5);

/// Updates.
#[derive(Debug, Subcommand)]
pub(crate) enum Update {
    /// Send an update, and say what became of it if that is known within five seconds.
    #[command(
        after_help = "Example:\n  leadctl update send --lead-id 6b0426971c73026dafa27e40 --target-state interested \\\n    \
                      --metadata '{\"make\":\"Toyota\"}'"
    )]
    Send {
        #[command(flatten)]
        body: Body,
        #[command(flatten)]
        api: Api,
    },
    /// Tell an update's story: what was asked, what came of it, and every attempt to tell the callbacks.
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
    gateway_url: String,
    /// The API key.
    #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true)]
    api_key: String,
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
}

/// What to change of which lead.
#[derive(Debug, Args, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Body {
    /// The lead.
    #[arg(long, required_unless_present = "reference_id")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lead_id: Option<ObjectId>,
    /// The lead's external id; needs --process-id and --project-id.
    #[arg(long, requires = "process_id", requires = "project_id")]
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    process_id: Option<ObjectId>,
    /// The key's project.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    project_id: Option<ObjectId>,
    /// Members to merge into the lead's metadata, a JSON object.
    #[arg(long, value_name = "JSON", value_parser = object)]
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<JsonObject>,
    /// The lead's new name.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The state to move the lead to.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    target_state: Option<String>,
    /// Why, for states that take a disposition.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    disposition: Option<String>,
    /// Who changes the lead, for the audit trail.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
}

fn object(text: &str) -> Result<JsonObject, String> {
    JsonObject::from_text(text.trim().to_owned()).map_err(|e| e.to_string())
}

/// The answer to an update that is in the log.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Accepted {
    pub(crate) update_id: ObjectId,
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sent {
    update_id: ObjectId,
    status: UpdateStatus,
    warnings: Vec<String>,
}

impl Update {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Send { body, api } => {
                let gateway = Gateway::new(&api.gateway_url, &api.api_key)?;
                let Accepted { update_id, warnings } = gateway.post("/api/v1/leads/update", &body).await?.read()?;
                let status = outcome(&gateway, update_id).await?;
                if api.json {
                    output::json(&Sent { update_id, status, warnings })?;
                } else {
                    output::say(format_args!("{update_id} {}", self::status(status)));
                    for warning in warnings {
                        output::field("warning", warning);
                    }
                }
            }
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

/// Where the update stands once it is decided, or after a while. A key that may not read is told "pending".
async fn outcome(gateway: &Gateway, update_id: ObjectId) -> anyhow::Result<UpdateStatus> {
    let deadline = Instant::now() + OUTCOME;
    loop {
        let answer = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
        // It is accepted: that it cannot be asked after is no failure.
        let status = answer.read().map_or(UpdateStatus::Pending, |found: Found| found.data.status);
        if status != UpdateStatus::Pending || answer.status.is_client_error() || Instant::now() > deadline {
            return Ok(status);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

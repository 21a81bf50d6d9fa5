//! `leadctl lead`: leads as they stand, and what became of them.

use clap::{Args, Subcommand};
use contract::{
    ObjectId, Timestamp,
    rpc::{self, Cursor, GetLead, GetLeadHistory, HistoryEntry, Lead as Found, ListLeads, Page},
};

use crate::{
    admin::Admin,
    output,
    pages::{self, Paging},
    printable::line,
};

/// Leads.
#[derive(Debug, Subcommand)]
pub(crate) enum Lead {
    /// Show a lead.
    #[command(after_help = "Examples:\n  leadctl lead get --project 6b04… 696102a4b8c1d2e3f4a5b6c7\n  \
                            leadctl lead get --project 6b04… --process 6b05… --reference-id AB123456789")]
    Get {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        admin: Admin,
    },
    /// List a project's leads, the newest first.
    #[command(
        after_help = "Example:\n  leadctl lead list --project 6b04… --state interested --updated-since 1d --json"
    )]
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// Only of this process.
        #[arg(long)]
        process: Option<ObjectId>,
        /// Only in this state.
        #[arg(long)]
        state: Option<String>,
        /// Only those that changed since: a time, or how long ago, e.g. 1d.
        #[arg(long, value_name = "TIME", value_parser = pages::since)]
        updated_since: Option<Timestamp>,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        admin: Admin,
    },
    /// List a lead's updates, the last first: who changed what, and what was refused.
    #[command(after_help = "Example:\n  leadctl lead history --project 6b04… 696102a4b8c1d2e3f4a5b6c7")]
    History {
        /// The lead.
        lead_id: ObjectId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        admin: Admin,
    },
}

/// Which lead.
#[derive(Debug, Args)]
pub(crate) struct Address {
    /// The lead.
    #[arg(required_unless_present = "reference_id", conflicts_with = "reference_id")]
    lead_id: Option<ObjectId>,
    /// Or its external id.
    #[arg(long, requires = "process")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long, requires = "reference_id")]
    process: Option<ObjectId>,
}

impl Lead {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Get { project, address: Address { lead_id, reference_id, process }, admin } => {
                let query = GetLead { project_id: project, lead_id, reference_id, process_id: process };
                let lead: Found = admin.call(rpc::LEAD_GET, &query).await?;
                if admin.json {
                    return output::json(&lead);
                }
                show(&lead);
                Ok(())
            }
            Self::List { project, process, state, updated_since, paging, admin } => {
                let nats = admin.connect().await?;
                let ask = async |cursor: Option<Cursor>, limit: u32| {
                    let (project_id, state) = (project, state.clone());
                    let query = ListLeads { project_id, process_id: process, state, updated_since, cursor, limit };
                    crate::admin::call::<_, Page<Found>>(&nats, rpc::LEAD_LIST, &query).await
                };
                let head = ["LEAD", "STATE", "VERSION", "UPDATED", "REFERENCE", "NAME"];
                paging.print(admin.json, "no leads", head, ask, lead_row).await
            }
            Self::History { lead_id, project, paging, admin } => {
                let nats = admin.connect().await?;
                let ask = async |cursor: Option<Cursor>, limit: u32| {
                    let query = GetLeadHistory { project_id: project, lead_id, cursor, limit };
                    crate::admin::call::<_, Page<HistoryEntry>>(&nats, rpc::LEAD_HISTORY, &query).await
                };
                let head = ["UPDATE", "OUTCOME", "VERSION", "APPLIED", "STATE", "BY", "WHY"];
                paging.print(admin.json, "no updates", head, ask, update_row).await
            }
        }
    }
}

fn show(lead: &Found) {
    output::say(format_args!("lead {}", lead.lead_id));
    let text = |name, text: &Option<String>| {
        if let Some(text) = text {
            output::field(name, line(text));
        }
    };
    text("name", &lead.name);
    text("phone", &lead.phone);
    text("email", &lead.email);
    text("reference", &lead.reference_id);
    output::field("process", lead.process_id);
    output::field("state", line(&lead.state));
    text("disposition", &lead.disposition);
    output::field("version", lead.version);
    output::field("created", lead.created_at.to_iso());
    output::field("updated", lead.updated_at.to_iso());
    output::field("metadata", line(lead.metadata.get()));
    if !lead.activities.is_empty() {
        output::say("its last updates; leadctl lead history has all:");
    }
    for activity in &lead.activities {
        let outcome = if activity.success { "succeeded" } else { "failed" };
        let why = activity.error.as_deref().map(|error| format!(": {}", line(error))).unwrap_or_default();
        output::say(format_args!("  {}  {}  {outcome}{why}", activity.update_id, activity.timestamp.to_iso()));
    }
}

fn lead_row(lead: &Found) -> [String; 6] {
    let text = |text: &Option<String>| text.as_deref().map(line).unwrap_or_default();
    let (reference, name) = (text(&lead.reference_id), text(&lead.name));
    let (id, version) = (lead.lead_id.to_string(), lead.version.to_string());
    [id, line(&lead.state), version, lead.updated_at.to_iso(), reference, name]
}

fn update_row(update: &HistoryEntry) -> [String; 7] {
    let text = |text: &Option<String>| text.as_deref().map(line).unwrap_or_default();
    let state = match (text(&update.from_state), text(&update.to_state)) {
        (from, to) if from == to => from,
        (from, to) => format!("{from} → {to}"),
    };
    let by = match (&update.user_id, update.api_key_id) {
        (Some(user), _) => line(user),
        (None, Some(key)) => format!("key {key}"),
        (None, None) => String::new(),
    };
    let outcome = if update.success { "succeeded" } else { "failed" }.to_owned();
    let version = update.version.map(|version| version.to_string()).unwrap_or_default();
    [update.update_id.to_string(), outcome, version, update.applied_at.to_iso(), state, by, text(&update.error)]
}

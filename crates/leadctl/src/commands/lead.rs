//! `leadctl lead`: shows, exports and erases leads, and shows their history.

use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use contract::{
    ObjectId, Timestamp,
    rpc::{GetLead, GetLeadHistory, HistoryEntry, ListLeads, ShortResult},
};

use crate::{
    arguments::{InProject, parse_since},
    commands::{lead_export::export, paging::Paging, sending::Sending},
    output::{self, escape::escaped},
};

/// Leads.
#[derive(Debug, Subcommand)]
pub(crate) enum Lead {
    /// Show a lead.
    #[command(after_help = "Examples:\n  leadctl lead get --project 6b04… 696102a4b8c1d2e3f4a5b6c7\n  \
                            leadctl lead get --project 6b04… --process 6b05… --reference-id AB123456789")]
    Get {
        #[command(flatten)]
        address: LeadAddress,
        #[command(flatten)]
        scope: InProject,
    },
    /// List a project's leads, newest first.
    #[command(
        after_help = "Examples:\n  leadctl lead list --project 6b04… --state interested --updated-since 1d --json\n  \
                      leadctl lead list --project 6b04… --search 5550101"
    )]
    List {
        /// Only leads of this process.
        #[arg(long)]
        process: Option<ObjectId>,
        /// Only leads in this state.
        #[arg(long)]
        state: Option<String>,
        /// Only leads changed since this time, or this long ago, e.g. 1d.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        updated_since: Option<Timestamp>,
        /// Only leads with this id, external id or e-mail address, a phone number that ends with these digits, or a
        /// name that begins so.
        #[arg(long, value_name = "TEXT")]
        search: Option<String>,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
    /// Print what is stored about a lead as one JSON document: the lead, its calls in progress, and its updates and
    /// call events with their commands, deliveries and attempts.
    ///
    /// Updates that wait in the log or for the end of a call are not included. Export the lead again once they are
    /// decided.
    #[command(after_help = "Example:\n  leadctl lead export --project 6b04… 696102a4b8c1d2e3f4a5b6c7 > lead.json")]
    Export {
        /// The lead.
        lead_id: ObjectId,
        #[command(flatten)]
        scope: InProject,
    },
    /// Erase a lead: its name, phone, e-mail address, external id and metadata, and the content of its updates, call
    /// events and deliveries. Its ids, state, codes and times remain. This cannot be undone.
    ///
    /// Exits with 0 once the erasure is accepted. Needs an API key with the scope leads:erase.
    #[command(after_help = "Examples:\n  \
                      leadctl lead export --project 6b04… 696102a4b8c1d2e3f4a5b6c7 > lead.json    before it is gone\n  \
                      leadctl lead erase 696102a4b8c1d2e3f4a5b6c7 --yes")]
    Erase {
        /// The lead.
        lead_id: ObjectId,
        /// Confirm. Without --yes, the command only says what it would do.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        sending: Sending,
    },
    /// List a lead's updates and call events, newest first, including failed ones.
    #[command(after_help = "Example:\n  leadctl lead history --project 6b04… 696102a4b8c1d2e3f4a5b6c7")]
    History {
        /// The lead.
        lead_id: ObjectId,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
}

#[derive(Debug, Args)]
pub(crate) struct LeadAddress {
    /// The lead.
    #[arg(required_unless_present = "reference_id", conflicts_with = "reference_id")]
    lead_id: Option<ObjectId>,
    /// The lead's external id, instead of its leadId.
    #[arg(long, requires = "process")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long, requires = "reference_id")]
    process: Option<ObjectId>,
}

impl Lead {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Erase { lead_id, yes, sending } => {
                if !yes {
                    bail!(
                        "this would erase lead {lead_id} and the content of its updates, call events and deliveries, \
                         and cannot be undone; nothing was changed: add --yes to confirm"
                    );
                }
                return sending.delete(&format!("/api/v1/leads/{lead_id}")).await;
            }
            Self::Get { address, scope: InProject { project_id, admin } } => {
                let LeadAddress { lead_id, reference_id, process } = address;
                let query = GetLead { project_id, lead_id, reference_id, process_id: process };
                admin.show(&query, show).await
            }
            Self::List { process, state, updated_since, search, paging, scope: InProject { project_id, admin } } => {
                let query = |cursor, limit| {
                    let (state, search) = (state.clone(), search.clone());
                    ListLeads { project_id, process_id: process, state, updated_since, search, cursor, limit }
                };
                let head = ["LEAD", "STATE", "VERSION", "UPDATED", "REFERENCE", "NAME"];
                paging.print(&admin, "no leads", head, query, lead_row).await
            }
            Self::Export { lead_id, scope: InProject { project_id, admin } } => {
                export(&admin.connect().await?, project_id, lead_id).await
            }
            Self::History { lead_id, paging, scope: InProject { project_id, admin } } => {
                let query = |cursor, limit| GetLeadHistory { project_id, lead_id, cursor, limit };
                let head = ["UPDATE", "KIND", "OUTCOME", "VERSION", "APPLIED", "STATE", "USER", "ERROR"];
                paging.print(&admin, "no updates", head, query, update_row).await
            }
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(crate) fn show(lead: &contract::rpc::Lead) {
    output::say(format_args!("lead {}", lead.lead_id));
    let text = |name, text: &Option<String>| {
        if let Some(text) = text {
            output::field(name, escaped(text));
        }
    };
    text("name", &lead.name);
    text("phone", &lead.phone);
    text("email", &lead.email);
    text("reference", &lead.reference_id);
    output::field("process", lead.process_id);
    output::field("state", escaped(&lead.state));
    text("disposition", &lead.disposition);
    output::field("version", lead.version);
    output::field("created", lead.created_at.to_iso());
    output::field("updated", lead.updated_at.to_iso());
    output::field("metadata", escaped(lead.metadata.get()));
    if !lead.activities.is_empty() {
        output::say("last updates and call events (all: leadctl lead history):");
    }
    for activity in &lead.activities {
        let outcome = if activity.success { "succeeded" } else { "failed" };
        let why = activity.error.as_deref().map(|error| format!(": {}", escaped(error))).unwrap_or_default();
        let (id, at, kind) = (activity.update_id, activity.timestamp.to_iso(), activity.kind);
        let result = activity.result.as_ref().map(short_result).unwrap_or_default();
        output::say(format_args!("  {id}  {at}  {kind} {outcome}{why}{result}"));
    }
}

/// The result of a call in one line.
fn short_result(result: &ShortResult) -> String {
    let ShortResult { status, connected, disposition, duration_seconds } = result;
    let connected = connected.map(|connected| if connected { "connected" } else { "not connected" }.to_owned());
    let texts = [status.as_deref().map(escaped), connected, disposition.as_deref().map(escaped)];
    let parts = texts.into_iter().flatten().chain(duration_seconds.map(|seconds| format!("{seconds} s")));
    format!(": {}", parts.collect::<Vec<_>>().join(", "))
}

pub(crate) fn lead_row(lead: &contract::rpc::Lead) -> [String; 6] {
    let text = |text: &Option<String>| text.as_deref().map(escaped).unwrap_or_default();
    let (reference, name) = (text(&lead.reference_id), text(&lead.name));
    let (id, version) = (lead.lead_id.to_string(), lead.version.to_string());
    [id, escaped(&lead.state), version, lead.updated_at.to_iso(), reference, name]
}

pub(crate) fn update_row(update: &HistoryEntry) -> [String; 8] {
    let text = |text: &Option<String>| text.as_deref().map(escaped).unwrap_or_default();
    let state = match (text(&update.from_state), text(&update.to_state)) {
        (from, to) if from == to => from,
        (from, to) => format!("{from} → {to}"),
    };
    let by = match (&update.user_id, update.api_key_id) {
        (Some(user), _) => escaped(user),
        (None, Some(key)) => format!("key {key}"),
        (None, None) => String::new(),
    };
    let outcome = if update.success { "succeeded" } else { "failed" }.to_owned();
    let version = update.version.map(|version| version.to_string()).unwrap_or_default();
    let (id, kind) = (update.update_id.to_string(), update.kind.to_string());
    [id, kind, outcome, version, update.applied_at.to_iso(), state, by, text(&update.error)]
}

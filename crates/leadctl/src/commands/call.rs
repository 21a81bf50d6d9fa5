//! `leadctl call`: reports calls over the HTTP API, lists those in progress and counts those that ended.

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use contract::{
    JsonObject, ObjectId, Timestamp,
    call_result::CallResult,
    rpc::{Call as ListedCall, CallCounts, CountActivities, ListCalls},
};
use http_api::{CallEndedRequest, CallStartedRequest, CallStatistics};
use service_kit::clock;

use crate::{
    arguments::{InProject, parse_since},
    clients::admin::{self, Admin},
    commands::{paging::Paging, sending::Sending},
    output::{self, escape::escaped},
};

const DAY: Duration = Duration::from_hours(24);

/// Calls with leads.
#[derive(Debug, Subcommand)]
pub(crate) enum Call {
    /// Report the start of a call: until it ends or expires, updates of the lead fail, or are queued if its process
    /// says so.
    #[command(
        after_help = "Example:\n  leadctl call start --lead-id 696102a4b8c1d2e3f4a5b6c7 --call-id call-7 --timeout 30m"
    )]
    Start {
        #[command(flatten)]
        call: CallFields,
        /// After how long a call without an end counts as ended. Default: the process's callTimeoutSeconds.
        #[arg(long, value_name = "DURATION")]
        timeout: Option<humantime::Duration>,
        #[command(flatten)]
        sending: Sending,
    },
    /// Report the end of a call, or without --call-id of every call with the lead.
    #[command(after_help = "Example:\n  leadctl call end --lead-id 696102a4b8c1d2e3f4a5b6c7 --call-id call-7")]
    End {
        #[command(flatten)]
        call: CallFields,
        /// Move the lead to this state, by the rules of an update.
        #[arg(long, value_name = "STATE")]
        to_state: Option<String>,
        /// The result of the call, as JSON, e.g. '{"status":"completed","connected":true}'.
        #[arg(long, value_name = "JSON", value_parser = parse_result)]
        result: Option<CallResult>,
        #[command(flatten)]
        sending: Sending,
    },
    /// Count a project's calls that ended with a result: by default of the last 24 hours.
    #[command(after_help = "Example:\n  leadctl call count --project 6b04… --from 7d --unique-leads")]
    Count {
        /// The start: a time, or this long ago, e.g. 7d; by default 1 day before the end, and at most 32.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        from: Option<Timestamp>,
        /// The end: a time, or this long ago; by default now.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        to: Option<Timestamp>,
        /// Only calls with leads of this process.
        #[arg(long, value_name = "ID")]
        process: Option<ObjectId>,
        /// Only calls with leads of this group.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
        /// Count the leads, too.
        #[arg(long)]
        unique_leads: bool,
        #[command(flatten)]
        scope: InProject,
    },
    /// List a project's calls in progress, by lead.
    #[command(after_help = "Example:\n  leadctl call list --project 6b04… --lead 696102a4b8c1d2e3f4a5b6c7")]
    List {
        /// Only calls with this lead.
        #[arg(long)]
        lead: Option<ObjectId>,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CallFields {
    /// The lead.
    #[arg(long, required_unless_present = "reference_id")]
    lead_id: Option<ObjectId>,
    /// The lead's external id, instead of its leadId.
    #[arg(long, requires = "process_id")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long)]
    process_id: Option<ObjectId>,
    /// The call, if the lead can have several at once.
    #[arg(long)]
    call_id: Option<String>,
}

impl Call {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Start { call: CallFields { lead_id, reference_id, process_id, call_id }, timeout, sending } => {
                let timeout_seconds = timeout.map(|timeout| u32::try_from(timeout.as_secs())).transpose()?;
                let request = CallStartedRequest {
                    lead_id,
                    reference_id,
                    process_id,
                    call_id,
                    timeout_seconds,
                    ..CallStartedRequest::default()
                };
                sending.post("/api/v1/calls/started", &request).await
            }
            Self::End {
                call: CallFields { lead_id, reference_id, process_id, call_id },
                to_state,
                result,
                sending,
            } => {
                let request = CallEndedRequest {
                    lead_id,
                    reference_id,
                    process_id,
                    call_id,
                    to_state,
                    result,
                    ..CallEndedRequest::default()
                };
                sending.post("/api/v1/calls/ended", &request).await
            }
            Self::Count { from, to, process, group, unique_leads, scope: InProject { project_id, admin } } => {
                let to = to.unwrap_or_else(clock::now);
                let query = CountActivities {
                    project_id,
                    from: from.unwrap_or_else(|| to.minus(DAY)),
                    to,
                    process_id: process,
                    group_id: group,
                    offset_minutes: 0,
                    include_leads: unique_leads,
                };
                print_counts(&admin, &query).await
            }
            Self::List { lead, paging, scope: InProject { project_id, admin } } => {
                let query = |cursor, limit| ListCalls { project_id, lead_id: lead, cursor, limit };
                let head = ["LEAD", "CALL", "STARTED", "EXPIRES", "REFERENCE"];
                paging.print(&admin, "no calls in progress", head, query, row).await?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn parse_result(text: &str) -> Result<CallResult, String> {
    let object = JsonObject::from_text(text.to_owned()).map_err(|e| e.to_string())?;
    CallResult::parse(&object).map_err(|e| e.to_string())
}

async fn print_counts(admin: &Admin, query: &CountActivities) -> anyhow::Result<ExitCode> {
    let counts = admin::request(&admin.connect().await?, query).await?;
    if admin.json {
        output::json(&CallStatistics::from(counts))?;
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["", "OUTGOING", "INCOMING", "CONNECTED", "MEANINGFULLY HANDLED", "INTERESTED"];
    let rows = [("calls", Some(counts.calls)), ("leads", counts.leads)];
    let rows: Vec<_> = rows.into_iter().filter_map(|(name, counts)| Some((name, counts?))).collect();
    output::list("no calls", head, &rows, |(name, counts)| {
        let CallCounts { attempts, connected, incoming, meaningfully_handled, interested } = counts;
        let [attempts, incoming, connected, handled, interested] =
            [attempts, incoming, connected, meaningfully_handled, interested].map(ToString::to_string);
        [(*name).to_owned(), attempts, incoming, connected, handled, interested]
    });
    Ok(ExitCode::SUCCESS)
}

fn row(call: &ListedCall) -> [String; 5] {
    let text = |text: &Option<String>| text.as_deref().map(escaped).unwrap_or_default();
    let (call_id, reference) = (text(&call.call_id), text(&call.reference_id));
    [call.lead_id.to_string(), call_id, call.started_at.to_iso(), call.expires_at.to_iso(), reference]
}

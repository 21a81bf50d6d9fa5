//! `leadctl deliveries`: lists deliveries and repeats them.

use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use contract::{
    ObjectId, Timestamp,
    rpc::{
        Attempt, Cursor, Delivery, DeliveryId, DeliveryStatus, GetDelivery, ListDeliveries, ListedDelivery,
        MAX_PER_SECOND, Query, RecoverDeliveries, RecoveredDeliveries, Redeliver,
    },
};
use serde::Serialize;

use crate::{
    arguments::{InProject, parse_since},
    clients::admin,
    commands::paging::Paging,
    output::{self, escape::escaped},
};

/// Deliveries.
#[derive(Debug, Subcommand)]
pub(crate) enum Deliveries {
    /// List a project's deliveries, those of the newest updates first.
    #[command(after_help = "Example:\n  leadctl deliveries list --project 6b04… --status exhausted --since 1d")]
    List {
        /// Only deliveries with this status.
        #[arg(long, value_parser = statuses())]
        status: Option<DeliveryStatus>,
        /// Only deliveries to this callback.
        #[arg(long)]
        callback: Option<ObjectId>,
        /// Only deliveries of this update.
        #[arg(long)]
        update: Option<ObjectId>,
        /// Only deliveries of this lead's updates.
        #[arg(long)]
        lead: Option<ObjectId>,
        /// Only deliveries of updates since this time, or this long ago, e.g. 1d.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        since: Option<Timestamp>,
        /// Only deliveries of updates before this time, or this long ago.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        until: Option<Timestamp>,
        /// Only deliveries to callbacks of this process.
        #[arg(long)]
        process: Option<ObjectId>,
        /// Only deliveries whose last attempt was answered with this status.
        #[arg(long, value_name = "STATUS")]
        status_code: Option<u16>,
        /// Only deliveries whose last attempt failed with an error that contains this text.
        #[arg(long, value_name = "TEXT")]
        error: Option<String>,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
    /// Show a delivery and its attempts.
    #[command(after_help = "Example:\n  leadctl deliveries show --project 6b04… \\\n    \
                      6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604")]
    Show {
        /// The delivery's id, as shown by `deliveries list`.
        delivery: DeliveryId,
        #[command(flatten)]
        scope: InProject,
    },
    /// Redeliver a delivered or exhausted delivery: the same body under the same webhook-id.
    #[command(after_help = "Example:\n  leadctl deliveries redeliver --project 6b04… \\\n    \
                      6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604")]
    Redeliver {
        /// The delivery's id, as shown by `deliveries list`.
        delivery: DeliveryId,
        #[command(flatten)]
        scope: InProject,
    },
    /// Redeliver all exhausted (or delivered) deliveries, at a limited rate.
    #[command(after_help = "Example:\n  leadctl deliveries recover --project 6b04… --since 6h --dry-run")]
    Recover(RecoverArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// The status of the deliveries to redeliver. With `delivered`, receivers get them a second time.
    #[arg(long, default_value = "exhausted", value_parser = statuses())]
    status: DeliveryStatus,
    /// Only deliveries to this callback.
    #[arg(long)]
    callback: Option<ObjectId>,
    #[command(flatten)]
    pages: RecoveryOptions,
    #[command(flatten)]
    scope: InProject,
}

/// Which deliveries are made (again), and how fast.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct RecoveryOptions {
    /// Only deliveries of updates since this time, or this long ago, e.g. 6h.
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub(crate) since: Timestamp,
    /// Deliveries per second.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PER_SECOND)))]
    pub(crate) per_second: u32,
    /// Only count the deliveries.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// The names of the statuses, for help and completion.
fn statuses() -> impl TypedValueParser<Value = DeliveryStatus> {
    PossibleValuesParser::new(DeliveryStatus::ALL.map(DeliveryStatus::as_str)).try_map(|name| name.parse())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RecoverSummary {
    deliveries: u64,
    dry_run: bool,
    until: Option<Timestamp>,
}

impl RecoverSummary {
    /// Prints what was done to the deliveries, e.g. "exhausted deliveries" and "repeated".
    pub(crate) fn say(&self, what: &str, done: &str) {
        let Self { deliveries, dry_run, until } = self;
        output::say(match until {
            _ if *dry_run => format!("{deliveries} {what} would be {done}"),
            Some(until) => format!("{deliveries} {what} will be {done}, the last one at {}", until.to_iso()),
            None => format!("no {what} to be {done}"),
        });
    }
}

impl RecoveryOptions {
    /// Sends the query for each page, with the cursor of the previous one, and shows the sum. After an error it shows
    /// the sum of the pages before.
    pub(crate) async fn run<Q: Query<Reply = RecoveredDeliveries>>(
        self,
        client: &async_nats::Client,
        query: impl Fn(Option<Cursor>) -> Q,
        show: impl FnOnce(&RecoverSummary) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut summary = RecoverSummary { deliveries: 0, dry_run: self.dry_run, until: None };
        let mut cursor = None;
        loop {
            let page = match admin::request(client, &query(cursor)).await {
                Ok(page) => page,
                Err(error) if summary.deliveries == 0 => return Err(error),
                Err(error) => {
                    show(&summary)?;
                    return Err(error.context("not all deliveries were read; run the command again for the others"));
                }
            };
            summary.deliveries += page.deliveries;
            summary.until = page.until.or(summary.until);
            cursor = page.next;
            if cursor.is_none() {
                return show(&summary);
            }
            output::note(format_args!("{} deliveries so far", summary.deliveries));
        }
    }
}

impl Deliveries {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List {
                status,
                callback,
                update,
                lead,
                since,
                until,
                process,
                status_code,
                error,
                paging,
                scope: InProject { project_id, admin },
            } => {
                let query = |cursor, limit| ListDeliveries {
                    project_id,
                    status,
                    callback_id: callback,
                    update_id: update,
                    lead_id: lead,
                    since,
                    until,
                    process_id: process,
                    status_code,
                    error: error.clone(),
                    cursor,
                    limit,
                };
                let head = ["DELIVERY", "STATUS", "ATTEMPTS", "UPDATED", "NEXT ATTEMPT", "ERROR"];
                paging.print(&admin, "no deliveries", head, query, row).await
            }
            Self::Show { delivery, scope: InProject { project_id, admin } } => {
                let query = GetDelivery { project_id, id: delivery };
                admin.show(&query, |found| show(delivery, found)).await
            }
            Self::Redeliver { delivery, scope: InProject { project_id, admin } } => {
                let text = format!("delivery {delivery} is due now; see leadctl deliveries show {delivery}");
                admin.show(&Redeliver { project_id, id: delivery }, |_| output::say(text)).await
            }
            Self::Recover(recover) => recover.run().await,
        }
    }
}

impl RecoverArgs {
    async fn run(self) -> anyhow::Result<()> {
        let Self { status, callback, pages, scope: InProject { project_id, admin } } = self;
        let client = admin.connect().await?;
        let RecoveryOptions { since, per_second, dry_run } = pages;
        let query = |cursor| RecoverDeliveries {
            project_id,
            since,
            status,
            callback_id: callback,
            per_second,
            dry_run,
            cursor,
        };
        let say = |summary: &RecoverSummary| summary.say(&format!("{status} deliveries"), "redelivered");
        pages.run(&client, query, |summary| output::show(admin.json, summary, say)).await
    }
}

pub(crate) fn row(delivery: &ListedDelivery) -> [String; 6] {
    let next = delivery.next_attempt_at.map(Timestamp::to_iso).unwrap_or_default();
    let error = delivery.error.as_deref().map(escaped).unwrap_or_default();
    let (id, attempts) = (delivery.id.to_string(), delivery.attempts.to_string());
    [id, delivery.status.to_string(), attempts, delivery.updated_at.to_iso(), next, error]
}

pub(crate) fn show(id: DeliveryId, delivery: &Delivery) {
    output::say(format_args!("delivery {id} {}", delivery.status));
    if let Some(at) = delivery.next_attempt_at {
        output::field("next", at.to_iso());
    }
    for Attempt { number, started_at, duration_ms, status_code, error, response, .. } in &delivery.attempts {
        let status = status_code.map(|code| code.to_string());
        let result = error.as_deref().map(escaped).or(status).unwrap_or_default();
        let response = response.as_deref().map(|body| format!(": {}", escaped(body))).unwrap_or_default();
        let at = started_at.to_iso();
        output::say(format_args!("  attempt {number} at {at}, {duration_ms} ms: {result}{response}"));
    }
}

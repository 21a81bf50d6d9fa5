//! `leadctl deliveries`: what was told to whom, and telling it again.

use clap::{Subcommand, ValueEnum};
use contract::{
    ObjectId, Timestamp,
    rpc::{
        self, Cursor, Delivery, DeliveryId, DeliveryStatus, GetDelivery, ListDeliveries, ListedDelivery,
        MAX_PER_SECOND, Page, RecoverDeliveries, RecoveredDeliveries,
    },
};
use serde::Serialize;

use crate::{
    admin::{self, Admin},
    output,
    pages::{self, Paging},
    printable::line,
};

/// Deliveries.
#[derive(Debug, Subcommand)]
pub(crate) enum Deliveries {
    /// List a project's deliveries, those of the newest updates first.
    #[command(after_help = "Example:\n  leadctl deliveries list --project 6b04… --status exhausted --since 1d")]
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// Only those that stand so.
        #[arg(long)]
        status: Option<Status>,
        /// Only to this callback.
        #[arg(long)]
        callback: Option<ObjectId>,
        /// Only of this update.
        #[arg(long)]
        update: Option<ObjectId>,
        /// Only of this lead's updates.
        #[arg(long)]
        lead: Option<ObjectId>,
        /// Only of updates that were made since: a time, or how long ago, e.g. 1d.
        #[arg(long, value_name = "TIME", value_parser = pages::since)]
        since: Option<Timestamp>,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        admin: Admin,
    },
    /// Show a delivery with every attempt.
    #[command(
        after_help = "Example:\n  leadctl deliveries show --project 6b04… 6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604"
    )]
    Show {
        /// The delivery, as `list` shows it.
        delivery: DeliveryId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Make a delivery again that is delivered or exhausted: the same body under the same webhook-id.
    #[command(
        after_help = "Example:\n  leadctl deliveries redeliver --project 6b04… 6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604"
    )]
    Redeliver {
        /// The delivery, as `list` shows it.
        delivery: DeliveryId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Make all deliveries again that are exhausted, or that were delivered, so many a second.
    #[command(after_help = "Example:\n  leadctl deliveries recover --project 6b04… --since 6h --dry-run")]
    Recover {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// Those of updates that were made since: a time, or how long ago, e.g. 6h.
        #[arg(long, value_name = "TIME", value_parser = pages::since)]
        since: Timestamp,
        /// Those that stand so; of delivered ones every receiver hears again.
        #[arg(long, default_value = "exhausted")]
        status: Status,
        /// Only to this callback.
        #[arg(long)]
        callback: Option<ObjectId>,
        /// How many are due in a second.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PER_SECOND)))]
        per_second: u32,
        /// Only say how many they are.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Status {
    Pending,
    Delivered,
    Exhausted,
}

impl From<Status> for DeliveryStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Pending => Self::Pending,
            Status::Delivered => Self::Delivered,
            Status::Exhausted => Self::Exhausted,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Recovery {
    deliveries: u64,
    dry_run: bool,
    until: Option<Timestamp>,
}

impl Deliveries {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { project, status, callback, update, lead, since, paging, admin } => {
                let nats = admin.connect().await?;
                let ask = async |cursor: Option<Cursor>, limit: u32| {
                    let query = ListDeliveries {
                        project_id: project,
                        status: status.map(Into::into),
                        callback_id: callback,
                        update_id: update,
                        lead_id: lead,
                        since,
                        cursor,
                        limit,
                    };
                    admin::call::<_, Page<ListedDelivery>>(&nats, rpc::DELIVERY_LIST, &query).await
                };
                let head = ["DELIVERY", "STATUS", "ATTEMPTS", "UPDATED", "NEXT ATTEMPT", "ERROR"];
                paging.print(admin.json, "no deliveries", head, ask, row).await
            }
            Self::Show { delivery, project, admin } => {
                let query = GetDelivery { project_id: project, id: delivery };
                let found: Delivery = admin.call(rpc::DELIVERY_GET, &query).await?;
                if admin.json {
                    return output::json(&found);
                }
                output::say(format_args!("delivery {delivery} {}", name(found.status)));
                if let Some(at) = found.next_attempt_at {
                    output::field("next", at.to_iso());
                }
                for attempt in &found.attempts {
                    let status = attempt.status_code.map(|code| code.to_string());
                    let what = attempt.error.as_deref().map(line).or(status).unwrap_or_default();
                    let response = attempt.response.as_deref().map(|body| format!(": {}", line(body)));
                    let (number, at, took) = (attempt.number, attempt.started_at.to_iso(), attempt.duration_ms);
                    output::say(format_args!(
                        "  attempt {number} at {at}, {took} ms: {what}{}",
                        response.unwrap_or_default()
                    ));
                }
                Ok(())
            }
            Self::Redeliver { delivery, project, admin } => {
                let query = GetDelivery { project_id: project, id: delivery };
                let again: ListedDelivery = admin.call(rpc::DELIVERY_REDELIVER, &query).await?;
                if admin.json {
                    return output::json(&again);
                }
                output::say(format_args!("delivery {delivery} is due now; leadctl deliveries show tells how it goes"));
                Ok(())
            }
            Self::Recover { project, since, status, callback, per_second, dry_run, admin } => {
                let nats = admin.connect().await?;
                let mut recovery = Recovery { deliveries: 0, dry_run, until: None };
                let mut query = RecoverDeliveries {
                    project_id: project,
                    since,
                    status: status.into(),
                    callback_id: callback,
                    per_second,
                    dry_run,
                    cursor: None,
                };
                loop {
                    let done: RecoveredDeliveries = admin::call(&nats, rpc::DELIVERY_RECOVER, &query).await?;
                    recovery.deliveries += done.deliveries;
                    recovery.until = done.until.or(recovery.until);
                    query.cursor = done.next;
                    if query.cursor.is_none() {
                        break;
                    }
                    eprintln!("leadctl: {} so far", recovery.deliveries);
                }
                if admin.json {
                    return output::json(&recovery);
                }
                let (count, status) = (recovery.deliveries, name(status.into()));
                output::say(match recovery.until {
                    _ if dry_run => format!("{count} {status} deliveries would be made again"),
                    Some(until) => {
                        format!("{count} {status} deliveries are made again, the last of them at {}", until.to_iso())
                    }
                    None => format!("no {status} deliveries to make again"),
                });
                Ok(())
            }
        }
    }
}

fn name(status: DeliveryStatus) -> &'static str {
    match status {
        DeliveryStatus::Pending => "pending",
        DeliveryStatus::Delivered => "delivered",
        DeliveryStatus::Exhausted => "exhausted",
    }
}

fn row(delivery: &ListedDelivery) -> [String; 6] {
    let next = delivery.next_attempt_at.map(Timestamp::to_iso).unwrap_or_default();
    let error = delivery.error.as_deref().map(line).unwrap_or_default();
    let (id, attempts) = (delivery.id.to_string(), delivery.attempts.to_string());
    [id, name(delivery.status).to_owned(), attempts, delivery.updated_at.to_iso(), next, error]
}

//! `leadctl stats`: counts of updates and deliveries.

use clap::Args;
use contract::{
    ObjectId, Timestamp,
    rpc::{
        CountDeliveries, CountUpdates, DeliveryCounts, StatisticsGroup, StatisticsRange, StatisticsStep, UpdateCounts,
    },
};
use http_api::{DateTime, Statistics};
use service_kit::clock;

use crate::{
    arguments::{InProject, parse_since},
    clients::admin,
    output::{self, minute, say},
};

/// Count a project's updates, attempts and exhausted deliveries per minute, hour or day (UTC): by default of the last
/// 24 hours.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  leadctl stats --project 6b0426971c73026dafa27e40\n  \
                        leadctl stats --project 6b0426971c73026dafa27e40 --from 1h --step minute --by code")]
pub(crate) struct Stats {
    /// The start: a time, or this long ago, e.g. 7d. At most 31 days before the end; with --step minute, 1 day.
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    from: Option<Timestamp>,
    /// The end: a time, or this long ago; by default now.
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    to: Option<Timestamp>,
    /// The length of a step: minute, hour or day.
    #[arg(long, default_value = "hour")]
    step: StatisticsStep,
    /// What to divide the counts by: process, kind, code (of updates) or callback (of deliveries).
    #[arg(long)]
    by: Option<StatisticsGroup>,
    /// Only attempts and deliveries of this callback.
    #[arg(long, value_name = "CALLBACK")]
    callback: Option<ObjectId>,
    #[command(flatten)]
    scope: InProject,
}

impl Stats {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self { from, to, step, by, callback, scope: InProject { project_id, admin } } = self;
        let range = StatisticsRange::new(from, to, Some(step), clock::now())?;
        let client = admin.connect().await?;
        let updates = admin::request(&client, &CountUpdates { project_id, range, by }).await?;
        let deliveries =
            admin::request(&client, &CountDeliveries { project_id, range, by, callback_id: callback }).await?;
        if admin.json {
            return output::json(&Statistics {
                from: DateTime(range.from),
                to: DateTime(range.to),
                step,
                by,
                updates: updates.into_iter().map(Into::into).collect(),
                deliveries: Some(deliveries.into_iter().map(Into::into).collect()),
            });
        }
        // Updates belong to no callback.
        if callback.is_none() {
            output::list("no updates", ["FROM", "SUCCEEDED", "FAILED", group_title(by)], &updates, update_row);
            say("");
        }
        let head =
            ["FROM", "DELIVERED", "IN 100 MS", "IN 1 S", "IN 10 S", "ATTEMPTS FAILED", "EXHAUSTED", group_title(by)];
        output::list("no deliveries", head, &deliveries, delivery_row);
        Ok(())
    }
}

fn group_title(by: Option<StatisticsGroup>) -> &'static str {
    match by {
        None => "",
        Some(StatisticsGroup::Process) => "PROCESS",
        Some(StatisticsGroup::Kind) => "KIND",
        Some(StatisticsGroup::Code) => "CODE",
        Some(StatisticsGroup::Callback) => "CALLBACK",
    }
}

fn update_row(counts: &UpdateCounts) -> [String; 4] {
    let UpdateCounts { at, group, succeeded, failed } = counts;
    [minute(*at), succeeded.to_string(), failed.to_string(), group.clone().unwrap_or_default()]
}

fn delivery_row(counts: &DeliveryCounts) -> [String; 8] {
    let DeliveryCounts { at, group, delivered, within_100ms, within_1s, within_10s, failed, exhausted } = counts;
    let [delivered, within_100ms, within_1s, within_10s, failed, exhausted] =
        [delivered, within_100ms, within_1s, within_10s, failed, exhausted].map(ToString::to_string);
    let group = group.clone().unwrap_or_default();
    [minute(*at), delivered, within_100ms, within_1s, within_10s, failed, exhausted, group]
}

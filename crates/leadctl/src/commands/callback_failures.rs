//! `leadctl callback failures`: why the deliveries of a callback fail.

use clap::Args;
use contract::{ObjectId, Timestamp, rpc::GroupFailures};
use http_api::{CallbackFailures, FailureGroup};

use crate::{
    arguments::{InProject, parse_since},
    clients::admin,
    output::{self, escape::escaped},
};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  leadctl callback failures 6b0426971c73026dafa27e40 --project 6b04… --since 1h")]
pub(crate) struct Failures {
    /// The callback.
    callback_id: ObjectId,
    /// Only deliveries that failed since this time, or this long ago.
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = parse_since)]
    since: Timestamp,
    #[command(flatten)]
    scope: InProject,
}

impl Failures {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self { callback_id, since, scope: InProject { project_id, admin } } = self;
        let client = admin.connect().await?;
        let failures = admin::request(&client, &GroupFailures { project_id, callback_id, since }).await?;
        output::show(admin.json, &CallbackFailures::from(failures), show)
    }
}

fn show(failures: &CallbackFailures) {
    let head = ["STATUS", "PENDING", "EXHAUSTED", "LAST", "SAMPLE", "ERROR", "RESPONSE"];
    output::list("no failures", head, &failures.groups, row);
    if !failures.complete {
        output::note("not all deliveries were read: there are more failures");
    }
}

fn row(group: &FailureGroup) -> [String; 7] {
    let FailureGroup { status_code, error, pending, exhausted, last_at, sample, response } = group;
    let text = |text: &Option<String>| text.as_deref().map(escaped).unwrap_or_default();
    [
        status_code.map_or_else(|| "none".into(), |code| code.to_string()),
        pending.to_string(),
        exhausted.to_string(),
        last_at.0.to_iso(),
        sample.clone(),
        text(error),
        text(response),
    ]
}

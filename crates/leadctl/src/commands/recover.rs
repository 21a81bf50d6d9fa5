//! `leadctl recover`: resumes lead-state after it halted, by an operator's decision.

use anyhow::bail;
use clap::{Args, Subcommand};
use contract::{
    Timestamp,
    position::LogPosition,
    rpc::{GetRecovery, RecoveryKind, RecoveryStatus},
};
use service_kit::clock;

use crate::{
    clients::admin::{self, Admin},
    output::{self, escape::escaped},
};

/// Show whether log, checkpoint and events are consistent, and which command repairs them; or run that command.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  leadctl recover\n  leadctl recover replay --yes\n  \
                  leadctl recover reannounce --since 2h --yes"
)]
pub(crate) struct Recover {
    #[command(subcommand)]
    method: Option<Method>,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, Subcommand)]
enum Method {
    /// Use after Postgres was restored to an older state, while the log still has the later commands: applies them
    /// again, with the same ids, and announces again what webhook-notifier had not acked in that state. Leads initiated
    /// since then are lost, and their updates fail.
    #[command(after_help = "Example:\n  leadctl recover replay --yes")]
    Replay(Confirm),
    /// Use after the log lost entries or was restored to an older state: starts a new epoch and reads the log from its
    /// first entry. Updates that are in the ledger are not applied again. Updates that are neither in the log nor in
    /// the ledger are lost.
    #[command(after_help = "Example:\n  leadctl recover new-epoch --yes")]
    NewEpoch(Confirm),
    /// Use after events or deliveries were lost: announces everything again that was applied since then. All callbacks
    /// get these deliveries again, under the same webhook-id.
    #[command(after_help = "Example:\n  leadctl recover reannounce --since 2h --yes")]
    Reannounce {
        /// How far to go back, e.g. 2h.
        #[arg(long, value_name = "DURATION")]
        since: humantime::Duration,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Args)]
struct Confirm {
    /// Confirm. Without --yes, the command only shows what it would do.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    admin: Admin,
}

impl Recover {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let (kind, since, confirm) = match self.method {
            None => return self.admin.show(&GetRecovery {}, show).await,
            Some(Method::Replay(confirm)) => (RecoveryKind::Replay, None, confirm),
            Some(Method::NewEpoch(confirm)) => (RecoveryKind::NewEpoch, None, confirm),
            Some(Method::Reannounce { since, confirm }) => {
                (RecoveryKind::Reannounce, Some(clock::now().minus(since.into())), confirm)
            }
        };
        let Confirm { yes, admin } = confirm;
        let client = admin.connect().await?;
        let status = admin::request(&client, &GetRecovery {}).await?;
        let effect = effect(kind, &status, since);
        if !yes {
            output::show(admin.json, &status, show)?;
            bail!("this would change: {effect}; nothing was changed: add --yes to confirm");
        }
        // lead-state rejects the request if it has moved on from this status.
        let RecoveryStatus { generation, applied, .. } = status;
        let query = contract::rpc::Recover { kind, since, generation, applied };
        let status = admin::request(&client, &query).await?;
        if !admin.json {
            output::say(format_args!("done: {effect}"));
        }
        output::show(admin.json, &status, show)
    }
}

/// Describes what a recovery changes.
fn effect(kind: RecoveryKind, status: &RecoveryStatus, since: Option<Timestamp>) -> String {
    let RecoveryStatus { applied, delivered, log_first, log_last, .. } = status;
    let repeated = format!("updates applied after {} are announced and delivered again", entry(delivered));
    match kind {
        RecoveryKind::Replay => {
            format!("entries {} to {log_last} of the log are applied again; {repeated}", applied.sequence + 1)
        }
        RecoveryKind::NewEpoch => format!(
            "epoch {} starts at entry {log_first} of the log, which ends at {log_last}; updates in the ledger are not \
             applied again; {repeated}",
            applied.epoch + 1
        ),
        RecoveryKind::Reannounce => {
            let since = since.map_or_else(String::new, Timestamp::to_iso);
            format!("updates applied since {since} are announced and delivered again")
        }
    }
}

fn entry(position: &LogPosition) -> String {
    format!("epoch {} entry {}", position.epoch, position.sequence)
}

pub(crate) fn show(status: &RecoveryStatus) {
    match &status.halted {
        None => output::say("healthy: log, checkpoint and events are consistent"),
        Some(halted) => {
            output::say(format_args!("halted: {}: {}", escaped(&halted.reason), escaped(&halted.text)));
            output::field("repair", format_args!("leadctl recover {}", halted.remedy));
        }
    }
    output::field("applied", entry(&status.applied));
    output::field("announced", entry(&status.announced));
    output::field("delivered", format_args!("{} or later", entry(&status.delivered)));
    output::field("log", format_args!("entries {} to {}", status.log_first, status.log_last));
    output::field("generation", status.generation);
}

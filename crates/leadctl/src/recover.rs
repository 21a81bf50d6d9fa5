//! `leadctl recover`: 3 Read in order, 6 Announce: out of what halted lead-state, by an operator's decision.

use anyhow::bail;
use clap::{Args, Subcommand};
use contract::{
    Timestamp,
    position::LogPosition,
    rpc::{GetRecovery, RECOVERY_GET, RECOVERY_RECOVER, Recover as Query, RecoveryKind, RecoveryStatus},
};
use service_kit::clock;

use crate::{
    admin::{self, Admin},
    output,
};

/// Say how log, checkpoint and events stand to each other, and which command mends what is wrong; or do that.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  leadctl recover\n  leadctl recover replay --yes\n  leadctl recover reannounce --since 2h --yes"
)]
pub(crate) struct Recover {
    #[command(subcommand)]
    case: Option<Case>,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, Subcommand)]
enum Case {
    /// Postgres was restored to an older state, and the log still holds what came after: apply it again. The same updates
    /// under the same ids; what the webhook-notifier had not acked in that state is announced and told again. Leads that were
    /// initiated since are gone, and updates of them fail.
    #[command(after_help = "Example:\n  leadctl recover replay --yes")]
    Replay(Way),
    /// The log lost its end, was set back, or lacks entries: go on with what it holds, as a new epoch. It is read from its
    /// first entry; updates that are in the ledger are known by their ids and not applied again. What is neither in the log
    /// nor in the ledger is lost.
    #[command(after_help = "Example:\n  leadctl recover new-epoch --yes")]
    NewEpoch(Way),
    /// Events or deliveries were lost: announce again everything that was applied since then. Callbacks are told again under
    /// the same webhook-id, also those that had been told.
    #[command(after_help = "Example:\n  leadctl recover reannounce --since 2h --yes")]
    Reannounce {
        /// How far back, e.g. 2h.
        #[arg(long, value_name = "DURATION")]
        since: humantime::Duration,
        #[command(flatten)]
        way: Way,
    },
}

#[derive(Debug, Args)]
struct Way {
    /// Do it. Without this, only what would be done is said.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    admin: Admin,
}

impl Recover {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let (kind, since, way) = match self.case {
            None => {
                let recovery: RecoveryStatus = self.admin.call(RECOVERY_GET, &GetRecovery {}).await?;
                return show(&recovery, self.admin.json);
            }
            Some(Case::Replay(way)) => (RecoveryKind::Replay, None, way),
            Some(Case::NewEpoch(way)) => (RecoveryKind::NewEpoch, None, way),
            Some(Case::Reannounce { since, way }) => {
                (RecoveryKind::Reannounce, Some(clock::now().minus(since.into())), way)
            }
        };
        let client = way.admin.connect().await?;
        let seen: RecoveryStatus = admin::call(&client, RECOVERY_GET, &GetRecovery {}).await?;
        if !way.yes {
            show(&seen, way.admin.json)?;
            bail!("{}; nothing was done: say --yes to do it", cost(kind, &seen, since));
        }
        // Compare-and-set: what was seen is what is acted on.
        let RecoveryStatus { generation, applied, .. } = seen;
        let query = Query { kind, since, generation, applied };
        let recovery: RecoveryStatus = admin::call(&client, RECOVERY_RECOVER, &query).await?;
        if !way.admin.json {
            output::say(format_args!("done; {}", cost(kind, &seen, since)));
        }
        show(&recovery, way.admin.json)
    }
}

/// What a way out does, with figures.
fn cost(kind: RecoveryKind, seen: &RecoveryStatus, since: Option<Timestamp>) -> String {
    let RecoveryStatus { applied, delivered, log_first, log_last, .. } = seen;
    let again = format!("what was applied behind {} is announced and delivered again", entry(delivered));
    match kind {
        RecoveryKind::Replay => {
            format!("entries {} to {log_last} of the log are applied again; {again}", applied.sequence + 1)
        }
        RecoveryKind::NewEpoch => format!(
            "epoch {} begins at entry {log_first} of the log, which ends at {log_last}; updates that are in the ledger are \
             not applied again; {again}",
            applied.epoch + 1
        ),
        RecoveryKind::Reannounce => {
            let since = since.map_or_else(String::new, Timestamp::to_iso);
            format!("everything that was applied since {since} is announced and delivered again")
        }
    }
}

fn entry(position: &LogPosition) -> String {
    format!("epoch {} entry {}", position.epoch, position.sequence)
}

fn show(recovery: &RecoveryStatus, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(recovery);
    }
    match &recovery.halted {
        None => output::say("nothing is wrong: log, checkpoint and events fit together"),
        Some(halted) => {
            output::say(format_args!("halted: {}: {}", halted.reason, halted.text));
            output::field("mend", format_args!("leadctl recover {}", halted.remedy));
        }
    }
    output::field("applied", entry(&recovery.applied));
    output::field("announced", entry(&recovery.announced));
    output::field("delivered", format_args!("{} or later", entry(&recovery.delivered)));
    output::field("log", format_args!("entries {} to {}", recovery.log_first, recovery.log_last));
    output::field("generation", recovery.generation);
    Ok(())
}

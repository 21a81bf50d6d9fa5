//! `leadctl callback`.

use clap::Subcommand;
use contract::{
    ObjectId, Timestamp,
    rpc::{CALLBACK_ENABLE, CALLBACK_LIST, CallbackState, CallbackStatus, EnableCallback, Enabled, ListCallbacks},
};

use crate::{admin::Admin, output};

/// Callbacks.
#[derive(Debug, Subcommand)]
pub(crate) enum Callback {
    /// List a project's callbacks and how they fare.
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Enable a callback again after its failures disabled it. What is waiting for it goes out within seconds.
    Enable {
        /// The callback.
        callback_id: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Callback {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { project, admin } => {
                let query = ListCallbacks { project_id: project };
                let callbacks: Vec<CallbackStatus> = admin.call(CALLBACK_LIST, &query).await?;
                if admin.json {
                    return output::json(&callbacks);
                }
                if callbacks.is_empty() {
                    output::say("no callbacks");
                }
                for callback in &callbacks {
                    output::say(line(callback));
                }
            }
            Self::Enable { callback_id, admin } => {
                let enabled: Enabled = admin.call(CALLBACK_ENABLE, &EnableCallback { callback_id }).await?;
                if admin.json {
                    return output::json(&enabled);
                }
                let was = if enabled.was_disabled { "enabled again" } else { "was not disabled; nothing to do" };
                output::say(format_args!("callback {callback_id}: {was}"));
            }
        }
        Ok(())
    }
}

fn line(callback: &CallbackStatus) -> String {
    let CallbackStatus { callback_id, name, process, failing_since, reason, .. } = callback;
    let state = match callback.state {
        CallbackState::Healthy => "healthy",
        CallbackState::Failing => "failing",
        CallbackState::Disabled => "disabled",
        CallbackState::Off => "off",
    };
    let why = match (reason, failing_since.map(Timestamp::to_iso)) {
        (Some(reason), _) => format!("  {reason}"),
        (None, Some(since)) => format!("  since {since}"),
        (None, None) => String::new(),
    };
    format!("{callback_id}  {state:<9} {process}/{name}{why}")
}

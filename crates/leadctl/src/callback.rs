//! `leadctl callback`.

use clap::Subcommand;
use contract::{
    ObjectId,
    rpc::{CALLBACK_ENABLE, EnableCallback, Enabled},
};

use crate::{admin::Admin, output};

/// Callbacks.
#[derive(Debug, Subcommand)]
pub(crate) enum Callback {
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
        let Self::Enable { callback_id, admin } = self;
        let enabled: Enabled = admin.call(CALLBACK_ENABLE, &EnableCallback { callback_id }).await?;
        if admin.json {
            return output::json(&enabled);
        }
        let was = if enabled.was_disabled { "enabled again" } else { "was not disabled; nothing to do" };
        output::say(format_args!("callback {callback_id}: {was}"));
        Ok(())
    }
}

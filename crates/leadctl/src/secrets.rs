//! `leadctl secrets`.

use anyhow::bail;
use clap::Subcommand;
use contract::rpc::{RotateSecrets, RotationResult, SECRETS_ROTATE};
use secrets::new_sealing_key;

use crate::{
    admin::{self, Admin},
    output,
};

/// The keys that the secrets of callbacks are sealed with.
#[derive(Debug, Subcommand)]
pub(crate) enum Secrets {
    /// Make a key and print it: SECRETS_KEY of lead-state and webhook-notifier. It is stored nowhere.
    #[command(after_help = "Example:\n  export SECRETS_KEY=$(leadctl secrets new-key)")]
    NewKey,
    /// Seal every secret anew with lead-state's present key, and say whether older keys are still needed. Safe to repeat.
    #[command(after_help = "Example:\n  leadctl secrets rotate\n\nBefore:\n  1. leadctl secrets new-key\n  \
                      2. restart every webhook-notifier with the new key in SECRETS_KEY, the old one in SECRETS_KEYS_OLD\n  \
                      3. restart every lead-state likewise")]
    Rotate {
        #[command(flatten)]
        admin: Admin,
    },
}

impl Secrets {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::NewKey => {
                output::say(new_sealing_key(rand::random()));
                Ok(())
            }
            Self::Rotate { admin } => rotate(&admin).await,
        }
    }
}

async fn rotate(admin: &Admin) -> anyhow::Result<()> {
    let client = admin.connect().await?;
    let mut resealed = 0;
    let rotated = loop {
        let rotated: RotationResult = admin::call(&client, SECRETS_ROTATE, &RotateSecrets {}).await?;
        resealed += rotated.resealed;
        if rotated.remaining == 0 {
            break RotationResult { resealed, ..rotated };
        }
    };
    if admin.json {
        output::json(&rotated)?;
    } else {
        show(&rotated);
    }
    if !rotated.locked.is_empty() {
        bail!("{} callbacks are not sealed with the present key", rotated.locked.len());
    }
    Ok(())
}

fn show(rotated: &RotationResult) {
    let RotationResult { key_id, resealed, unchanged, locked, .. } = rotated;
    output::say(format_args!("present key {key_id}"));
    output::field("sealed anew", format_args!("{resealed} processes"));
    output::field("unchanged", format_args!("{unchanged} processes"));
    for callback in locked {
        output::field("locked", format_args!("{} of {:?}: {}", callback.callback_id, callback.process, callback.error));
    }
    if locked.is_empty() {
        output::say(
            "Every secret is sealed with the present key: older ones are needed no longer, but to read a backup of before.",
        );
    }
}

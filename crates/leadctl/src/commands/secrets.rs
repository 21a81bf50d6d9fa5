//! `leadctl secrets`.

use anyhow::bail;
use clap::Subcommand;
use contract::rpc::{RotateSecrets, RotationResult};
use secrets::new_sealing_key;

use crate::{
    clients::admin::{self, Admin},
    output,
};

/// Keys that seal callbacks' and sources' secrets.
#[derive(Debug, Subcommand)]
pub(crate) enum Secrets {
    /// Generate a key for SECRETS_KEY of lead-state and webhook-notifier, and print it. It is not stored.
    #[command(after_help = "Example:\n  export SECRETS_KEY=$(leadctl secrets new-key)")]
    NewKey,
    /// Seal every secret with lead-state's current key, and report whether older keys are still needed. Safe to repeat.
    #[command(after_help = "Example:\n  leadctl secrets rotate\n\nFirst:\n  1. leadctl secrets new-key\n  \
                      2. restart every webhook-notifier with the new key in SECRETS_KEY, the old one in \
                      SECRETS_KEYS_OLD\n  \
                      3. restart every lead-state in the same way")]
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
    let mut rotated = admin::request(&client, &RotateSecrets::default()).await?;
    while let Some(cursor) = rotated.next.take() {
        let part = admin::request(&client, &RotateSecrets { cursor: Some(cursor) }).await?;
        rotated = combined(rotated, part);
    }
    output::show(admin.json, &rotated, show)?;
    // From a lead-state without cursors. It begins with the processes that are not sealed yet.
    if rotated.remaining > 0 {
        bail!("{} processes remain; run the command again", rotated.remaining);
    }
    if !rotated.locked.is_empty() {
        bail!("some secrets are not sealed with the current key: {} faults", rotated.locked.len());
    }
    Ok(())
}

/// The result of a rotation up to its last part.
fn combined(before: RotationResult, part: RotationResult) -> RotationResult {
    RotationResult {
        resealed: before.resealed + part.resealed,
        unchanged: before.unchanged + part.unchanged,
        locked: [before.locked, part.locked].concat(),
        ..part
    }
}

pub(crate) fn show(rotated: &RotationResult) {
    let RotationResult { key_id, resealed, unchanged, remaining, locked, .. } = rotated;
    output::say(format_args!("current key {key_id}"));
    output::field("resealed", format_args!("{resealed} processes"));
    output::field("unchanged", format_args!("{unchanged} processes"));
    for callback in locked {
        let owner = callback.callback_id.or(callback.source_id);
        let what = owner.map_or("all callbacks and sources".into(), |id| id.to_string());
        output::field("locked", format_args!("{what} of {:?}: {}", callback.process, callback.error));
    }
    if locked.is_empty() && *remaining == 0 {
        output::say(
            "Every secret is sealed with the current key. Older keys are needed only to restore an older backup.",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_rotation_are_added() {
        let part = |counts: &str| -> RotationResult {
            let locked = r#"{"process":"p","projectId":"010101010101010101010101","callbackId":null,"error":"e"}"#;
            serde_json::from_str(&format!(r#"{{"keyId":"0a0b0c0d",{counts},"locked":[{locked}]}}"#)).unwrap()
        };

        let both = combined(
            part(r#""resealed":2,"unchanged":3,"remaining":9"#),
            part(r#""resealed":5,"unchanged":7,"remaining":1,"next":"c""#),
        );

        assert_eq!((both.resealed, both.unchanged, both.remaining, both.locked.len()), (7, 10, 1, 2));
        assert!(both.next.is_some());
    }
}

//! `leadctl process`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use contract::{
    json::mismatch,
    process::ProcessSpec,
    rpc::{Applied, PROCESS_APPLY},
    sealed::Secret,
};

use crate::{admin::Admin, output};

/// Processes.
#[derive(Debug, Subcommand)]
pub(crate) enum Process {
    /// Make a process what a file says: its states, transitions, callbacks and policies. Applying the same file again
    /// changes nothing; a callback that is not in the file is removed.
    #[command(after_help = "Example:\n  leadctl process apply sales.json\n\nsales.json:\n  \
        {\"projectId\": \"6b0426971c73026dafa27e40\", \"name\": \"Sales\",\n   \
         \"states\": [{\"name\": \"new\", \"kind\": \"initial\"}, {\"name\": \"interested\"},\n              \
                    {\"name\": \"lost\", \"kind\": \"terminal\"}],\n   \
         \"duringCall\": \"queue\",\n   \
         \"transitions\": {\"new\": [\"interested\", \"lost\"], \"interested\": [\"lost\"]},\n   \
         \"callbacks\": [{\"name\": \"crm\", \"url\": \"https://crm.example.com/leads\",\n                  \
                       \"auth\": {\"type\": \"bearer\", \"token\": \"…\"}}]}")]
    Apply {
        /// The file, JSON; - is standard input.
        file: PathBuf,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Process {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self::Apply { file, admin } = self;
        let (text, source) = read(&file)?;
        let spec: ProcessSpec = serde_json::from_str(&text)
            .map_err(|e| anyhow!("{source} does not describe a process: {}", mismatch(&e)))?;
        let faults = spec.faults();
        if !faults.is_empty() {
            bail!("{source} does not describe a process:\n  {}", faults.join("\n  "));
        }
        let applied: Applied = admin.call(PROCESS_APPLY, &spec).await?;
        if admin.json {
            return output::json(&applied);
        }
        show(&applied);
        Ok(())
    }
}

/// The text of the file, and what to call it; `-` is standard input.
fn read(file: &Path) -> anyhow::Result<(String, String)> {
    if file.as_os_str() == "-" {
        let text = io::read_to_string(io::stdin()).context("cannot read standard input")?;
        return Ok((text, "standard input".into()));
    }
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok((text, file.display().to_string()))
}

fn show(applied: &Applied) {
    let Applied { process, changed, changes, new_secrets } = applied;
    let what = match (changed, changes.as_slice()) {
        (false, _) => "unchanged",
        (true, []) => "created",
        (true, _) => "changed",
    };
    output::say(format_args!("process {:?} {what}", process.name));
    for change in changes {
        output::field("change", change);
    }
    if let Some(process_id) = process.process_id {
        output::field("processId", process_id);
    }
    output::field("revision", process.revision);
    let states = process.rules.states.iter().map(|state| state.name.as_str()).collect::<Vec<_>>();
    output::field("states", states.join(", "));
    for callback in &process.callbacks {
        let off = if callback.enabled { "" } else { " (switched off)" };
        output::field("callback", format_args!("{} {} {}{off}", callback.callback_id, callback.name, callback.url));
        if new_secrets.contains(&callback.callback_id) {
            let secrets = callback.secrets.iter().map(Secret::expose).collect::<Vec<_>>();
            output::field("", format_args!("signing secret: {}", secrets.join(" ")));
        }
    }
    if !new_secrets.is_empty() {
        output::say("Keep the signing secrets now: they are not shown again.");
    }
}

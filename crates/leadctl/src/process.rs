//! `leadctl process`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use async_nats::Client;
use clap::Subcommand;
use contract::{
    process::{Process as Stored, ProcessSpec},
    rpc::{Applied, PROCESS_APPLY},
    streams::PROCESSES,
};
use futures::TryStreamExt;
use service_kit::nats::jetstream;

use crate::{
    admin::{self, Admin},
    output,
};

/// Processes.
#[derive(Debug, Subcommand)]
pub(crate) enum Process {
    /// Make a process what a file says: its states, transitions, callbacks and policies. Applying the same file again
    /// changes nothing; a callback that is not in the file is removed.
    #[command(after_help = "Example:\n  leadctl process apply sales.json\n\nsales.json:\n  \
        {\"projectId\": \"6b0426971c73026dafa27e40\", \"name\": \"Sales\",\n   \
         \"states\": [{\"name\": \"new\", \"kind\": \"initial\"}, {\"name\": \"interested\"},\n              \
                    {\"name\": \"lost\", \"kind\": \"terminal\"}],\n   \
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
        let spec: ProcessSpec =
            serde_json::from_str(&text).with_context(|| format!("{source} does not describe a process"))?;
        let faults = spec.faults();
        if !faults.is_empty() {
            bail!("{source} does not describe a process:\n  {}", faults.join("\n  "));
        }
        let client = admin.connect().await?;
        let before = find(&client, &spec).await?;
        let applied: Applied = admin::call(&client, PROCESS_APPLY, &spec).await?;
        if admin.json {
            return output::json(&applied);
        }
        show(before.as_ref(), &applied, &spec);
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

/// The process as it stands, if it is there. By name: its id is lead-state's to give.
async fn find(client: &Client, spec: &ProcessSpec) -> anyhow::Result<Option<Stored>> {
    let bucket = jetstream(client).get_key_value(PROCESSES).await;
    let bucket = bucket.context("cannot find the bucket of processes; lead-state makes it when it starts")?;
    let mut keys = bucket.keys().await.context("cannot list the processes")?;
    let prefix = format!("{}.", spec.project_id);
    while let Some(key) = keys.try_next().await.context("cannot list the processes")? {
        if !key.starts_with(&prefix) {
            continue;
        }
        let Some(value) = bucket.get(&key).await.context("cannot read a process")? else { continue };
        let process: Stored =
            serde_json::from_slice(&value).with_context(|| format!("the process {key} cannot be read"))?;
        if process.name == spec.name {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// What is different now, a line each. Secrets and tokens are compared, not shown.
fn changes(before: &Stored, now: &ProcessSpec) -> Vec<String> {
    let mut changes = Vec::new();
    let rules = now.rules();
    for state in rules.states.iter().filter(|state| before.rules.state(&state.name).is_none()) {
        changes.push(format!("state {} added", state.name));
    }
    for state in &before.rules.states {
        match rules.state(&state.name) {
            None => changes.push(format!("state {} removed", state.name)),
            Some(same) if same != state => changes.push(format!("state {} changed", state.name)),
            Some(_) => {}
        }
    }
    let mut compare = |what: &str, same: bool| {
        if !same {
            changes.push(format!("{what} changed"));
        }
    };
    compare("transitions", rules.transitions == before.rules.transitions);
    compare("metadataMerge", rules.metadata_merge == before.rules.metadata_merge);
    compare("allowLeavingTerminal", rules.allow_leaving_terminal == before.rules.allow_leaving_terminal);
    compare("callTimeoutSeconds", rules.call_timeout_seconds == before.rules.call_timeout_seconds);
    for callback in &now.callbacks {
        let Some(known) = before.callbacks.iter().find(|known| known.name == callback.name) else {
            changes.push(format!("callback {} added", callback.name));
            continue;
        };
        let fields = [
            ("url", callback.url == known.url),
            ("auth", callback.auth == known.auth),
            ("secrets", callback.secrets.as_ref().is_none_or(|secrets| *secrets == known.secrets)),
            ("events", callback.events == known.events),
            ("enabled", callback.enabled == known.enabled),
            ("timeoutSeconds", callback.timeout_seconds == known.timeout_seconds),
            ("maxInFlight", callback.max_in_flight == known.max_in_flight),
            ("maxPerSecond", callback.max_per_second == known.max_per_second),
        ];
        let differ = fields.iter().filter(|(_, same)| !same).map(|(field, _)| *field).collect::<Vec<_>>();
        if !differ.is_empty() {
            changes.push(format!("callback {}: {} changed", callback.name, differ.join(", ")));
        }
    }
    for gone in &before.callbacks {
        if !now.callbacks.iter().any(|callback| callback.name == gone.name) {
            changes.push(format!("callback {} removed", gone.name));
        }
    }
    changes
}

fn show(before: Option<&Stored>, applied: &Applied, spec: &ProcessSpec) {
    let Applied { process, changed, new_secrets } = applied;
    let what = match (changed, before) {
        (false, _) => "unchanged",
        (true, None) => "created",
        (true, Some(_)) => "changed",
    };
    output::say(format_args!("process {:?} {what}", process.name));
    if let Some(before) = before.filter(|_| *changed) {
        for change in changes(before, spec) {
            output::field("change", change);
        }
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
            output::field("", format_args!("signing secret: {}", callback.secrets.join(" ")));
        }
    }
    if !new_secrets.is_empty() {
        output::say("Keep the signing secrets now: they are not shown again.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_and_secrets_are_not_shown() {
        let before: Stored = serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"p",
                "states":[{"name":"new"},{"name":"old"}],
                "callbacks":[{"callbackId":"cccccccccccccccccccccccc","name":"a","url":"http://a","secrets":["s"]},
                             {"callbackId":"dddddddddddddddddddddddd","name":"b","url":"http://b","secrets":["s"]}]}"#,
        )
        .unwrap();
        let now: ProcessSpec = serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","callTimeoutSeconds":5,
                "states":[{"name":"new","kind":"initial"},{"name":"lost"}],
                "callbacks":[{"name":"a","url":"http://a2","auth":{"type":"bearer","token":"hidden"}},
                             {"name":"c","url":"http://c"}]}"#,
        )
        .unwrap();
        assert_eq!(
            changes(&before, &now),
            [
                "state lost added",
                "state new changed",
                "state old removed",
                "callTimeoutSeconds changed",
                "callback a: url, auth changed",
                "callback c added",
                "callback b removed",
            ]
        );
    }
}

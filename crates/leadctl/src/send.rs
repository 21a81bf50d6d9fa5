//! `leadctl update send`: an update over HTTP, with all that the gateway takes beside it.

use std::{borrow::Cow, collections::BTreeMap, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use contract::{JsonObject, ObjectId, json, rpc::UpdateStatus};
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

use crate::{
    exit::Came,
    gateway_client::Gateway,
    output,
    printable::line,
    story::status,
    update::{Accepted, Api},
};

/// How long it waits for the outcome where nothing is said, in seconds.
const WAIT: u64 = 5;
/// The most that the gateway waits, in seconds.
const MAX_WAIT: i64 = 30;

/// Send an update, and say what became of it if that is known within five seconds.
///
/// With --wait it exits with 5 if the update failed and with 7 if its outcome is not known in time; without, with 0 once the update is
/// accepted, whatever becomes of it. With --dry-run it exits with 5 if the update would fail.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --target-state interested --set make=Toyota\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --metadata @car.json --expected-version 4 --wait\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --target-state lost --dry-run")]
pub(crate) struct SendUpdate {
    #[command(flatten)]
    body: Body,
    /// A member to merge into the metadata, as a text; may stand several times, and replaces one of --metadata.
    #[arg(long, value_name = "KEY=VALUE", value_parser = member)]
    set: Vec<(String, String)>,
    /// Only say what would be: nothing is changed.
    #[arg(long, conflicts_with_all = ["wait", "idempotency_key"])]
    dry_run: bool,
    /// Wait so many seconds for the outcome, 30 where no number is given.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "30",
        value_parser = clap::value_parser!(u64).range(1..=MAX_WAIT as u64)
    )]
    wait: Option<u64>,
    /// What makes it the same update when it is sent again: within a day, the same key with the same update is never applied twice.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    api: Api,
}

/// What to change of which lead.
#[derive(Debug, Args, Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    /// The lead.
    #[arg(long, required_unless_present = "reference_id")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lead_id: Option<ObjectId>,
    /// The lead's external id; needs --process-id and --project-id.
    #[arg(long, requires = "process_id", requires = "project_id")]
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    process_id: Option<ObjectId>,
    /// The key's project.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    project_id: Option<ObjectId>,
    /// Members to merge into the lead's metadata: a JSON object, or @ and the file that has it.
    #[arg(long, value_name = "JSON|@FILE", value_parser = metadata)]
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<JsonObject>,
    /// The lead's new name.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The state to move the lead to.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    target_state: Option<String>,
    /// Why, for states that take a disposition.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    disposition: Option<String>,
    /// Who changes the lead, for the audit trail.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    /// Only if the lead is at this version, as `leadctl lead get` and ETag tell it.
    #[arg(long, visible_alias = "if-match", value_name = "VERSION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_version: Option<u32>,
    /// Only if the lead is in this state.
    #[arg(long, value_name = "STATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_state: Option<String>,
    #[arg(skip)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

/// An object, or the file that has one.
fn metadata(text: &str) -> Result<JsonObject, String> {
    let text = match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))?,
        None => text.to_owned(),
    };
    json::check(text.as_bytes()).map_err(|e| e.to_string())?;
    JsonObject::from_text(text.trim().to_owned()).map_err(|e| e.to_string())
}

fn member(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    if key.is_empty() {
        return Err("has no key".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// The metadata with these members.
fn with_members(metadata: Option<JsonObject>, set: Vec<(String, String)>) -> anyhow::Result<Option<JsonObject>> {
    if set.is_empty() {
        return Ok(metadata);
    }
    let mut members = metadata.as_ref().map(JsonObject::members).unwrap_or_default();
    for (key, value) in set {
        members.insert(key.into(), Cow::Owned(to_raw_value(&value).context("cannot write the metadata")?));
    }
    Ok(Some(JsonObject::from_members(&members)))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sent {
    update_id: ObjectId,
    status: UpdateStatus,
    error: Option<String>,
    warnings: Vec<String>,
}

/// The answer to a dry run.
#[derive(Deserialize)]
struct Tried {
    outcome: Outcome,
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    success: bool,
    error: Option<String>,
    error_code: Option<String>,
    from_state: Option<String>,
    to_state: Option<String>,
    version: Option<i64>,
}

impl SendUpdate {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let Self { mut body, set, dry_run, wait, idempotency_key, api: Api { gateway_url, api_key, json } } = self;
        let gateway = Gateway::new(&gateway_url, &api_key)?;
        body.metadata = with_members(body.metadata, set)?;
        body.dry_run = dry_run;
        let mut headers = BTreeMap::new();
        headers.extend(idempotency_key.map(|key| ("idempotency-key", quoted(&key))));
        let seconds = wait.unwrap_or(WAIT);
        if !dry_run {
            headers.insert("prefer", format!("wait={seconds}"));
        }
        let answer = gateway.post_with("/api/v1/leads/update", &body, &headers, Duration::from_secs(seconds)).await?;
        if dry_run {
            let tried: Tried = answer.read()?;
            if json {
                output::say(answer.body.trim_end());
            } else {
                output::say(would(&tried.outcome));
                tried.warnings.iter().for_each(|warning| output::field("warning", line(warning)));
            }
            return Ok(if tried.outcome.success { ExitCode::SUCCESS } else { Came::Failed.into() });
        }
        let Accepted { update_id, warnings, outcome } = answer.read()?;
        let error = outcome.as_ref().and_then(|outcome| outcome.error.clone());
        let came = match outcome {
            None => UpdateStatus::Pending,
            Some(outcome) if outcome.success => UpdateStatus::Succeeded,
            Some(_) => UpdateStatus::Failed,
        };
        if json {
            output::json(&Sent { update_id, status: came, error, warnings })?;
        } else {
            output::say(format_args!("{update_id} {}", status(came)));
            error.iter().for_each(|error| output::field("error", line(error)));
            warnings.iter().for_each(|warning| output::field("warning", line(warning)));
        }
        Ok(match came {
            UpdateStatus::Failed if wait.is_some() => Came::Failed.into(),
            UpdateStatus::Pending if wait.is_some() => Came::TimedOut.into(),
            _ => ExitCode::SUCCESS,
        })
    }
}

/// A string as in RFC 8941, 3.3.3.
fn quoted(key: &str) -> String {
    format!("\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""))
}

fn would(outcome: &Outcome) -> String {
    let Outcome { success, error, error_code, from_state, to_state, version } = outcome;
    if !success {
        let code = error_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
        return format!("it would fail: {}{code}", line(error.as_deref().unwrap_or_default()));
    }
    let states = match (from_state, to_state) {
        (Some(from), Some(to)) if from != to => format!(": {} → {}", line(from), line(to)),
        _ => String::new(),
    };
    let version = version.map(|version| format!(", version {version}")).unwrap_or_default();
    format!("it would succeed{states}{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_put_together() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), " {\"make\": \"Kia\", \"n\": 1.50}\n").unwrap();
        let object = metadata(&format!("@{}", file.path().display())).unwrap();
        let set = ["make=Toyota", "note=a=b", "empty="].map(|text| member(text).unwrap());
        let told = with_members(Some(object), set.to_vec()).unwrap().unwrap();
        assert_eq!(told.get(), r#"{"make":"Toyota","n":1.50,"note":"a=b","empty":""}"#);
        assert!(with_members(None, vec![]).unwrap().is_none());
        for odd in ["[]", "{\"a\":1,\"a\":2}", "@/does/not/exist", "{"] {
            assert!(metadata(odd).is_err(), "{odd}");
        }
        assert!(member("=x").is_err() && member("x").is_err());
        assert_eq!(quoted(r#"a"\"#), r#""a\"\\""#);
    }
}

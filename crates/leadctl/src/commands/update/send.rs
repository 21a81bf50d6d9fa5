//! `leadctl update send`: sends an update over HTTP.

use std::{borrow::Cow, process::ExitCode};

use anyhow::Context;
use clap::Args;
use contract::{JsonObject, ObjectId, json};
use http_api::{DryRunOutcome, DryRunResponse, UpdateRequest};
use serde_json::value::to_raw_value;

use crate::{
    commands::sending::Sending,
    exit_status::ExitStatus,
    output::{self, escape::escaped},
};

/// Send an update, and show its outcome if it is known within five seconds.
///
/// Exits with 0 once the update is accepted. With --wait, exits with 5 if the update failed and with 7 if its outcome
/// is still pending. With --dry-run, exits with 5 if the update would fail.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --target-state interested --set make=Toyota\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --metadata @car.json --expected-version 4 --wait\n  \
    leadctl update send --lead-id 6b0426971c73026dafa27e40 --target-state lost --dry-run")]
pub(crate) struct SendUpdate {
    #[command(flatten)]
    fields: UpdateFields,
    /// A text to merge into the metadata; can be repeated, and takes precedence over --metadata.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_member)]
    set: Vec<(String, String)>,
    /// Show what the update would do, without doing it.
    #[arg(long, conflicts_with_all = ["wait", "idempotency_key"])]
    dry_run: bool,
    #[command(flatten)]
    sending: Sending,
}

#[derive(Debug, Args)]
struct UpdateFields {
    /// The lead.
    #[arg(long, required_unless_present = "reference_id")]
    lead_id: Option<ObjectId>,
    /// The lead's external id; requires --process-id and --project-id.
    #[arg(long, requires = "process_id", requires = "project_id")]
    reference_id: Option<String>,
    /// The process of the external id.
    #[arg(long)]
    process_id: Option<ObjectId>,
    /// The API key's project.
    #[arg(long)]
    project_id: Option<ObjectId>,
    /// A JSON object to merge into the lead's metadata, or @FILE.
    #[arg(long, value_name = "JSON|@FILE", value_parser = parse_metadata)]
    metadata: Option<JsonObject>,
    /// The lead's new name.
    #[arg(long)]
    name: Option<String>,
    /// The state to move the lead to.
    #[arg(long)]
    target_state: Option<String>,
    /// The reason, for states that take a disposition.
    #[arg(long)]
    disposition: Option<String>,
    /// The user who changes the lead, for the audit trail.
    #[arg(long)]
    user_id: Option<String>,
    /// Change the lead only if it has this version, as shown by `leadctl lead get`.
    #[arg(long, visible_alias = "if-match", value_name = "VERSION")]
    expected_version: Option<u32>,
    /// Change the lead only if it is in this state.
    #[arg(long, value_name = "STATE")]
    expected_state: Option<String>,
}

fn parse_metadata(text: &str) -> Result<JsonObject, String> {
    let text = match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))?,
        None => text.to_owned(),
    };
    let text = json::check(text.as_bytes()).map_err(|e| e.to_string())?;
    JsonObject::from_text(text.trim().to_owned()).map_err(|e| e.to_string())
}

fn parse_member(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    if key.is_empty() {
        return Err("has no key".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

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

impl SendUpdate {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let Self { fields, set, dry_run, sending } = self;
        let request = UpdateRequest {
            lead_id: fields.lead_id,
            reference_id: fields.reference_id,
            project_id: fields.project_id,
            process_id: fields.process_id,
            name: fields.name,
            target_state: fields.target_state,
            disposition: fields.disposition,
            user_id: fields.user_id,
            metadata: with_members(fields.metadata, set)?,
        };
        let path = path(dry_run, fields.expected_state.as_deref());
        let (mut headers, longer) = sending.headers();
        headers.extend(fields.expected_version.map(|version| ("if-match", format!("\"{version}\""))));
        if dry_run {
            headers.remove("prefer");
        }
        let response = sending.gateway.client()?.post(&path, &request, &headers, longer).await?;
        if dry_run {
            let DryRunResponse { outcome, warnings, .. } = response.json()?;
            if sending.gateway.json {
                output::json_text(response.body.trim_end());
            } else {
                output::say(preview(&outcome));
                warnings.iter().for_each(|warning| output::field("warning", warning));
            }
            return Ok(if outcome.success { ExitCode::SUCCESS } else { ExitStatus::UpdateFailed.into() });
        }
        sending.report(&response)
    }
}

/// The path, with the options that are not part of the body.
fn path(dry_run: bool, expected_state: Option<&str>) -> String {
    let mut query = form_urlencoded::Serializer::new("/api/v1/leads/update?".to_owned());
    query.extend_pairs(dry_run.then_some(("dryRun", "true")));
    query.extend_pairs(expected_state.map(|state| ("expectedState", state)));
    query.finish().trim_end_matches('?').to_owned()
}

pub(crate) fn preview(outcome: &DryRunOutcome) -> String {
    let DryRunOutcome { success, error, error_code, from_state, to_state, version, .. } = outcome;
    if !success {
        let code = error_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
        return format!("would fail: {}{code}", escaped(error.as_deref().unwrap_or_default()));
    }
    let states = match (from_state, to_state) {
        (Some(from), Some(to)) if from != to => format!(": {} → {}", escaped(from), escaped(to)),
        _ => String::new(),
    };
    let version = version.map(|version| format!(", version {version}")).unwrap_or_default();
    format!("would succeed{states}{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_added_to_metadata_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), " {\"make\": \"Kia\", \"n\": 1.50}\n").unwrap();
        let object = parse_metadata(&format!("@{}", file.path().display())).unwrap();
        let set = ["make=Toyota", "note=a=b", "empty="].map(|text| parse_member(text).unwrap());
        let metadata = with_members(Some(object), set.to_vec()).unwrap().unwrap();
        assert_eq!(metadata.get(), r#"{"make":"Toyota","n":1.50,"note":"a=b","empty":""}"#);
        assert!(with_members(None, vec![]).unwrap().is_none());
    }

    #[test]
    fn invalid_metadata_and_members_are_rejected() {
        for invalid in ["[]", "{\"a\":1,\"a\":2}", "@/does/not/exist", "{"] {
            assert!(parse_metadata(invalid).is_err(), "{invalid}");
        }
        assert!(parse_member("=x").is_err() && parse_member("x").is_err());
    }
}

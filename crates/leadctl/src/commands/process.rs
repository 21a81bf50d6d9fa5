//! `leadctl process`: shows and applies processes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail};
use async_nats::Client;
use clap::Subcommand;
use contract::{
    ObjectId,
    json::{self, redacted_error},
    process::{Callback, CallbackSpec, Process as StoredProcess, ProcessSpec, RequestedUrl, Source, State, StateKind},
    rpc::{
        ChangeProcess, CheckUrls, ErrorCode, GetProcess, ListProcesses, MAX_LIMIT, ProcessChange, ProcessChangeResult,
        ProcessSelector, RpcError,
    },
    secret::Secret,
};
use serde_json::Value;
use service_kit::rpc;

use crate::{
    arguments::InProject,
    clients::admin::{self, Admin},
    commands::paging::Paging,
    output::{self, escape::escaped},
};

/// Processes.
#[derive(Debug, Subcommand)]
pub(crate) enum Process {
    /// List a project's processes by name.
    #[command(after_help = "Example:\n  leadctl process list --project 6b04…")]
    List {
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        scope: InProject,
    },
    /// Show a process: its states, rules and callbacks, without secrets.
    #[command(after_help = "Example:\n  leadctl process get Sales --project 6b04… --spec > sales.json\n  \
                            leadctl process apply sales.json --dry-run")]
    Get {
        /// The process, by id or name; _ for the project's fallback callbacks.
        #[arg(value_name = "PROCESS", value_parser = parse_selector)]
        process: ProcessSelector,
        /// Print a file for `process apply`. It has no secrets; applying it keeps the existing ones.
        #[arg(long)]
        spec: bool,
        #[command(flatten)]
        scope: InProject,
    },
    /// Create or change a process from a file with its states, transitions, callbacks and policies. Applying the same
    /// file again changes nothing. Callbacks that are not in the file are removed.
    #[command(after_help = "Example:\n  leadctl process apply sales.json\n\nsales.json:\n  \
        {\"projectId\": \"6b0426971c73026dafa27e40\", \"name\": \"Sales\",\n   \
         \"states\": [{\"name\": \"new\", \"kind\": \"initial\"}, {\"name\": \"interested\"},\n              \
                    {\"name\": \"lost\", \"kind\": \"terminal\"}],\n   \
         \"duringCall\": \"queue\",\n   \
         \"transitions\": {\"new\": [\"interested\", \"lost\"], \"interested\": [\"lost\"]},\n   \
         \"callbacks\": [{\"name\": \"crm\", \"url\": \"https://crm.example.com/leads\",\n                  \
                       \"auth\": {\"type\": \"bearer\", \"token\": \"…\"}}]}")]
    Apply {
        /// The file, JSON; - for standard input.
        file: PathBuf,
        /// Show what would change, without changing it.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Process {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { paging, scope: InProject { project_id, admin } } => {
                let query = |cursor, limit| ListProcesses { project_id, cursor, limit };
                let head = ["PROCESS", "NAME", "VERSION", "STATES", "CALLBACKS"];
                paging.print(&admin, "no processes", head, query, row).await
            }
            Self::Get { process, spec, scope: InProject { project_id, admin } } => {
                let process = admin.request(&GetProcess { project_id, process }).await?;
                if spec {
                    let spec = self::spec(&process).context("unexpected process from lead-state")?;
                    output::say(serde_json::to_string_pretty(&spec).context("cannot write the process as JSON")?);
                    return Ok(());
                }
                output::show(admin.json, &process, show_process)
            }
            Self::Apply { file, dry_run, admin } => apply(&file, dry_run, &admin).await,
        }
    }
}

async fn apply(file: &Path, dry_run: bool, admin: &Admin) -> anyhow::Result<()> {
    let (text, source) = read(file)?;
    let spec = parse_spec(&text).map_err(|e| anyhow!("{source} is not a valid process: {e}"))?;
    let faults = spec.faults();
    if !faults.is_empty() {
        bail!("{source} is not a valid process:\n  {}", faults.join("\n  "));
    }
    let client = admin.connect().await?;
    warn_of_urls(&client, spec.project_id, &spec.callbacks).await;
    let (project_id, process) = (spec.project_id, ProcessSelector::Named(spec.name.clone()));
    let change = ProcessChange::Put { spec, keep_callbacks: false };
    let query = ChangeProcess { project_id, process, change, expected_revision: None, dry_run };
    output::show(admin.json, &admin::request(&client, &query).await?, |result| show(result, dry_run))
}

fn parse_spec(text: &str) -> Result<ProcessSpec, String> {
    let text = json::check(text.as_bytes()).map_err(|e| e.to_string())?;
    serde_json::from_str(text).map_err(|e| redacted_error(&e))
}

/// Parses the id or name of a process.
pub(crate) fn parse_selector(text: &str) -> Result<ProcessSelector, std::convert::Infallible> {
    Ok(text.parse().map_or_else(|_| ProcessSelector::Named(text.to_owned()), ProcessSelector::Id))
}

pub(crate) fn selector_of(process: &StoredProcess) -> ProcessSelector {
    process.process_id.map_or_else(|| ProcessSelector::Named(process.name.clone()), ProcessSelector::Id)
}

/// Finds a callback and its process.
pub(crate) async fn find_callback(
    client: &Client,
    project_id: ObjectId,
    callback_id: ObjectId,
) -> anyhow::Result<(StoredProcess, Callback)> {
    let mut query = ListProcesses { project_id, cursor: None, limit: MAX_LIMIT };
    loop {
        let page = admin::request(client, &query).await?;
        for process in page.items {
            if let Some(callback) = process.callbacks.iter().find(|callback| callback.callback_id == callback_id) {
                let callback = callback.clone();
                return Ok((process, callback));
            }
        }
        query.cursor = page.next;
        if query.cursor.is_none() {
            let message = "Callback not found; list callbacks with leadctl callback list";
            return Err(admin::explain(RpcError::new(ErrorCode::CallbackNotFound, message)));
        }
    }
}

/// Warns of callbacks whose URL is not allowed. This is no error: the operator can allow the URL later.
pub(crate) async fn warn_of_urls(client: &Client, project_id: ObjectId, callbacks: &[CallbackSpec]) {
    if callbacks.is_empty() {
        return;
    }
    let requested = || callbacks.iter().flat_map(|callback| callback.urls().map(move |url| (&callback.name, url)));
    let urls = CheckUrls { project_id, urls: requested().map(|(_, (_, url))| url.to_owned()).collect() };
    match rpc::request(client, &urls).await {
        Ok(checks) => {
            for ((name, (kind, _)), check) in requested().zip(checks) {
                let what = match kind {
                    RequestedUrl::Callback => "its URL",
                    RequestedUrl::TokenEndpoint => "the URL of its token endpoint",
                };
                if let Some(why) = check.refused {
                    let name = escaped(name);
                    output::note(format_args!("callback {name}: {what} is not allowed: {}", escaped(&why)));
                }
            }
        }
        Err(e) => output::note(format_args!("cannot check whether the callbacks' URLs are allowed: {e}")),
    }
}

/// A stored process as a file for `process apply`.
fn spec(process: &StoredProcess) -> serde_json::Result<ProcessSpec> {
    let mut value = serde_json::to_value(process)?;
    if let Some(members) = value.as_object_mut() {
        members.retain(|name, _| !["processId", "revision"].contains(&name.as_str()));
    }
    for callback in value["callbacks"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        callback.remove("retiringSecrets");
    }
    serde_json::from_value(value)
}

pub(crate) fn row(process: &StoredProcess) -> [String; 5] {
    let process_id = process.process_id.map_or_else(|| process.name.clone(), |id| id.to_string());
    let states = process.rules.states.iter().map(|state| escaped(&state.name)).collect::<Vec<_>>().join(", ");
    [process_id, escaped(&process.name), process.revision.to_string(), states, process.callbacks.len().to_string()]
}

pub(crate) fn show_process(process: &StoredProcess) {
    output::say(format_args!("process {:?} at version {}", process.name, process.revision));
    let state = |state: &State| match state.kind {
        StateKind::Initial => format!("{} (initial)", escaped(&state.name)),
        StateKind::Active => escaped(&state.name),
        StateKind::Terminal => format!("{} (terminal)", escaped(&state.name)),
    };
    let mut rows = Vec::new();
    rows.extend(process.process_id.map(|id| ["  processId".to_owned(), id.to_string()]));
    rows.push(["  states".into(), process.rules.states.iter().map(state).collect::<Vec<_>>().join(", ")]);
    for (from, to) in process.rules.transitions.iter().flatten() {
        let to = to.iter().map(|name| escaped(name)).collect::<Vec<_>>().join(", ");
        rows.push(["  transitions".into(), format!("{} → {to}", escaped(from))]);
    }
    // The other rules.
    for (name, value) in serde_json::to_value(&process.rules).ok().iter().filter_map(Value::as_object).flatten() {
        match value {
            Value::String(text) => rows.push([format!("  {name}"), text.clone()]),
            Value::Bool(_) | Value::Number(_) => rows.push([format!("  {name}"), value.to_string()]),
            _ => {}
        }
    }
    output::say(output::table(None, &rows));
    if process.callbacks.is_empty() {
        output::say("no callbacks");
        show_sources(process);
        return;
    }
    let head = ["CALLBACK", "NAME", "URL", "ENABLED", "OLD SECRETS UNTIL"];
    let row = |callback: &Callback| {
        let until = callback.retiring_secrets.iter().map(|retiring| retiring.until.to_iso()).max().unwrap_or_default();
        let enabled = if callback.enabled { "yes" } else { "no" };
        [callback.callback_id.to_string(), escaped(&callback.name), escaped(&callback.url), enabled.to_owned(), until]
    };
    output::say(output::table(Some(head), &process.callbacks.iter().map(row).collect::<Vec<_>>()));
    show_sources(process);
}

fn show_sources(process: &StoredProcess) {
    let row = |source: &Source| {
        let enabled = if source.enabled { "yes" } else { "no" };
        [source.source_id.to_string(), escaped(&source.name), source.platform.to_string(), enabled.to_owned()]
    };
    if !process.sources.is_empty() {
        let rows: Vec<_> = process.sources.iter().map(row).collect();
        output::say(output::table(Some(["SOURCE", "NAME", "PLATFORM", "ENABLED"]), &rows));
    }
}

/// Reads a file, or standard input for `-`; returns the text and a name for error texts.
fn read(file: &Path) -> anyhow::Result<(String, String)> {
    if file.as_os_str() == "-" {
        let text = io::read_to_string(io::stdin()).context("cannot read standard input")?;
        return Ok((text, "standard input".into()));
    }
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok((text, file.display().to_string()))
}

/// Shows what a change did, or would do.
pub(crate) fn show(result: &ProcessChangeResult, dry_run: bool) {
    let ProcessChangeResult { process, changed, created, changes, warnings, new_secrets } = result;
    let what = match (changed, created, dry_run) {
        (false, ..) => "unchanged",
        (true, true, false) => "created",
        (true, true, true) => "would be created",
        (true, false, false) => "changed",
        (true, false, true) => "would be changed",
    };
    output::say(format_args!("process {:?} {what}", process.name));
    for change in changes {
        output::field("change", change);
    }
    for warning in warnings {
        output::field("warning", escaped(warning));
    }
    if dry_run {
        return;
    }
    if let Some(process_id) = process.process_id {
        output::field("processId", process_id);
    }
    output::field("version", process.revision);
    let states = process.rules.states.iter().map(|state| state.name.as_str()).collect::<Vec<_>>();
    output::field("states", states.join(", "));
    for callback in &process.callbacks {
        let off = if callback.enabled { "" } else { " (switched off)" };
        output::field("callback", format_args!("{} {} {}{off}", callback.callback_id, callback.name, callback.url));
        if new_secrets.contains(&callback.callback_id) {
            show_secrets(callback);
        }
    }
    for source in &process.sources {
        output::field("source", format_args!("{} {} {}", source.source_id, source.name, source.platform));
    }
    if !new_secrets.is_empty() {
        output::say("Save the signing secrets now: they cannot be shown again.");
    }
}

/// Shows a callback's new signing secrets.
pub(crate) fn show_secrets(callback: &Callback) {
    let secrets = callback.secrets.iter().map(Secret::expose).collect::<Vec<_>>();
    output::field("", format_args!("signing secret: {}", secrets.join(" ")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_process_can_be_applied() {
        let text = r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":7,"name":"p",
            "states":[{"name":"new"}],"metadataMerge":"deep",
            "callbacks":[{"callbackId":"050505050505050505050505","name":"a","url":"https://a.example","maxPerSecond":5,
                          "auth":{"type":"bearer"},"headers":[{"name":"X-Key"}],"retiringSecrets":[{"until":5}]}]}"#;
        let process: StoredProcess = serde_json::from_str(text).unwrap();
        let spec = spec(&process).unwrap();
        assert_eq!(spec.faults(), Vec::<String>::new());
        assert_eq!(spec.rules(), process.rules);
        let callback = &spec.callbacks[0];
        assert_eq!((callback.callback_id, callback.max_per_second), (Some(process.callbacks[0].callback_id), Some(5)));
        assert_eq!(callback.auth, process.callbacks[0].auth);
        assert_eq!(row(&process)[1..], ["p", "7", "new", "1"]);
    }

    #[test]
    fn a_process_is_selected_by_id_or_name() {
        assert_eq!(
            parse_selector("bbbbbbbbbbbbbbbbbbbbbbbb"),
            Ok(ProcessSelector::Id(ObjectId::from_bytes([0xbb; 12])))
        );
        assert_eq!(parse_selector("Sales"), Ok(ProcessSelector::Named("Sales".into())));
    }
}

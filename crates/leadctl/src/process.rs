//! `leadctl process`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow, bail};
use async_nats::Client;
use clap::Subcommand;
use contract::{
    ObjectId,
    json::redacted_error,
    process::{Callback, CallbackSpec, Process as Found, ProcessSpec, State, StateKind},
    rpc::{
        CALLBACK_CHECK, ChangeProcess, CheckUrls, Cursor, GetProcess, ListProcesses, MAX_LIMIT, PROCESS_CHANGE,
        PROCESS_GET, PROCESS_LIST, Page, ProcessChange, ProcessChangeResult, ProcessSelector, RpcError, UrlCheck,
    },
    secret::Secret,
};
use serde_json::Value;
use service_kit::rpc;

use crate::{
    admin::{self, Admin},
    output,
    pages::Paging,
    printable::line,
};

/// Processes.
#[derive(Debug, Subcommand)]
pub(crate) enum Process {
    /// List a project's processes, by name.
    #[command(after_help = "Example:\n  leadctl process list --project 6b04…")]
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        paging: Paging,
        #[command(flatten)]
        admin: Admin,
    },
    /// Show a process: its states, rules and callbacks; no secrets.
    #[command(after_help = "Example:\n  leadctl process get Sales --project 6b04… --spec > sales.json\n  \
                            leadctl process apply sales.json --dry-run")]
    Get {
        /// The process, by its id or name; _ are the project's fallback callbacks.
        #[arg(value_name = "PROCESS", value_parser = which)]
        process: ProcessSelector,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// Print the file that `process apply` takes. Secrets are left out, and stay as they are when it is applied.
        #[arg(long)]
        spec: bool,
        #[command(flatten)]
        admin: Admin,
    },
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
        /// Only say what would change.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Process {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { project, paging, admin } => {
                let nats = admin.connect().await?;
                let ask = async |cursor: Option<Cursor>, limit: u32| {
                    let query = ListProcesses { project_id: project, cursor, limit };
                    admin::call::<_, Page<Found>>(&nats, PROCESS_LIST, &query).await
                };
                let head = ["PROCESS", "NAME", "VERSION", "STATES", "CALLBACKS"];
                paging.print(admin.json, "no processes", head, ask, row).await
            }
            Self::Get { process, project, spec, admin } => {
                let query = GetProcess { project_id: project, process };
                let process: Found = admin.call(PROCESS_GET, &query).await?;
                if spec {
                    let spec = self::spec(&process).context("the process is odd")?;
                    output::say(serde_json::to_string_pretty(&spec).context("cannot write the process as JSON")?);
                    return Ok(());
                }
                if admin.json {
                    return output::json(&process);
                }
                show_process(&process);
                Ok(())
            }
            Self::Apply { file, dry_run, admin } => apply(&file, dry_run, &admin).await,
        }
    }
}

async fn apply(file: &Path, dry_run: bool, admin: &Admin) -> anyhow::Result<()> {
    let (text, source) = read(file)?;
    let spec: ProcessSpec = serde_json::from_str(&text)
        .map_err(|e| anyhow!("{source} does not describe a process: {}", redacted_error(&e)))?;
    let faults = spec.faults();
    if !faults.is_empty() {
        bail!("{source} does not describe a process:\n  {}", faults.join("\n  "));
    }
    let nats = admin.connect().await?;
    warn_of_urls(&nats, &spec.callbacks).await;
    let (project_id, process) = (spec.project_id, ProcessSelector::Named(spec.name.clone()));
    let change = ProcessChange::Put { spec, keep_callbacks: false };
    let query = ChangeProcess { project_id, process, change, expected_revision: None, dry_run };
    let applied: ProcessChangeResult = admin::call(&nats, PROCESS_CHANGE, &query).await?;
    if admin.json {
        return output::json(&applied);
    }
    show(&applied, dry_run);
    Ok(())
}

/// A process by its id, or by its name.
pub(crate) fn which(text: &str) -> Result<ProcessSelector, std::convert::Infallible> {
    Ok(text.parse().map_or_else(|_| ProcessSelector::Named(text.to_owned()), ProcessSelector::Id))
}

/// How a stored process is named.
pub(crate) fn which_of(process: &Found) -> ProcessSelector {
    process.process_id.map_or_else(|| ProcessSelector::Named(process.name.clone()), ProcessSelector::Id)
}

/// The process that has this callback, and the callback.
pub(crate) async fn find_callback(
    nats: &Client,
    project_id: ObjectId,
    callback_id: ObjectId,
) -> anyhow::Result<(Found, Callback)> {
    let mut query = ListProcesses { project_id, cursor: None, limit: MAX_LIMIT };
    loop {
        let page: Page<Found> = admin::call(nats, PROCESS_LIST, &query).await?;
        for process in page.items {
            if let Some(callback) = process.callbacks.iter().find(|callback| callback.callback_id == callback_id) {
                let callback = callback.clone();
                return Ok((process, callback));
            }
        }
        query.cursor = page.next;
        if query.cursor.is_none() {
            let message = "Callback not found: leadctl callback list shows those that there are";
            return Err(admin::explain(RpcError::new(404, "callback_not_found", message)));
        }
    }
}

/// Says of which callbacks the URL would not be called. An operator may mend that later: it is no reason to refuse.
pub(crate) async fn warn_of_urls(nats: &Client, callbacks: &[CallbackSpec]) {
    if callbacks.is_empty() {
        return;
    }
    let urls = CheckUrls { urls: callbacks.iter().map(|callback| callback.url.clone()).collect() };
    match rpc::query::<_, Vec<UrlCheck>>(nats, CALLBACK_CHECK, &urls).await {
        Ok(checks) => {
            for (callback, check) in callbacks.iter().zip(checks) {
                if let Some(why) = check.refused {
                    eprintln!("leadctl: callback {}: its URL will not be called: {}", line(&callback.name), line(&why));
                }
            }
        }
        Err(e) => eprintln!("leadctl: whether the callbacks' URLs may be called could not be checked: {e}"),
    }
}

/// A process as it would be written to be applied.
fn spec(process: &Found) -> serde_json::Result<ProcessSpec> {
    let mut value = serde_json::to_value(process)?;
    if let Some(members) = value.as_object_mut() {
        members.retain(|name, _| !["processId", "revision"].contains(&name.as_str()));
    }
    for callback in value["callbacks"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        callback.remove("retiringSecrets");
    }
    serde_json::from_value(value)
}

fn row(process: &Found) -> [String; 5] {
    let process_id = process.process_id.map_or_else(|| process.name.clone(), |id| id.to_string());
    let states = process.rules.states.iter().map(|state| line(&state.name)).collect::<Vec<_>>().join(", ");
    [process_id, line(&process.name), process.revision.to_string(), states, process.callbacks.len().to_string()]
}

fn show_process(process: &Found) {
    output::say(format_args!("process {:?} at version {}", process.name, process.revision));
    let state = |state: &State| match state.kind {
        StateKind::Initial => format!("{} (initial)", line(&state.name)),
        StateKind::Active => line(&state.name),
        StateKind::Terminal => format!("{} (terminal)", line(&state.name)),
    };
    let mut rows = Vec::new();
    rows.extend(process.process_id.map(|id| ["  processId".to_owned(), id.to_string()]));
    rows.push(["  states".into(), process.rules.states.iter().map(state).collect::<Vec<_>>().join(", ")]);
    for (from, to) in process.rules.transitions.iter().flatten() {
        let to = to.iter().map(|name| line(name)).collect::<Vec<_>>().join(", ");
        rows.push(["  transitions".into(), format!("{} → {to}", line(from))]);
    }
    // Whatever other rules there are.
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
        return;
    }
    let head = ["CALLBACK", "NAME", "URL", "ENABLED", "OLD SECRETS UNTIL"];
    let row = |callback: &Callback| {
        let until = callback.retiring_secrets.iter().map(|retiring| retiring.until.to_iso()).max().unwrap_or_default();
        let enabled = if callback.enabled { "yes" } else { "no" };
        [callback.callback_id.to_string(), line(&callback.name), line(&callback.url), enabled.to_owned(), until]
    };
    output::say(output::table(Some(head), &process.callbacks.iter().map(row).collect::<Vec<_>>()));
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

/// Shows what a change did, or would do.
pub(crate) fn show(applied: &ProcessChangeResult, dry_run: bool) {
    let ProcessChangeResult { process, changed, created, changes, new_secrets } = applied;
    let what = match (changed, created, dry_run) {
        (false, ..) => "unchanged",
        (true, true, false) => "created",
        (true, true, true) => "would be created",
        (true, false, false) => "changed",
        (true, false, true) => "would be changed",
    };
    output::say(format_args!("process {:?} {what}", process.name));
    for change in changes {
        output::field("change", line(change));
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
    if !new_secrets.is_empty() {
        output::say("Keep the signing secrets now: they are not shown again.");
    }
}

/// Shows secrets that nobody has seen yet.
pub(crate) fn show_secrets(callback: &Callback) {
    let secrets = callback.secrets.iter().map(Secret::expose).collect::<Vec<_>>();
    output::field("", format_args!("signing secret: {}", secrets.join(" ")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_applied() {
        let text = r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":7,"name":"p",
            "states":[{"name":"new"}],"metadataMerge":"deep",
            "callbacks":[{"callbackId":"050505050505050505050505","name":"a","url":"https://a.example","maxPerSecond":5,
                          "auth":{"type":"bearer"},"retiringSecrets":[{"until":5}]}]}"#;
        let process: Found = serde_json::from_str(text).unwrap();
        let spec = spec(&process).unwrap();
        assert_eq!(spec.faults(), Vec::<String>::new());
        assert_eq!(spec.rules(), process.rules);
        let callback = &spec.callbacks[0];
        assert_eq!((callback.callback_id, callback.max_per_second), (Some(process.callbacks[0].callback_id), Some(5)));
        assert_eq!(callback.auth, process.callbacks[0].auth);
        assert_eq!(row(&process)[1..], ["p", "7", "new", "1"]);
    }

    #[test]
    fn a_process_is_named_by_id_or_name() {
        assert_eq!(which("bbbbbbbbbbbbbbbbbbbbbbbb"), Ok(ProcessSelector::Id(ObjectId::from_bytes([0xbb; 12]))));
        assert_eq!(which("Sales"), Ok(ProcessSelector::Named("Sales".into())));
    }
}

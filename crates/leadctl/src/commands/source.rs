//! `leadctl source`: configures the voice platforms that report calls.

use anyhow::bail;
use clap::{Args, Subcommand};
use contract::{
    ObjectId,
    process::{IngestId, Platform, Process as StoredProcess, Source as StoredSource, SourceSpec},
    rpc::{
        ChangeProcess, ErrorCode, ListProcesses, MAX_LIMIT, ProcessChange, ProcessChangeResult, ProcessSelector,
        RpcError,
    },
};
use serde::Serialize;

use crate::{
    arguments::InProject,
    clients::admin,
    commands::process::{parse_selector, selector_of},
    output::{self, escape::escaped},
};

/// Sources of call reports.
#[derive(Debug, Subcommand)]
pub(crate) enum Source {
    /// List a project's sources, with the path that each platform sends its webhooks to.
    #[command(after_help = "Example:\n  leadctl source list --project 6b04…")]
    List {
        #[command(flatten)]
        scope: InProject,
    },
    /// Add a source to a process.
    #[command(after_help = "Example:\n  SOURCE_SECRETS=… leadctl source add --project 6b04… --process Sales \\\n    \
                      --name dialer --platform retell")]
    Add {
        /// The process, by id or name; _ for a source whose calls name their leads by leadId or by processId.
        #[arg(long, value_parser = parse_selector)]
        process: ProcessSelector,
        /// A name, unique in the process.
        #[arg(long)]
        name: String,
        /// The platform: vapi, retell or bland.
        #[arg(long)]
        platform: Platform,
        #[command(flatten)]
        secrets: NewSecrets,
        #[command(flatten)]
        scope: InProject,
    },
    /// Replace the secrets of a source. To rotate one, give both, then the new one alone.
    #[command(
        after_help = "Example:\n  SOURCE_SECRETS=new,old leadctl source set-secrets 6b0426971c73026dafa27e40 \\\n    \
                            --project 6b04…"
    )]
    SetSecrets {
        /// The source.
        source_id: ObjectId,
        #[command(flatten)]
        secrets: NewSecrets,
        #[command(flatten)]
        scope: InProject,
    },
    /// Remove a source. Its reports are refused from then on.
    #[command(after_help = "Example:\n  leadctl source remove 6b0426971c73026dafa27e40 --project 6b04…")]
    Remove {
        /// The source.
        source_id: ObjectId,
        #[command(flatten)]
        scope: InProject,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NewSecrets {
    /// The secrets that the platform signs with or sends, separated by commas. Prefer the environment variable: other
    /// users of this machine can see arguments.
    #[arg(
        long = "secret",
        env = "SOURCE_SECRETS",
        hide_env_values = true,
        value_name = "SECRET",
        value_delimiter = ',',
        required = true
    )]
    secrets: Vec<String>,
}

/// A source as it is listed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ListedSource {
    #[serde(flatten)]
    source: StoredSource,
    process: String,
    ingest_path: String,
}

impl Source {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { scope: InProject { project_id, admin } } => {
                let client = admin.connect().await?;
                let mut listed = Vec::new();
                find_process(&client, project_id, |process| {
                    listed.extend(process.sources.iter().map(|source| list_item(process, source)));
                    false
                })
                .await?;
                let head = ["SOURCE", "PLATFORM", "PROCESS", "NAME", "PATH"];
                output::show(admin.json, &listed, |listed| output::list("no sources", head, listed, row))
            }
            Self::Add { process, name, platform, secrets, scope: InProject { project_id, admin } } => {
                let source = checked(SourceSpec {
                    source_id: None,
                    name,
                    platform,
                    secrets: Some(secrets.into_secrets()),
                    enabled: true,
                })?;
                let client = admin.connect().await?;
                let change = ProcessChange::AddSource { source };
                let query = ChangeProcess { project_id, process, change, expected_revision: None, dry_run: false };
                output::show(admin.json, &admin::request(&client, &query).await?, show)
            }
            Self::SetSecrets { source_id, secrets, scope } => {
                let secrets = secrets.into_secrets();
                change_source(&scope, source_id, |source| {
                    let source = checked(SourceSpec {
                        source_id: None,
                        name: source.name.clone(),
                        platform: source.platform,
                        secrets: Some(secrets),
                        enabled: source.enabled,
                    })?;
                    Ok(ProcessChange::PutSource { source_id, source })
                })
                .await
            }
            Self::Remove { source_id, scope } => {
                change_source(&scope, source_id, |_| Ok(ProcessChange::RemoveSource { source_id })).await
            }
        }
    }
}

impl NewSecrets {
    fn into_secrets(self) -> Vec<contract::secret::Secret> {
        self.secrets.into_iter().map(Into::into).collect()
    }
}

fn checked(source: SourceSpec) -> anyhow::Result<SourceSpec> {
    let faults = source.faults();
    if !faults.is_empty() {
        bail!("{}", faults.join("\n  "));
    }
    Ok(source)
}

/// Reads a project's processes until one matches.
async fn find_process(
    client: &async_nats::Client,
    project_id: ObjectId,
    mut matches: impl FnMut(&StoredProcess) -> bool,
) -> anyhow::Result<Option<StoredProcess>> {
    let mut query = ListProcesses { project_id, cursor: None, limit: MAX_LIMIT };
    loop {
        let page = admin::request(client, &query).await?;
        if let Some(found) = page.items.into_iter().find(|process| matches(process)) {
            return Ok(Some(found));
        }
        query.cursor = page.next;
        if query.cursor.is_none() {
            return Ok(None);
        }
    }
}

/// Changes the process of a source, and shows the result.
async fn change_source(
    scope: &InProject,
    source_id: ObjectId,
    change: impl FnOnce(&StoredSource) -> anyhow::Result<ProcessChange>,
) -> anyhow::Result<()> {
    let InProject { project_id, admin } = scope;
    let client = admin.connect().await?;
    let has_source = |process: &StoredProcess| process.sources.iter().any(|source| source.source_id == source_id);
    let process = find_process(&client, *project_id, has_source).await?;
    let source = process.iter().flat_map(|process| &process.sources).find(|source| source.source_id == source_id);
    let (Some(process), Some(source)) = (&process, source) else {
        let message = "Source not found; list sources with leadctl source list";
        return Err(admin::explain(RpcError::new(ErrorCode::SourceNotFound, message)));
    };
    let (process, change) = (selector_of(process), change(source)?);
    let query = ChangeProcess { project_id: *project_id, process, change, expected_revision: None, dry_run: false };
    output::show(admin.json, &admin::request(&client, &query).await?, show)
}

fn show(result: &ProcessChangeResult) {
    let ProcessChangeResult { process, changes, .. } = result;
    output::say(format_args!("process {:?} changed to version {}", process.name, process.revision));
    for change in changes {
        output::field("change", escaped(change));
    }
    for source in &process.sources {
        let path = list_item(process, source).ingest_path;
        output::field("source", format_args!("{} {} {path}", source.source_id, escaped(&source.name)));
    }
}

fn list_item(process: &StoredProcess, source: &StoredSource) -> ListedSource {
    let (project_id, process_id) = (process.project_id, process.process_id);
    let id = IngestId { project_id, process_id, source_id: source.source_id };
    ListedSource { source: source.clone(), process: process.name.clone(), ingest_path: id.path(source.platform) }
}

fn row(ListedSource { source, process, ingest_path }: &ListedSource) -> [String; 5] {
    let off = if source.enabled { "" } else { " (switched off)" };
    let platform = format!("{}{off}", source.platform);
    [source.source_id.to_string(), platform, escaped(process), escaped(&source.name), ingest_path.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_listed_with_its_path() {
        let process: StoredProcess = serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"p","callbacks":[],
                "sources":[{"sourceId":"050505050505050505050505","name":"a","platform":"vapi","enabled":false}]}"#,
        )
        .unwrap();

        let row = row(&list_item(&process, &process.sources[0]));

        let path =
            "/api/v1/calls/ingest/vapi/aaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbbbbbbbbbb-050505050505050505050505";
        assert_eq!(row, ["050505050505050505050505", "vapi (switched off)", "p", "a", path]);
    }

    #[test]
    fn a_short_secret_is_refused_before_it_is_sent() {
        let secrets = Some(NewSecrets { secrets: vec!["short".into()] }.into_secrets());
        let source =
            SourceSpec { source_id: None, name: "a".into(), platform: Platform::Bland, secrets, enabled: true };

        let error = checked(source).unwrap_err().to_string();

        assert!(error.contains("16 to 4096") && !error.contains("short"), "{error}");
    }
}

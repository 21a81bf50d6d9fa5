//! `leadctl import`: sends updates from a file through the gateway, and writes the outcome of each row to a file next
//! to it.
//!
//! The file is checked and counted first, then sent in chunks: one bulk request at a time, so that the log has the
//! updates in the order of the file. Outcomes arrive as events and are written when a chunk has all of them. Memory
//! holds one chunk's bodies, and ids and outcomes of at most [`importer::WINDOW_ROWS`] rows.
//!
//! A chunk's `Idempotency-Key` is the import's run id and the chunk's first row. An interrupted import sends its chunks
//! again under the same keys, which creates no further updates
//! (docs/adr/0029-resume-imports-by-resending-under-idempotency-keys.md).

mod check;
mod columns;
mod csv_reader;
mod files;
mod follow;
mod importer;
mod rows;
mod send;
mod text;
mod window;

use std::{fs::File, io::Read, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use contract::ObjectId;
use serde::Serialize;
use service_kit::clock;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::{
    clients::gateway::GatewayClient,
    exit_status::ExitStatus,
    import::{
        check::FileCheck,
        files::{Counts, Earlier, ImportFiles, Run},
        importer::{Importer, KEY_LIFETIME},
        rows::{Format, LeadScope, Separator, Source},
    },
    output,
};

/// Send updates from a CSV or NDJSON file, and write the outcome of each row to a file next to it.
///
/// FILE.outcomes.csv (or .ndjson) has a row per row of the file, with its updateId and its status: succeeded; failed or
/// rejected, with the reason; invalid, if the row itself is wrong and was not sent; pending, if the outcome did not
/// arrive in time; unknown, if an interrupted chunk is too old to be sent again.
///
/// The header of a CSV file names its columns: leadId, referenceId, projectId, processId, name, targetState,
/// disposition, userId are fields of the update, $expectedVersion and $expectedState are the version and the state that
/// the lead must have, metadata is a JSON object to merge, and every other column is a text member of the metadata.
/// metadata.KEY is a member KEY even if KEY is the name of a field. Empty cells are left out. A line of an NDJSON file
/// is a line of a bulk request of the HTTP API. Files may be UTF-8 or UTF-16, and the cells of a CSV file separated by
/// commas, semicolons or tabs.
///
/// An import can be stopped or killed at any time. With --resume it continues and applies nothing twice; it also
/// requests the outcomes of pending rows again, within 23 hours. FILE.import.json holds its progress. A file that was
/// imported before is refused, unless --again sends all of its rows again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    leadctl import leads.csv --dry-run\n  \
    leadctl import leads.csv\n  \
    leadctl import leads.csv --resume\n  \
    leadctl import export.txt --separator tab\n  \
    leadctl import crm.csv --project-id 6b04… --process-id 6b04…    rows with a referenceId\n\n\
    Exits with 0 if all rows succeeded, 5 if some did not, 7 if some are pending, 130 if Ctrl-C stopped it.")]
pub(crate) struct Import {
    /// The file: .csv (.tsv, .txt), or .ndjson (.jsonl) with one update per line.
    file: PathBuf,
    /// The project for rows that have a referenceId and no projectId.
    #[arg(long, value_name = "ID")]
    project_id: Option<ObjectId>,
    /// The process for rows that have a referenceId and no processId.
    #[arg(long, value_name = "ID")]
    process_id: Option<ObjectId>,
    /// Check the file and count its rows; send nothing.
    #[arg(long)]
    dry_run: bool,
    /// Continue an interrupted import of this file, or start it if there is none.
    #[arg(long, conflicts_with = "dry_run")]
    resume: bool,
    /// Send all rows, even if the file was imported before; its outcomes are replaced.
    #[arg(long, conflicts_with_all = ["dry_run", "resume"])]
    again: bool,
    /// What separates the cells of a CSV file: comma, semicolon, tab, or a character. By default it is
    /// detected from the header.
    #[arg(long, value_name = "SEPARATOR")]
    separator: Option<Separator>,
    /// How long to wait for the next outcome; 0s does not wait for outcomes.
    #[arg(long, default_value = "60s", value_name = "DURATION")]
    wait: humantime::Duration,
    /// URL of the gateway.
    #[arg(long, env = "LEADRELAY_GATEWAY_URL", default_value = "http://127.0.0.1:8080")]
    gateway_url: String,
    /// An API key with leads:write and, unless --wait is 0s, leads:read.
    #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true, required_unless_present = "dry_run")]
    api_key: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Import {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let format = Format::of(&self.file)?;
        let scope = LeadScope { project_id: self.project_id, process_id: self.process_id };
        let source = Source { path: self.file, format, scope, separator: self.separator };
        let check = FileCheck::run(&source)?;
        let Some(api_key) = self.api_key.as_deref().filter(|_| !self.dry_run) else {
            return check.show(self.json);
        };
        let gateway = GatewayClient::new(&self.gateway_url, api_key)?;
        let now = clock::now();
        let run = Run {
            run_id: ObjectId::new(now, rand::random()),
            started_at: now,
            digest: digest(&source)?,
            gateway_url: self.gateway_url,
            rows: check.rows,
        };
        let earlier = match (self.resume, self.again) {
            (true, _) => Earlier::Resume,
            (_, true) => Earlier::Replace,
            _ => Earlier::Refuse,
        };
        let mut files = ImportFiles::open(&source.path, format, run, earlier)?;
        check.remarks().for_each(output::note);
        let wait = Duration::from(self.wait);
        if !wait.is_zero() {
            files.rewind_to_pending(now.minus(KEY_LIFETIME))?;
        }
        if files.state.is_complete() {
            output::note(format_args!("{}; nothing was sent now", files.state.describe()));
        }
        let started = Instant::now();
        let importer = Importer::new(gateway, &source, files, now, wait, check.rows)?;
        let files = tokio::select! {
            done = importer.run() => done?,
            _ = tokio::signal::ctrl_c() => {
                output::note("stopped; run the same command with --resume to continue");
                return Ok(ExitStatus::Interrupted.into());
            }
        };
        let summary = Summary {
            rows: files.state.written.rows(),
            outcomes: files.outcomes_path().to_string_lossy().into_owned(),
            counts: files.state.written.clone(),
        };
        output::show(self.json, &summary, |summary| output::say(summary.text(started.elapsed())))?;
        Ok(exit_code(&summary.counts))
    }
}

fn exit_code(counts: &Counts) -> ExitCode {
    if counts.failed + counts.rejected + counts.invalid + counts.unknown > 0 {
        ExitStatus::UpdateFailed.into()
    } else if counts.pending > 0 {
        ExitStatus::TimedOut.into()
    } else {
        ExitCode::SUCCESS
    }
}

#[derive(Debug, Serialize)]
struct Summary {
    rows: u64,
    #[serde(flatten)]
    counts: Counts,
    outcomes: String,
}

impl Summary {
    fn text(&self, took: Duration) -> String {
        let took = humantime::format_duration(Duration::from_secs(took.as_secs().max(1)));
        format!("{} rows in {took}: {}\noutcomes of all rows: {}", self.rows, self.counts, self.outcomes)
    }
}

/// Identifies the file's content and options: an import is resumed only if they are the same.
fn digest(source: &Source) -> anyhow::Result<String> {
    let Source { path, scope, separator, .. } = source;
    let mut digest = Sha256::new();
    // This version must change whenever the same file would be sent in other chunks or with other bodies.
    let options = (scope.project_id, scope.process_id, separator);
    digest.update(format!("leadrelay import 3\n{options:?}\n"));
    let mut read = || {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok::<_, std::io::Error>(()),
                bytes => digest.update(&buffer[..bytes]),
            }
        }
    };
    read().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex::encode(&digest.finalize()[..16]))
}

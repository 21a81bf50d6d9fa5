//! `leadctl import`: updates from a file, through the gateway, with what became of each row written beside it.
//!
//! The file is checked and counted first. Then it is sent, a chunk of rows in a bulk request, one request at a time, so that
//! its updates are logged in its order. Outcomes come as events, and are written when all of a chunk are there. What is held
//! is one chunk, and of at most [`WINDOW_ROWS`] rows whose they are and what became of them.
//!
//! A chunk's `Idempotency-Key` follows from the file's content and its first row. So whatever is cut off, and wherever, is
//! sent again under the same key, and is the same updates (docs/adr/0029-resume-imports-by-resending-under-idempotency-keys.md).

mod columns;
mod files;
mod follow;
mod rows;
mod send;
mod window;

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use contract::{ObjectId, Timestamp};
use serde::Serialize;
use service_kit::clock;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    exit::Came,
    gateway_client::Gateway,
    import::{
        files::{Counts, Files, State},
        follow::{Follower, Heard, Outcome},
        rows::{Format, Place, Row, Rows},
        window::{Chunk, Fate, Record, Window},
    },
    output,
    printable::line,
    progress::Bar,
};

/// Most rows of a chunk. More of them are more to send again, fewer more requests. To change it, or the next one, changes
/// what a chunk's key stands for: then [`digest`] must change, too.
const CHUNK_ROWS: usize = 1000;
/// With how many bytes a chunk has enough, even with fewer rows.
const CHUNK_BYTES: usize = 1 << 20;
/// Of how many rows outcomes are awaited at once: with more, nothing is sent until the oldest chunk's are there. A row is a
/// few hundred bytes here.
const WINDOW_ROWS: usize = 10_000;
/// How many outcomes are kept that come before the answer which says whose they are. With more, nothing is heard until then.
const MAX_EARLY: usize = 2 * CHUNK_ROWS;
/// How long a chunk may be sent again: somewhat less than the gateway knows its key.
const KEYS_LAST: Duration = Duration::from_secs(23 * 3600);
/// How long to wait for the gateway before anything is sent.
const BEGIN: Duration = Duration::from_secs(60);
/// How many faults are shown.
const SHOWN: usize = 20;

/// Send updates from a CSV or NDJSON file, and write beside it what became of each row.
///
/// FILE.outcomes.csv (or .ndjson) has for each row its update and its status: succeeded; failed or refused, with why; invalid,
/// where the row itself is wrong and was not sent; pending, where the outcome did not come in time; unknown, where it is too late to
/// go on with a chunk that was cut off.
///
/// The header of a CSV file names its columns: leadId, referenceId, projectId, processId, name, targetState, disposition,
/// userId, expectedVersion and expectedState are fields of the update, metadata is a JSON object to merge, and every other
/// column is a member of the metadata, as a text; metadata.KEY is one whatever KEY is. Empty cells are left out. A line of an
/// NDJSON file is an update's body as the HTTP API takes it.
///
/// It can be stopped or killed at any time: with --resume it goes on, and applies nothing twice. So it does where rows are pending, and
/// asks for their outcomes anew, within 23 hours. FILE.import.json is how far it is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    leadctl import leads.csv --dry-run\n  \
    leadctl import leads.csv\n  \
    leadctl import leads.csv --resume\n  \
    leadctl import crm.csv --project-id 6b04… --process-id 6b04…    rows with a referenceId\n\n\
    Exits with 0 if all rows succeeded, 5 if some did not, 7 if they may still, 130 if Ctrl-C stopped it.")]
pub(crate) struct Import {
    /// The file: .csv, or .ndjson (.jsonl) with an update a line.
    file: PathBuf,
    /// The key's project, for rows with a referenceId that do not name it.
    #[arg(long, value_name = "ID")]
    project_id: Option<ObjectId>,
    /// The process, for rows with a referenceId that do not name it.
    #[arg(long, value_name = "ID")]
    process_id: Option<ObjectId>,
    /// Only check the file, and say how many rows of what there are.
    #[arg(long)]
    dry_run: bool,
    /// Go on with an import of this file that was cut off; where there is none, begin it.
    #[arg(long, conflicts_with = "dry_run")]
    resume: bool,
    /// How long to wait for outcomes after the last one that came; 0s waits for none.
    #[arg(long, default_value = "60s", value_name = "DURATION")]
    wait: humantime::Duration,
    /// Where the gateway is.
    #[arg(long, env = "LEADRELAY_GATEWAY_URL", default_value = "http://127.0.0.1:8080")]
    gateway_url: String,
    /// The API key; with leads:read as well as leads:write, unless outcomes are not waited for.
    #[arg(long, env = "LEADRELAY_API_KEY", hide_env_values = true, required_unless_present = "dry_run")]
    api_key: Option<String>,
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
}

impl Import {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let format = Format::of(&self.file)?;
        let place = Place { project_id: self.project_id, process_id: self.process_id };
        let checked = Checked::of(&self.file, format, place)?;
        let Some(api_key) = self.api_key.as_deref().filter(|_| !self.dry_run) else {
            return checked.tell(self.json);
        };
        let gateway = Gateway::new(&self.gateway_url, api_key)?;
        let digest = digest(&self.file, place)?;
        let mut files = Files::open(&self.file, format, digest, &self.gateway_url, self.resume)?;
        let patience = Duration::from(self.wait);
        if !patience.is_zero() {
            files.go_back(clock::now().minus(KEYS_LAST))?;
        }
        let begun = Instant::now();
        let importing = Importing {
            follower: (!patience.is_zero()).then(|| Follower::new(gateway.clone(), files.state.heard.clone())),
            gateway,
            rows: Rows::open(&self.file, format, place)?,
            missed: files.state.heard.is_none(),
            before: files.state.clone(),
            files,
            window: Window::default(),
            early: HashMap::new(),
            gap: false,
            patience,
            heard_at: Instant::now(),
            bar: Bar::new(checked.rows),
        };
        let files = tokio::select! {
            done = importing.run() => done?,
            _ = tokio::signal::ctrl_c() => {
                eprintln!("\nleadctl: stopped; the same with --resume goes on");
                return Ok(Came::Interrupted.into());
            }
        };
        let summary = Summary {
            rows: files.state.written.rows(),
            outcomes: files.outcomes_path().to_string_lossy().into_owned(),
            counts: files.state.written.clone(),
        };
        if self.json {
            output::json(&summary)?;
        } else {
            output::say(summary.text(begun.elapsed()));
        }
        Ok(came(&summary.counts))
    }
}

/// What an import exits with.
fn came(counts: &Counts) -> ExitCode {
    if counts.failed + counts.refused + counts.invalid + counts.unknown > 0 {
        Came::Failed.into()
    } else if counts.pending > 0 {
        Came::TimedOut.into()
    } else {
        ExitCode::SUCCESS
    }
}

/// What is said at the end.
#[derive(Debug, Serialize)]
struct Summary {
    rows: u64,
    #[serde(flatten)]
    counts: Counts,
    outcomes: String,
}

impl Summary {
    fn text(&self, took: Duration) -> String {
        let Counts { succeeded, failed, pending, refused, invalid, unknown } = &self.counts;
        let mut text = format!("{} rows in {}: {succeeded} succeeded", self.rows, whole_seconds(took));
        for (count, what) in
            [(failed, "failed"), (refused, "refused"), (invalid, "invalid"), (pending, "pending"), (unknown, "unknown")]
        {
            if *count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        }
        format!("{text}\n{} has each", self.outcomes)
    }
}

fn whole_seconds(took: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(took.as_secs().max(1)))
}

/// What stands for the file and how it is read, in the keys of its chunks.
fn digest(path: &Path, place: Place) -> anyhow::Result<String> {
    let mut digest = Sha256::new();
    // The number changes whenever the same file would be sent in other chunks or with other bodies.
    digest.update(format!("leadrelay import 1\n{:?}\n{:?}\n", place.project_id, place.process_id));
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

/// What a file has.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Checked {
    rows: u64,
    invalid: u64,
    by_lead_id: u64,
    by_reference_id: u64,
    /// The columns that become metadata.
    metadata: Vec<String>,
    /// The first rows that are wrong.
    faults: Vec<Fault>,
}

#[derive(Debug, Serialize)]
struct Fault {
    row: u64,
    error: String,
}

impl Checked {
    fn of(path: &Path, format: Format, place: Place) -> anyhow::Result<Self> {
        let mut rows = Rows::open(path, format, place)?;
        let metadata = rows.metadata_columns().into_iter().map(line).collect();
        let mut checked = Self { metadata, ..Self::default() };
        while let Some(row) = rows.next().with_context(|| format!("{}", path.display()))? {
            checked.rows += 1;
            match row.body {
                Ok(_) if row.lead_id.is_some() => checked.by_lead_id += 1,
                Ok(_) => checked.by_reference_id += 1,
                Err(fault) => {
                    checked.invalid += 1;
                    if checked.faults.len() < SHOWN {
                        checked.faults.push(Fault { row: row.number, error: line(&fault.to_string()) });
                    }
                }
            }
        }
        Ok(checked)
    }

    fn tell(&self, json: bool) -> anyhow::Result<ExitCode> {
        let Self { rows, invalid, by_lead_id, by_reference_id, metadata, faults } = self;
        if json {
            output::json(self)?;
        } else {
            output::say(format_args!(
                "{rows} rows: {by_lead_id} by leadId, {by_reference_id} by referenceId, {invalid} invalid"
            ));
            if !metadata.is_empty() {
                output::field("metadata", metadata.join(", "));
            }
            for Fault { row, error } in faults {
                output::field(&format!("row {row}"), error);
            }
            if let Some(more) = invalid.checked_sub(faults.len() as u64).filter(|more| *more > 0) {
                output::say(format_args!("  and {more} more"));
            }
        }
        Ok(if *invalid > 0 { Came::Failed.into() } else { ExitCode::SUCCESS })
    }
}

/// Rows that go into one request.
#[derive(Default)]
struct Batch {
    records: Vec<Record>,
    /// Which of them are sent.
    sent: Vec<usize>,
    body: Vec<u8>,
}

impl Batch {
    fn take(&mut self, row: Row) {
        let Row { number, lead_id, reference_id, body, .. } = row;
        let fate = match body {
            Ok(text) => {
                self.sent.push(self.records.len());
                self.body.extend_from_slice(text.as_bytes());
                self.body.push(b'\n');
                // Until it is known what the gateway says.
                Fate::Unknown
            }
            Err(fault) => Fate::Invalid(line(&fault.to_string())),
        };
        self.records.push(Record { number, lead_id, reference_id, fate });
    }
}

/// An import under way.
struct Importing {
    gateway: Gateway,
    rows: Rows,
    files: Files,
    /// How far the import was that this one goes on with.
    before: State,
    /// None where outcomes are not waited for.
    follower: Option<Follower>,
    window: Window,
    /// Outcomes of what is just being sent.
    early: HashMap<ObjectId, Outcome>,
    /// Whether outcomes were missed.
    gap: bool,
    /// Whether outcomes of what the import before this one sent are missed whenever it is sent again: nobody listened then, or
    /// what there was to hear is gone.
    missed: bool,
    patience: Duration,
    /// When an outcome was heard that was waited for, or waiting began.
    heard_at: Instant,
    bar: Bar,
}

impl Importing {
    async fn run(mut self) -> anyhow::Result<Files> {
        for _ in 0..self.before.written.rows() {
            self.rows.next()?;
        }
        if let Some(follower) = &mut self.follower {
            let begun = timeout(BEGIN, follower.begin()).await;
            begun.with_context(|| format!("the gateway does not answer within {BEGIN:?}"))??;
        }
        let mut ended = false;
        loop {
            self.settle()?;
            if !ended && self.window.rows() < WINDOW_ROWS {
                match self.read()? {
                    Some(batch) => self.send(batch).await?,
                    None => ended = true,
                }
            } else if self.window.rows() > 0 {
                self.listen().await?;
            } else {
                self.bar.end();
                return Ok(self.files);
            }
        }
    }

    /// Reads the next chunk. Where it ends depends on its rows alone.
    fn read(&mut self) -> anyhow::Result<Option<Batch>> {
        let mut batch = Batch::default();
        while batch.records.len() < CHUNK_ROWS && batch.body.len() < CHUNK_BYTES {
            let Some(row) = self.rows.next()? else { break };
            batch.take(row);
        }
        Ok((!batch.records.is_empty()).then_some(batch))
    }

    /// Sends a chunk, and takes it into the window.
    async fn send(&mut self, batch: Batch) -> anyhow::Result<()> {
        let Batch { mut records, sent, body } = batch;
        let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
        let (first, last) = (first.number, last.number);
        // By the import that was cut off.
        let again = last <= self.before.sent;
        let now = clock::now();
        let (sent_at, heard) = match &self.follower {
            _ if again => (self.before.sent_at.unwrap_or(now), self.before.heard.clone()),
            Some(follower) => (now, follower.last().map(str::to_owned)),
            None => (now, None),
        };
        if !sent.is_empty() && now.minus(KEYS_LAST) < sent_at {
            self.note(last, sent_at, heard.as_deref())?;
            let key = format!("leadctl-import-{}-{first}", self.files.state.digest);
            let told = self.told(&key, body, sent.len(), again).await?;
            for (n, line) in sent.into_iter().zip(told) {
                records[n].fate = match (line.update_id, &self.follower) {
                    (Some(update_id), Some(_)) => Fate::Waiting(update_id),
                    (Some(update_id), None) => Fate::Pending(update_id),
                    (None, _) => {
                        Fate::Refused { code: line.code.unwrap_or_default(), error: line.error.unwrap_or_default() }
                    }
                };
            }
        }
        if self.window.waiting().len() == 0 {
            self.heard_at = Instant::now();
        }
        self.window.push(Chunk { records, sent_at, heard });
        self.gap |= again && self.missed;
        for (_, outcome) in std::mem::take(&mut self.early) {
            self.hear(outcome);
        }
        self.mend_gap().await?;
        self.show(last);
        Ok(())
    }

    /// Notes that rows up to this one may be sent from now on.
    fn note(&mut self, last: u64, sent_at: Timestamp, heard: Option<&str>) -> anyhow::Result<()> {
        let state = &mut self.files.state;
        if last <= state.sent {
            return Ok(());
        }
        state.sent = last;
        if state.sent_at.is_none() {
            state.sent_at = Some(sent_at);
            state.heard = heard.map(str::to_owned);
        }
        self.files.save()
    }

    /// What the gateway says to lines. Meanwhile it is listened, except to what was sent before: nobody knows yet whose
    /// those outcomes are, and they are kept at the gateway.
    async fn told(&mut self, key: &str, body: Vec<u8>, lines: usize, again: bool) -> anyhow::Result<Vec<send::Line>> {
        let Self { gateway, follower, window, early, gap, missed, heard_at, bar, .. } = self;
        let complain = |error: &anyhow::Error| bar.say(format_args!("tried again: {error:#}"));
        let mut sending = pin!(send::send(gateway, key, body.into(), lines, complain));
        loop {
            let listening = !again && early.len() < MAX_EARLY;
            let heard = tokio::select! {
                told = &mut sending => return told,
                heard = next(follower), if listening => heard?,
            };
            match heard {
                Heard::Gap => (*gap, *missed) = (true, true),
                Heard::Outcome(outcome) => {
                    if window.hear(outcome.clone()) {
                        *heard_at = Instant::now();
                    } else {
                        early.insert(outcome.update_id, outcome);
                    }
                }
            }
        }
    }

    /// Waits for an outcome, or gives up on the oldest chunk's.
    async fn listen(&mut self) -> anyhow::Result<()> {
        let heard = timeout_at(self.heard_at + self.patience, next(&mut self.follower)).await;
        match heard {
            Ok(Ok(Heard::Outcome(outcome))) => self.hear(outcome),
            Ok(Ok(Heard::Gap)) => {
                (self.gap, self.missed) = (true, true);
                self.mend_gap().await?;
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => self.window.give_up_oldest(),
        }
        self.show(self.files.state.sent);
        Ok(())
    }

    fn hear(&mut self, outcome: Outcome) {
        if self.window.hear(outcome) {
            self.heard_at = Instant::now();
        }
    }

    /// Asks what became of everything that is waited for, if outcomes were missed: one by one, but no more than the window has.
    async fn mend_gap(&mut self) -> anyhow::Result<()> {
        let Some(follower) = self.follower.as_mut().filter(|_| std::mem::take(&mut self.gap)) else { return Ok(()) };
        self.bar.say(format_args!("outcomes were missed; they are asked for"));
        // First, so that nothing can come about between the answer and the events.
        follower.begin().await?;
        for update_id in self.window.waiting().collect::<Vec<_>>() {
            if let Some(outcome) = follow::ask(&self.gateway, update_id).await? {
                self.hear(outcome);
            }
        }
        Ok(())
    }

    /// Writes the outcomes of the chunks that have all of theirs.
    fn settle(&mut self) -> anyhow::Result<()> {
        while let Some(chunk) = self.window.take_settled() {
            self.files.write(&chunk)?;
            let state = &mut self.files.state;
            state.sent = state.sent.max(state.written.rows());
            // What the import before this one sent is as old as it was, until it is written.
            if state.written.rows() >= self.before.sent {
                let oldest = self.window.oldest();
                state.sent_at = oldest.map(|chunk| chunk.sent_at);
                state.heard = match oldest {
                    Some(chunk) => chunk.heard.clone(),
                    None => self.follower.as_ref().and_then(Follower::last).map(str::to_owned),
                };
            }
            self.files.save()?;
        }
        Ok(())
    }

    fn show(&mut self, sent: u64) {
        self.bar.show(sent, self.window.waiting().len());
    }
}

/// The next that is heard; never, where nobody listens.
async fn next(follower: &mut Option<Follower>) -> anyhow::Result<Heard> {
    match follower {
        Some(follower) => follower.next().await,
        None => std::future::pending().await,
    }
}

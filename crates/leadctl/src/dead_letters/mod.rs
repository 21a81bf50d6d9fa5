//! `leadctl dead-letters`: shows and replays messages that could not be applied.

pub(crate) mod letters;
mod replay;

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand};
use contract::{ObjectId, subject::DeadLetterReason};
use serde::Serialize;
use service_kit::clock;

use self::{
    letters::{Letter, Letters},
    replay::Correction,
};
use crate::{
    clients::admin::Admin,
    output::{
        self,
        escape::{escaped, escaped_block},
    },
};

/// Bytes of a body that are shown.
const SHOWN_BYTES: usize = 4096;

/// Dead letters.
#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// Count dead letters by reason, and list them, newest first.
    #[command(after_help = "Example:\n  leadctl dead-letters list --reason invalid_json --since 1d")]
    List {
        #[command(flatten)]
        filter: Filter,
        /// Maximum number of listed letters. The counts include all.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        admin: Admin,
    },
    /// Show a dead letter: its headers (with the error and the origin) and the start of its body; --json has the whole
    /// body.
    #[command(after_help = "Example:\n  leadctl dead-letters show 17")]
    Show {
        /// The letter's number, as shown by `dead-letters list`.
        number: u64,
        #[command(flatten)]
        admin: Admin,
    },
    /// Replay a dead letter on its original subject. A letter that still cannot be parsed is not sent; correct it with
    /// --body or --project. A replay that cannot be applied becomes a dead letter again. A second replay requires
    /// --again.
    #[command(after_help = "Examples:\n  leadctl dead-letters replay 17\n  \
                      leadctl dead-letters replay 17 --body corrected.json\n  \
                      leadctl dead-letters replay --all --reason unknown_lead")]
    Replay {
        /// The letter's number, as shown by `dead-letters list`.
        #[arg(required_unless_present = "all")]
        number: Option<u64>,
        /// Replay all letters of a reason that were not replayed yet.
        #[arg(long, requires = "reason", conflicts_with_all = ["number", "body", "project", "again"])]
        all: bool,
        /// The reason for --all.
        #[arg(long, requires = "all")]
        reason: Option<DeadLetterReason>,
        /// A file with a corrected body.
        #[arg(long, value_name = "FILE")]
        body: Option<PathBuf>,
        /// The project, if the original subject was wrong.
        #[arg(long)]
        project: Option<ObjectId>,
        /// Replay it even if it was, or may have been, replayed before.
        #[arg(long)]
        again: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Filter {
    /// Only letters with this reason, e.g. invalid_json.
    #[arg(long)]
    reason: Option<DeadLetterReason>,
    /// Only letters whose subject names this project.
    #[arg(long)]
    project: Option<ObjectId>,
    /// Only letters of this time span, e.g. 1d.
    #[arg(long, value_name = "DURATION")]
    since: Option<humantime::Duration>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LetterList<'a> {
    counts: &'a BTreeMap<&'a str, u64>,
    letters: Vec<&'a Letter>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LetterDetails<'a> {
    #[serde(flatten)]
    letter: &'a Letter,
    headers: &'a BTreeMap<String, String>,
    bytes: usize,
    #[serde(flatten)]
    body: LetterBody<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum LetterBody<'a> {
    Body(&'a str),
    BodyBase64(String),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplayReport {
    replayed: Vec<Replayed>,
    skipped: Vec<Skipped>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Replayed {
    number: u64,
    /// In the command log.
    sequence: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Skipped {
    number: u64,
    reason: String,
}

impl DeadLetters {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { filter, limit, admin } => {
                let letters = filter.apply(Letters::open(&admin).await?.all().await?);
                list(&letters, limit, admin.json)
            }
            Self::Show { number, admin } => {
                let (letter, message) = Letters::open(&admin).await?.get(number).await?;
                let headers = message.headers.iter().map(|(name, values)| {
                    (name.to_string(), values.iter().map(|value| value.as_str()).collect::<Vec<_>>().join(", "))
                });
                show(&letter, &headers.collect(), &message.payload, admin.json)
            }
            Self::Replay { number: Some(number), all: _, reason: _, body, project, again, admin } => {
                let body = body.map(|file| fs::read(&file).with_context(|| format!("cannot read {}", file.display())));
                let correction = Correction { body: body.transpose()?.map(Into::into), project };
                let letters = Letters::open(&admin).await?;
                let (letter, message) = letters.get(number).await?;
                let rejected = || format!("dead letter {number} is not replayed");
                if let Some(objection) = replay::objection(&letter).filter(|_| !again) {
                    return Err(objection).with_context(rejected);
                }
                let (subject, body) = replay::command(&letter, message.payload, correction).with_context(rejected)?;
                let sequence = letters.replay(&letter, subject, body).await?;
                let report = ReplayReport { replayed: vec![Replayed { number, sequence }], skipped: Vec::new() };
                report.show(admin.json)
            }
            Self::Replay { number: None, reason, admin, .. } => {
                let letters = Letters::open(&admin).await?;
                let mut report = ReplayReport { replayed: Vec::new(), skipped: Vec::new() };
                let replayed = replay_all(&letters, reason.map(DeadLetterReason::as_str), &mut report).await;
                // The replayed letters are in the log even if a later one failed, so the report is shown.
                if replayed.is_err() && report.replayed.is_empty() && report.skipped.is_empty() {
                    return replayed;
                }
                let shown = report.show(admin.json);
                replayed.and(shown)
            }
        }
    }
}

/// Replays all letters of a reason that were not replayed yet. After an error, the report has the letters before it.
async fn replay_all(letters: &Letters, reason: Option<&str>, report: &mut ReplayReport) -> anyhow::Result<()> {
    for letter in letters.all().await?.iter().filter(|letter| Some(letter.reason.as_str()) == reason) {
        let number = letter.number;
        if letter.was_replayed() {
            continue;
        }
        // Read again: another operator may be replaying letters, too.
        let (letter, message) = letters.get(number).await?;
        let command = match replay::objection(&letter) {
            Some(objection) => Err(objection),
            None => replay::command(&letter, message.payload, Correction::default()),
        };
        match command {
            Ok((subject, body)) => {
                let sequence = letters.replay(&letter, subject, body).await?;
                report.replayed.push(Replayed { number, sequence });
            }
            Err(reason) => report.skipped.push(Skipped { number, reason: reason.to_string() }),
        }
    }
    Ok(())
}

impl Filter {
    fn apply(&self, letters: Vec<Letter>) -> Vec<Letter> {
        let since = self.since.map(|since| clock::now().minus(since.into()));
        let project = self.project.map(|id| id.to_string());
        let holds = |letter: &Letter| {
            self.reason.is_none_or(|reason| reason.as_str() == letter.reason)
                && project.as_deref().is_none_or(|id| letter.subject.split('.').nth(2) == Some(id))
                && since.is_none_or(|since| letter.dead_since >= since)
        };
        letters.into_iter().filter(holds).collect()
    }
}

/// Prints the counts and the newest letters. `letters` is sorted from old to new.
pub(crate) fn list(letters: &[Letter], limit: usize, json: bool) -> anyhow::Result<()> {
    let mut counts = BTreeMap::new();
    for letter in letters {
        *counts.entry(letter.reason.as_str()).or_insert(0) += 1;
    }
    let newest: Vec<_> = letters.iter().rev().take(limit).collect();
    if json {
        return output::json(&LetterList { counts: &counts, letters: newest });
    }
    if letters.is_empty() {
        output::say("no dead letters");
    }
    for (reason, count) in &counts {
        output::say(format_args!("{count:>10} {}", escaped(reason)));
    }
    for letter in newest {
        let Letter { number, reason, error, subject, dead_since, .. } = letter;
        let (at, reason, subject) = (dead_since.to_iso(), escaped(reason), escaped(subject));
        let remarks = letter.remarks();
        output::say(format_args!("{number:>6}  {at}  {reason}  {subject}: {}{remarks}", escaped(error)));
    }
    Ok(())
}

pub(crate) fn show(letter: &Letter, headers: &BTreeMap<String, String>, body: &[u8], json: bool) -> anyhow::Result<()> {
    if json {
        let bytes = body.len();
        let body = match std::str::from_utf8(body) {
            Ok(text) => LetterBody::Body(text),
            Err(_) => LetterBody::BodyBase64(BASE64_STANDARD.encode(body)),
        };
        return output::json(&LetterDetails { letter, headers, bytes, body });
    }
    let Letter { number, reason, .. } = letter;
    let remarks = letter.remarks();
    output::say(format_args!("dead letter {number}: {}, {} bytes{remarks}", escaped(reason), body.len()));
    for (name, value) in headers {
        output::say(format_args!("  {}: {}", escaped(name), escaped(value)));
    }
    output::say(escaped_block(body, SHOWN_BYTES));
    Ok(())
}

impl ReplayReport {
    /// Shows the report. Skipped letters are an error.
    fn show(&self, json: bool) -> anyhow::Result<()> {
        let Self { replayed, skipped } = self;
        output::show(json, self, |_| {
            for Replayed { number, sequence } in replayed {
                output::say(format_args!("dead letter {number}: replayed as entry {sequence} of the log"));
            }
            for Skipped { number, reason } in skipped {
                output::say(format_args!("dead letter {number}: skipped: {}", escaped(reason)));
            }
            if replayed.is_empty() && skipped.is_empty() {
                output::say("no dead letters to replay");
            }
        })?;
        if !skipped.is_empty() {
            bail!("{} replayed, {} skipped", replayed.len(), skipped.len());
        }
        Ok(())
    }
}

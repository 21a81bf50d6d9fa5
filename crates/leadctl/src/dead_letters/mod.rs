//! `leadctl dead-letters`: 3 Read in order: what could not be applied, to look at and to send again.

mod letters;
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
    replay::Mended,
};
use crate::{
    admin::Admin,
    output,
    printable::{block, line},
};

/// How much of a body is shown.
const SHOWN_BYTES: usize = 4096;

/// Dead letters.
#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// Count them by reason, and list them, the newest first.
    #[command(after_help = "Example:\n  leadctl dead-letters list --reason invalid_json --since 1d")]
    List {
        #[command(flatten)]
        filter: Filter,
        /// How many are listed at most. All are counted.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        admin: Admin,
    },
    /// Show one: its headers, which say what is wrong and where it came from, and its body; --json has all of the body.
    #[command(after_help = "Example:\n  leadctl dead-letters show 17")]
    Show {
        /// Its number, as `list` shows it.
        number: u64,
        #[command(flatten)]
        admin: Admin,
    },
    /// Send a letter again, on the subject that it came on. What would only be a dead letter again is not sent: --body or
    /// --project mends it. A second time needs --again.
    #[command(
        after_help = "Examples:\n  leadctl dead-letters replay 17\n  leadctl dead-letters replay 17 --body mended.json\n  \
                            leadctl dead-letters replay --all --reason unknown_lead"
    )]
    Replay {
        /// Its number, as `list` shows it.
        #[arg(required_unless_present = "all")]
        number: Option<u64>,
        /// All of a reason that were not sent again yet.
        #[arg(long, requires = "reason", conflicts_with_all = ["number", "body", "project", "again"])]
        all: bool,
        /// The reason that --all is for.
        #[arg(long, requires = "all")]
        reason: Option<DeadLetterReason>,
        /// A file with a mended body to send instead.
        #[arg(long, value_name = "FILE")]
        body: Option<PathBuf>,
        /// The project to send it to, where the subject was wrong.
        #[arg(long)]
        project: Option<ObjectId>,
        /// Even if it was sent again before, or may have been.
        #[arg(long)]
        again: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

/// Which ones.
#[derive(Debug, Args)]
pub(crate) struct Filter {
    /// Only this reason, e.g. invalid_json.
    #[arg(long)]
    reason: Option<DeadLetterReason>,
    /// Only those whose subject names this project.
    #[arg(long)]
    project: Option<ObjectId>,
    /// Only those that were buried within this time, e.g. 1d.
    #[arg(long, value_name = "DURATION")]
    since: Option<humantime::Duration>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    counts: &'a BTreeMap<&'a str, u64>,
    letters: Vec<&'a Letter>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    #[serde(flatten)]
    letter: &'a Letter,
    headers: &'a BTreeMap<String, String>,
    bytes: usize,
    #[serde(flatten)]
    body: ShownBody<'a>,
}

/// A body that programs get as it is.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum ShownBody<'a> {
    Body(&'a str),
    BodyBase64(String),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Replayed {
    sent: Vec<Sent>,
    left: Vec<Left>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sent {
    number: u64,
    /// Its sequence in the command log.
    sequence: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Left {
    number: u64,
    why: String,
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
                let mended = Mended { body: body.transpose()?.map(Into::into), project };
                let letters = Letters::open(&admin).await?;
                let (letter, message) = letters.get(number).await?;
                let refused = || format!("dead letter {number} is not sent again");
                if let Some(why) = replay::earlier(&letter).filter(|_| !again) {
                    return Err(why).with_context(refused);
                }
                let (subject, body) = replay::command(&letter, message.payload, mended).with_context(refused)?;
                let sequence = letters.replay(&letter, subject, body).await?;
                told(&Replayed { sent: vec![Sent { number, sequence }], left: Vec::new() }, admin.json)
            }
            Self::Replay { number: None, reason, admin, .. } => {
                let letters = Letters::open(&admin).await?;
                let reason = reason.map(DeadLetterReason::as_str);
                let mut replayed = Replayed { sent: Vec::new(), left: Vec::new() };
                for letter in letters.all().await?.iter().filter(|letter| Some(letter.reason.as_str()) == reason) {
                    let number = letter.number;
                    if letter.is_sent() {
                        continue;
                    }
                    // As it is now: somebody else may be at it.
                    let (letter, message) = letters.get(number).await?;
                    let command = match replay::earlier(&letter) {
                        Some(why) => Err(why),
                        None => replay::command(&letter, message.payload, Mended::default()),
                    };
                    match command {
                        Ok((subject, body)) => {
                            let sequence = letters.replay(&letter, subject, body).await?;
                            replayed.sent.push(Sent { number, sequence });
                        }
                        Err(why) => replayed.left.push(Left { number, why: why.to_string() }),
                    }
                }
                told(&replayed, admin.json)
            }
        }
    }
}

impl Filter {
    fn apply(&self, letters: Vec<Letter>) -> Vec<Letter> {
        let since = self.since.map(|since| clock::now().minus(since.into()));
        let project = self.project.map(|id| id.to_string());
        let holds = |letter: &Letter| {
            self.reason.is_none_or(|reason| reason.as_str() == letter.reason)
                && project.as_deref().is_none_or(|id| letter.subject.split('.').nth(2) == Some(id))
                && since.is_none_or(|since| letter.buried_at >= since)
        };
        letters.into_iter().filter(holds).collect()
    }
}

/// Prints counts, then letters; they come oldest first.
fn list(letters: &[Letter], limit: usize, json: bool) -> anyhow::Result<()> {
    let mut counts = BTreeMap::new();
    for letter in letters {
        *counts.entry(letter.reason.as_str()).or_insert(0) += 1;
    }
    let newest: Vec<_> = letters.iter().rev().take(limit).collect();
    if json {
        return output::json(&Listed { counts: &counts, letters: newest });
    }
    if letters.is_empty() {
        output::say("no dead letters");
    }
    for (reason, count) in &counts {
        output::say(format_args!("{count:>10} {}", line(reason)));
    }
    for letter in newest {
        let Letter { number, reason, error, subject, buried_at, .. } = letter;
        let (at, reason, subject) = (buried_at.to_iso(), line(reason), line(subject));
        let remarks = letter.remarks();
        output::say(format_args!("{number:>6}  {at}  {reason}  {subject}: {}{remarks}", line(error)));
    }
    Ok(())
}

fn show(letter: &Letter, headers: &BTreeMap<String, String>, body: &[u8], json: bool) -> anyhow::Result<()> {
    if json {
        let bytes = body.len();
        let body = match std::str::from_utf8(body) {
            Ok(text) => ShownBody::Body(text),
            Err(_) => ShownBody::BodyBase64(BASE64_STANDARD.encode(body)),
        };
        return output::json(&Shown { letter, headers, bytes, body });
    }
    let Letter { number, reason, .. } = letter;
    let remarks = letter.remarks();
    output::say(format_args!("dead letter {number}: {}, {} bytes{remarks}", line(reason), body.len()));
    for (name, value) in headers {
        output::say(format_args!("  {}: {}", line(name), line(value)));
    }
    output::say(block(body, SHOWN_BYTES));
    Ok(())
}

/// Says what was sent again; what was left although it was asked for is an error.
fn told(replayed: &Replayed, json: bool) -> anyhow::Result<()> {
    let Replayed { sent, left } = replayed;
    if json {
        output::json(replayed)?;
    } else {
        for Sent { number, sequence } in sent {
            output::say(format_args!("dead letter {number}: sent again, entry {sequence} of the log"));
        }
        for Left { number, why } in left {
            output::say(format_args!("dead letter {number}: not sent again: {}", line(why)));
        }
        if sent.is_empty() && left.is_empty() {
            output::say("nothing to send again");
        }
    }
    if !left.is_empty() {
        bail!("{} sent again, {} left", sent.len(), left.len());
    }
    Ok(())
}

//! What an import writes beside its file: the outcomes, and how far it is.

use std::{
    fs::{File, TryLockError},
    io::{ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use contract::Timestamp;
use serde::{Deserialize, Serialize};

use crate::import::{
    rows::Format,
    window::{Chunk, Fate, Record},
};

/// How many rows came out how.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) pending: u64,
    pub(crate) refused: u64,
    pub(crate) invalid: u64,
    pub(crate) unknown: u64,
}

impl Counts {
    /// All of them.
    pub(crate) fn rows(&self) -> u64 {
        let Self { succeeded, failed, pending, refused, invalid, unknown } = self;
        succeeded + failed + pending + refused + invalid + unknown
    }

    fn add(&mut self, fate: &Fate) {
        *match fate {
            Fate::Succeeded(_) => &mut self.succeeded,
            Fate::Failed { .. } => &mut self.failed,
            Fate::Pending(_) | Fate::Waiting(_) => &mut self.pending,
            Fate::Refused { .. } => &mut self.refused,
            Fate::Invalid(_) => &mut self.invalid,
            Fate::Unknown => &mut self.unknown,
        } += 1;
    }
}

/// How far an import is: as much as the next one must know to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    /// Of what is imported, and how.
    pub(crate) digest: String,
    pub(crate) gateway_url: String,
    /// The rows whose outcomes are written, and how long the file is with them.
    pub(crate) written: Counts,
    pub(crate) outcomes_bytes: u64,
    /// The rows that may have been sent, those included, and when the oldest of the others was.
    pub(crate) sent: u64,
    pub(crate) sent_at: Option<Timestamp>,
    /// An event that was announced before any of the others was sent.
    pub(crate) heard: Option<String>,
    /// Where the first chunk begins of which outcomes were not waited for.
    #[serde(default)]
    pub(crate) pending: Option<Pending>,
}

/// A chunk some of whose rows are pending: what the state was before it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pending {
    written: Counts,
    outcomes_bytes: u64,
    sent_at: Timestamp,
    heard: Option<String>,
}

/// Both files of an import; nobody else writes them meanwhile.
pub(crate) struct Files {
    format: Format,
    outcomes: File,
    outcomes_path: PathBuf,
    state_path: PathBuf,
    pub(crate) state: State,
}

/// A row of the outcomes.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    row: u64,
    lead_id: Option<&'a str>,
    reference_id: Option<&'a str>,
    update_id: Option<String>,
    status: &'static str,
    code: Option<&'a str>,
    error: Option<&'a str>,
}

const HEAD: [&str; 7] = ["row", "leadId", "referenceId", "updateId", "status", "code", "error"];

/// A file beside this one.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Files {
    /// Begins an import, or goes on with the one that began.
    pub(crate) fn open(
        path: &Path,
        format: Format,
        digest: String,
        gateway_url: &str,
        resume: bool,
    ) -> anyhow::Result<Self> {
        let outcomes_path = beside(path, &format!(".outcomes.{}", format.extension()));
        let state_path = beside(path, ".import.json");
        let (shown, state_shown) = (outcomes_path.display().to_string(), state_path.display().to_string());
        let before = match std::fs::read_to_string(&state_path) {
            Ok(text) => {
                Some(serde_json::from_str::<State>(&text).with_context(|| format!("{state_shown} is damaged"))?)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e).with_context(|| format!("cannot read {state_shown}")),
        };
        match &before {
            _ if !resume && (before.is_some() || outcomes_path.exists()) => bail!(
                "this file is being imported, or was: --resume goes on; to begin anew, remove {shown} and {state_shown}"
            ),
            None if outcomes_path.exists() => {
                bail!("{shown} is there and {state_shown} is not: how far that import came is not known")
            }
            Some(before) if before.digest != digest => {
                bail!("the file, --project-id or --process-id is not what it was when the import began")
            }
            Some(before) if before.gateway_url != gateway_url => {
                bail!("the import began at {}, not at {gateway_url}", before.gateway_url)
            }
            _ => {}
        }
        let open = File::options().create(true).truncate(false).write(true).open(&outcomes_path);
        let outcomes = open.with_context(|| format!("cannot open {shown}"))?;
        match outcomes.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another import of this file is under way"),
            Err(TryLockError::Error(e)) => return Err(e).with_context(|| format!("cannot lock {shown}")),
        }
        let fresh = before.is_none();
        let state = before.unwrap_or_else(|| State {
            digest,
            gateway_url: gateway_url.to_owned(),
            written: Counts::default(),
            outcomes_bytes: 0,
            sent: 0,
            sent_at: None,
            heard: None,
            pending: None,
        });
        let mut files = Self { format, outcomes, outcomes_path, state_path, state };
        files.cut()?;
        if fresh {
            if format == Format::Csv {
                files.append(format!("{}\n", HEAD.join(",")).as_bytes())?;
            }
            files.save()?;
        }
        Ok(files)
    }

    /// Where the outcomes are.
    pub(crate) fn outcomes_path(&self) -> &Path {
        &self.outcomes_path
    }

    /// Goes back to where the first row is pending, if its chunk was sent after this time: from there on outcomes are asked
    /// for and written anew.
    pub(crate) fn go_back(&mut self, oldest: Timestamp) -> anyhow::Result<()> {
        let Some(pending) = self.state.pending.take_if(|pending| oldest < pending.sent_at) else { return Ok(()) };
        let Pending { written, outcomes_bytes, sent_at, heard } = pending;
        self.state = State { written, outcomes_bytes, sent_at: Some(sent_at), heard, ..self.state.clone() };
        // First, so that what it counts is there whenever it is read.
        self.save()?;
        self.cut()
    }

    /// Cuts off what the state does not count.
    fn cut(&mut self) -> anyhow::Result<()> {
        let cut = self.outcomes.set_len(self.state.outcomes_bytes).and_then(|()| self.outcomes.seek(SeekFrom::End(0)));
        cut.map(drop).with_context(|| format!("cannot write {}", self.outcomes_path.display()))
    }

    /// Writes the outcomes of the next chunk. They count once the state is saved: what is cut off in between is written again.
    pub(crate) fn write(&mut self, chunk: &Chunk) -> anyhow::Result<()> {
        let bytes = text(self.format, &chunk.records).context("cannot write outcomes")?;
        if chunk.records.iter().any(|record| matches!(record.fate, Fate::Pending(_))) && self.state.pending.is_none() {
            self.state.pending = Some(Pending {
                written: self.state.written.clone(),
                outcomes_bytes: self.state.outcomes_bytes,
                sent_at: chunk.sent_at,
                heard: chunk.heard.clone(),
            });
        }
        self.append(&bytes)?;
        chunk.records.iter().for_each(|record| self.state.written.add(&record.fate));
        Ok(())
    }

    /// Saves the state, as a whole or not at all.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let save = || {
            let dir = self.state_path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            serde_json::to_writer(&mut file, &self.state)?;
            file.as_file().sync_all()?;
            file.persist(&self.state_path).map_err(|e| e.error)?;
            Ok::<_, std::io::Error>(())
        };
        save().with_context(|| format!("cannot write {}", self.state_path.display()))
    }

    fn append(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.outcomes.write_all(bytes).and_then(|()| self.outcomes.sync_data());
        written.with_context(|| format!("cannot write {}", self.outcomes_path.display()))?;
        self.state.outcomes_bytes += bytes.len() as u64;
        Ok(())
    }
}

fn text(format: Format, records: &[Record]) -> anyhow::Result<Vec<u8>> {
    let written = records.iter().map(|record| {
        let (update_id, status, code, error) = match &record.fate {
            Fate::Invalid(error) => (None, "invalid", None, Some(error.as_str())),
            Fate::Refused { code, error } => (None, "refused", Some(code.as_str()), Some(error.as_str())),
            Fate::Waiting(id) | Fate::Pending(id) => (Some(id), "pending", None, None),
            Fate::Succeeded(id) => (Some(id), "succeeded", None, None),
            Fate::Failed { update_id, code, error } => {
                (Some(update_id), "failed", code.as_deref(), Some(error.as_str()))
            }
            Fate::Unknown => {
                (None, "unknown", None, Some("it may have been sent more than a day ago, and is not sent again"))
            }
        };
        Written {
            row: record.number,
            lead_id: record.lead_id.as_deref(),
            reference_id: record.reference_id.as_deref(),
            update_id: update_id.map(ToString::to_string),
            status,
            code,
            error,
        }
    });
    match format {
        Format::Csv => {
            let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
            for row in written {
                writer.serialize(row)?;
            }
            Ok(writer.into_inner()?)
        }
        Format::Ndjson => {
            let mut bytes = Vec::new();
            for row in written {
                serde_json::to_writer(&mut bytes, &row)?;
                bytes.push(b'\n');
            }
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use contract::ObjectId;

    use super::*;

    fn records() -> Vec<Record> {
        let id = ObjectId::from_bytes([1; 12]);
        let fates = [
            Fate::Succeeded(id),
            Fate::Failed { update_id: id, code: Some("c".into()), error: "a \"call\", in progress".into() },
            Fate::Pending(id),
            Fate::Refused { code: "invalid_field".into(), error: "no".into() },
            Fate::Invalid("name: is not UTF-8".into()),
            Fate::Unknown,
        ];
        let records = fates.into_iter().zip(1..);
        let lead_id = |number| (number == 1).then(|| "0101".to_owned());
        let records = records.map(|(fate, number)| Record {
            number,
            lead_id: lead_id(number),
            reference_id: (number == 2).then(|| "R, 2".to_owned()),
            fate,
        });
        records.collect()
    }

    #[test]
    fn outcomes_as_they_are_written() {
        insta::assert_snapshot!(String::from_utf8(text(Format::Csv, &records()).unwrap()).unwrap(), @r#"
        1,0101,,010101010101010101010101,succeeded,,
        2,,"R, 2",010101010101010101010101,failed,c,"a ""call"", in progress"
        3,,,010101010101010101010101,pending,,
        4,,,,refused,invalid_field,no
        5,,,,invalid,,name: is not UTF-8
        6,,,,unknown,,"it may have been sent more than a day ago, and is not sent again"
        "#);
        let lines = String::from_utf8(text(Format::Ndjson, &records()[..2]).unwrap()).unwrap();
        insta::assert_snapshot!(lines, @r#"
        {"row":1,"leadId":"0101","referenceId":null,"updateId":"010101010101010101010101","status":"succeeded","code":null,"error":null}
        {"row":2,"leadId":null,"referenceId":"R, 2","updateId":"010101010101010101010101","status":"failed","code":"c","error":"a \"call\", in progress"}
        "#);
    }

    #[test]
    fn an_import_goes_on_where_its_state_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leads.csv");
        let open = |digest: &str, url: &str, resume| Files::open(&path, Format::Csv, digest.into(), url, resume);
        let mut files = open("d", "u", true).unwrap();
        let chunk = |records| Chunk { records, sent_at: Timestamp::from_millis(5), heard: Some("s-1".into()) };
        let (chunk, settled) = (chunk(records()), chunk(records().drain(..2).collect()));
        files.write(&settled).unwrap();
        let before = files.state.clone();
        assert!(open("d", "u", true).err().unwrap().to_string().contains("under way"));
        files.write(&chunk).unwrap();
        files.state.sent = 9;
        files.save().unwrap();
        let (saved, bytes) = (files.state.clone(), std::fs::read(files.outcomes_path()).unwrap());
        assert_eq!((saved.written.rows(), saved.outcomes_bytes), (8, bytes.len() as u64));
        // Cut off before the state was saved.
        files.write(&chunk).unwrap();
        drop(files);
        assert!(open("d", "u", false).err().unwrap().to_string().contains("--resume"));
        assert!(open("other", "u", true).err().unwrap().to_string().contains("is not what it was"));
        assert!(open("d", "other", true).err().unwrap().to_string().contains("began at u"));
        let mut files = open("d", "u", true).unwrap();
        assert_eq!((&files.state, std::fs::read(files.outcomes_path()).unwrap()), (&saved, bytes));
        // Back to where rows are pending, unless that is too long ago.
        files.go_back(Timestamp::from_millis(5)).unwrap();
        assert_eq!(files.state, saved);
        files.go_back(Timestamp::from_millis(4)).unwrap();
        let back = State { sent: 9, sent_at: Some(chunk.sent_at), heard: chunk.heard, ..before };
        assert_eq!(files.state, back);
        drop(files);
        let files = open("d", "u", true).unwrap();
        assert_eq!(files.state, back);
        assert_eq!(std::fs::metadata(files.outcomes_path()).unwrap().len(), back.outcomes_bytes);
        drop(files);
        std::fs::remove_file(beside(&path, ".import.json")).unwrap();
        assert!(open("d", "u", true).err().unwrap().to_string().contains("not known"));
    }
}

//! The files that an import writes: outcomes and progress.

use std::{
    fmt,
    fs::{File, TryLockError},
    io::{ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use contract::{ObjectId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::import::{
    rows::Format,
    window::{Chunk, RowRecord, RowStatus},
};

/// Rows by status.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) pending: u64,
    pub(crate) rejected: u64,
    pub(crate) invalid: u64,
    pub(crate) unknown: u64,
}

impl Counts {
    pub(crate) fn rows(&self) -> u64 {
        let Self { succeeded, failed, pending, rejected, invalid, unknown } = self;
        succeeded + failed + pending + rejected + invalid + unknown
    }

    fn add(&mut self, status: &RowStatus) {
        *match status {
            RowStatus::Succeeded(_) => &mut self.succeeded,
            RowStatus::Failed { .. } => &mut self.failed,
            RowStatus::Pending(_) | RowStatus::Awaited(_) => &mut self.pending,
            RowStatus::Rejected { .. } => &mut self.rejected,
            RowStatus::Invalid { .. } => &mut self.invalid,
            RowStatus::Unknown => &mut self.unknown,
        } += 1;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { succeeded, failed, pending, rejected, invalid, unknown } = self;
        write!(f, "{succeeded} succeeded")?;
        for (count, status) in [
            (failed, "failed"),
            (rejected, "rejected"),
            (invalid, "invalid"),
            (pending, "pending"),
            (unknown, "unknown"),
        ] {
            if *count > 0 {
                write!(f, ", {count} {status}")?;
            }
        }
        Ok(())
    }
}

/// What to do with the files of an earlier import of the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Earlier {
    Refuse,
    Resume,
    Replace,
}

/// Identifies an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Run {
    /// Part of the idempotency keys of its chunks: another run of the same file applies its rows again.
    pub(crate) run_id: ObjectId,
    pub(crate) started_at: Timestamp,
    /// Of the file and the options.
    pub(crate) digest: String,
    pub(crate) gateway_url: String,
    pub(crate) rows: u64,
}

/// The progress of an import, as `--resume` needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImportState {
    #[serde(flatten)]
    pub(crate) run: Run,
    /// Rows whose outcomes are written, and the length of the outcomes file with them.
    pub(crate) written: Counts,
    pub(crate) outcomes_bytes: u64,
    /// Rows that may have been sent, including those written, and when the oldest row that is not written was sent.
    pub(crate) sent: u64,
    pub(crate) sent_at: Option<Timestamp>,
    /// An event from before the rows that are not written were sent.
    pub(crate) last_event_id: Option<String>,
    /// The start of the first chunk with pending rows.
    #[serde(default)]
    pub(crate) pending: Option<Pending>,
}

/// The state before a chunk with pending rows was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pending {
    written: Counts,
    outcomes_bytes: u64,
    sent_at: Timestamp,
    last_event_id: Option<String>,
}

impl ImportState {
    /// Whether every row has its outcome.
    pub(crate) fn is_complete(&self) -> bool {
        self.written.rows() == self.run.rows && self.pending.is_none()
    }

    /// Describes the earlier import of the file.
    pub(crate) fn describe(&self) -> String {
        let Run { started_at, gateway_url, rows, .. } = &self.run;
        let (at, done) = (started_at.to_iso(), self.written.rows());
        let progress =
            if done == *rows { "it is complete".to_owned() } else { format!("{done} of {rows} rows are done") };
        format!(
            "an import of this file was started at {at} with the gateway {gateway_url}; {progress}: {}",
            self.written
        )
    }
}

/// Both files of an import, locked against another import.
pub(crate) struct ImportFiles {
    format: Format,
    outcomes: File,
    outcomes_path: PathBuf,
    state_path: PathBuf,
    pub(crate) state: ImportState,
}

/// A row of the outcomes file.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OutcomeRow<'a> {
    row: u64,
    lead_id: Option<&'a str>,
    reference_id: Option<&'a str>,
    update_id: Option<String>,
    status: &'static str,
    code: Option<&'a str>,
    error: Option<&'a str>,
}

const HEADER: [&str; 7] = ["row", "leadId", "referenceId", "updateId", "status", "code", "error"];

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl ImportFiles {
    /// Creates the files, or opens those of an earlier import to resume it.
    pub(crate) fn open(path: &Path, format: Format, run: Run, earlier: Earlier) -> anyhow::Result<Self> {
        let outcomes_path = with_suffix(path, &format!(".outcomes.{}", format.extension()));
        let state_path = with_suffix(path, ".import.json");
        let (shown, state_shown) = (outcomes_path.display().to_string(), state_path.display().to_string());
        let previous = match std::fs::read_to_string(&state_path) {
            // A damaged state must not keep an import from being replaced.
            Ok(_) if earlier == Earlier::Replace => None,
            Ok(text) => {
                Some(serde_json::from_str::<ImportState>(&text).with_context(|| format!("{state_shown} is damaged"))?)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e).with_context(|| format!("cannot read {state_shown}")),
        };
        match &previous {
            _ if earlier == Earlier::Replace => {}
            Some(previous) if earlier == Earlier::Refuse => {
                bail!("{}; continue it with --resume, or import the file again with --again", previous.describe())
            }
            None if outcomes_path.exists() => {
                bail!("{shown} exists without {state_shown}, so its progress is unknown; replace it with --again")
            }
            Some(ImportState { run: previous, .. }) if previous.digest != run.digest => {
                bail!("the file, --project-id, --process-id or --separator has changed since the import started")
            }
            Some(ImportState { run: previous, .. }) if previous.gateway_url != run.gateway_url => {
                bail!("the import was started with the gateway {}, not {}", previous.gateway_url, run.gateway_url)
            }
            _ => {}
        }
        let open = File::options().create(true).truncate(false).write(true).open(&outcomes_path);
        let outcomes = open.with_context(|| format!("cannot open {shown}"))?;
        match outcomes.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another import of this file is running"),
            Err(TryLockError::Error(e)) => return Err(e).with_context(|| format!("cannot lock {shown}")),
        }
        let fresh = previous.is_none();
        let state = previous.unwrap_or_else(|| ImportState {
            run,
            written: Counts::default(),
            outcomes_bytes: 0,
            sent: 0,
            sent_at: None,
            last_event_id: None,
            pending: None,
        });
        let mut files = Self { format, outcomes, outcomes_path, state_path, state };
        if fresh {
            // Saved before the file is truncated: the state must not count rows that the file lacks.
            files.save()?;
        }
        files.truncate()?;
        if fresh {
            if format == Format::Csv {
                files.append(format!("{}\n", HEADER.join(",")).as_bytes())?;
            }
            files.save()?;
        }
        Ok(files)
    }

    pub(crate) fn outcomes_path(&self) -> &Path {
        &self.outcomes_path
    }

    /// Goes back to the first chunk with pending rows, if it was sent after `oldest`: from there on, outcomes are
    /// requested and written again.
    pub(crate) fn rewind_to_pending(&mut self, oldest: Timestamp) -> anyhow::Result<()> {
        let Some(pending) = self.state.pending.take_if(|pending| oldest < pending.sent_at) else { return Ok(()) };
        let Pending { written, outcomes_bytes, sent_at, last_event_id } = pending;
        self.state =
            ImportState { written, outcomes_bytes, sent_at: Some(sent_at), last_event_id, ..self.state.clone() };
        // Saved before the file is truncated: the state must not count rows that the file lacks.
        self.save()?;
        self.truncate()
    }

    /// Removes rows from the outcomes file that the state does not count.
    fn truncate(&mut self) -> anyhow::Result<()> {
        let cut = self.outcomes.set_len(self.state.outcomes_bytes).and_then(|()| self.outcomes.seek(SeekFrom::End(0)));
        cut.map(drop).with_context(|| format!("cannot write {}", self.outcomes_path.display()))
    }

    /// Writes the outcomes of the next chunk. They count once the state is saved; until then a crash discards them.
    pub(crate) fn write(&mut self, chunk: &Chunk) -> anyhow::Result<()> {
        let bytes = text(self.format, &chunk.records).context("cannot write outcomes")?;
        if chunk.records.iter().any(|record| matches!(record.status, RowStatus::Pending(_)))
            && self.state.pending.is_none()
        {
            self.state.pending = Some(Pending {
                written: self.state.written.clone(),
                outcomes_bytes: self.state.outcomes_bytes,
                sent_at: chunk.sent_at,
                last_event_id: chunk.last_event_id.clone(),
            });
        }
        self.append(&bytes)?;
        chunk.records.iter().for_each(|record| self.state.written.add(&record.status));
        Ok(())
    }

    /// Saves the state atomically.
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

fn text(format: Format, records: &[RowRecord]) -> anyhow::Result<Vec<u8>> {
    let written = records.iter().map(|record| {
        let (update_id, status, code, error) = match &record.status {
            RowStatus::Invalid { code, error } => (None, "invalid", *code, Some(error.as_str())),
            RowStatus::Rejected { code, error } => (None, "rejected", Some(code.as_str()), Some(error.as_str())),
            RowStatus::Awaited(id) | RowStatus::Pending(id) => (Some(id), "pending", None, None),
            RowStatus::Succeeded(id) => (Some(id), "succeeded", None, None),
            RowStatus::Failed { update_id, code, error } => {
                (Some(update_id), "failed", code.as_deref(), Some(error.as_str()))
            }
            RowStatus::Unknown => {
                (None, "unknown", None, Some("may have been sent more than a day ago; not sent again"))
            }
        };
        OutcomeRow {
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
    use super::*;

    fn records() -> Vec<RowRecord> {
        let id = ObjectId::from_bytes([1; 12]);
        let statuses = [
            RowStatus::Succeeded(id),
            RowStatus::Failed { update_id: id, code: Some("c".into()), error: "a \"call\", in progress".into() },
            RowStatus::Pending(id),
            RowStatus::Rejected { code: "invalid_field".into(), error: "no".into() },
            RowStatus::Invalid { code: None, error: "name: is not UTF-8".into() },
            RowStatus::Unknown,
        ];
        let records = statuses.into_iter().zip(1..);
        let lead_id = |number| (number == 1).then(|| "0101".to_owned());
        let records = records.map(|(status, number)| RowRecord {
            number,
            lead_id: lead_id(number),
            reference_id: (number == 2).then(|| "R, 2".to_owned()),
            status,
        });
        records.collect()
    }

    #[test]
    fn outcomes_are_written_as_csv_and_ndjson() {
        insta::assert_snapshot!(String::from_utf8(text(Format::Csv, &records()).unwrap()).unwrap(), @r#"
        1,0101,,010101010101010101010101,succeeded,,
        2,,"R, 2",010101010101010101010101,failed,c,"a ""call"", in progress"
        3,,,010101010101010101010101,pending,,
        4,,,,rejected,invalid_field,no
        5,,,,invalid,,name: is not UTF-8
        6,,,,unknown,,may have been sent more than a day ago; not sent again
        "#);
        let lines = String::from_utf8(text(Format::Ndjson, &records()[..2]).unwrap()).unwrap();
        insta::assert_snapshot!(lines, @r#"
        {"row":1,"leadId":"0101","referenceId":null,"updateId":"010101010101010101010101","status":"succeeded","code":null,"error":null}
        {"row":2,"leadId":null,"referenceId":"R, 2","updateId":"010101010101010101010101","status":"failed","code":"c","error":"a \"call\", in progress"}
        "#);
    }

    #[test]
    fn an_import_continues_from_its_saved_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leads.csv");
        let run = |digest: &str, url: &str, run| Run {
            run_id: ObjectId::from_bytes([run; 12]),
            started_at: Timestamp::from_millis(1_768_193_759_000),
            digest: digest.to_owned(),
            gateway_url: url.to_owned(),
            rows: 9,
        };
        let begin = |number, earlier| ImportFiles::open(&path, Format::Csv, run("d", "u", number), earlier);
        let open = |digest, url| ImportFiles::open(&path, Format::Csv, run(digest, url, 7), Earlier::Resume);
        let mut files = begin(1, Earlier::Refuse).unwrap();
        let chunk = |records| Chunk { records, sent_at: Timestamp::from_millis(5), last_event_id: Some("s-1".into()) };
        let (chunk, settled) = (chunk(records()), chunk(records().drain(..2).collect()));
        files.write(&settled).unwrap();
        let before = files.state.clone();
        for earlier in [Earlier::Resume, Earlier::Replace] {
            assert!(begin(2, earlier).err().unwrap().to_string().contains("running"));
        }
        files.write(&chunk).unwrap();
        files.state.sent = 9;
        files.save().unwrap();
        let (saved, bytes) = (files.state.clone(), std::fs::read(files.outcomes_path()).unwrap());
        assert_eq!((saved.written.rows(), saved.outcomes_bytes), (8, bytes.len() as u64));
        // Interrupted before the state was saved.
        files.write(&chunk).unwrap();
        drop(files);
        insta::assert_snapshot!(
            begin(2, Earlier::Refuse).err().unwrap(),
            @"an import of this file was started at 2026-01-12T04:55:59.000Z with the gateway u; 8 of 9 rows are done: 2 succeeded, 2 failed, 1 rejected, 1 invalid, 1 pending, 1 unknown; continue it with --resume, or import the file again with --again"
        );
        assert!(open("other", "u").err().unwrap().to_string().contains("has changed"));
        assert!(open("d", "other").err().unwrap().to_string().contains("gateway u"));
        let mut files = open("d", "u").unwrap();
        assert_eq!((&files.state, std::fs::read(files.outcomes_path()).unwrap()), (&saved, bytes));
        // Rewinds to the pending rows, unless they are too old.
        files.rewind_to_pending(Timestamp::from_millis(5)).unwrap();
        assert_eq!(files.state, saved);
        files.rewind_to_pending(Timestamp::from_millis(4)).unwrap();
        let back = ImportState { sent: 9, sent_at: Some(chunk.sent_at), last_event_id: chunk.last_event_id, ..before };
        assert_eq!(files.state, back);
        drop(files);
        let files = open("d", "u").unwrap();
        assert_eq!(files.state, back);
        assert_eq!(std::fs::metadata(files.outcomes_path()).unwrap().len(), back.outcomes_bytes);
        drop(files);
        std::fs::remove_file(with_suffix(&path, ".import.json")).unwrap();
        assert!(open("d", "u").err().unwrap().to_string().contains("unknown"));
        // Started again, it is another run.
        let files = begin(2, Earlier::Replace).unwrap();
        assert_eq!((files.state.run.run_id, files.state.written.rows()), (ObjectId::from_bytes([2; 12]), 0));
        assert_eq!(std::fs::read_to_string(files.outcomes_path()).unwrap(), format!("{}\n", HEADER.join(",")));
    }
}

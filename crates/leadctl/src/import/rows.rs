//! Reads the rows of a file as bodies of updates, or as errors.

use std::{
    borrow::Cow,
    cell::Cell,
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    rc::Rc,
};

use anyhow::{Context, bail};
use contract::{
    JsonObject, ObjectId,
    json::{self, Members, NotAnObject},
};
use csv::ByteRecord;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::import::columns::{Column, columns};

/// Longest row; the gateway's default limit is lower. Without a limit, a missing quote would make the rest of the file one
/// row.
const MAX_ROW_BYTES: usize = 1 << 20;
/// Ids are cut to this length in the outcomes file; no valid id is longer.
const MAX_ID_CHARS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Csv,
    Ndjson,
}

impl Format {
    /// The format by the file's extension.
    pub(crate) fn of(path: &Path) -> anyhow::Result<Self> {
        let extension = path.extension().and_then(|name| name.to_str()).map(str::to_ascii_lowercase);
        match extension.as_deref() {
            Some("csv") => Ok(Self::Csv),
            Some("ndjson" | "jsonl") => Ok(Self::Ndjson),
            _ => bail!("{} must end in .csv, .ndjson or .jsonl", path.display()),
        }
    }

    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Ndjson => "ndjson",
        }
    }
}

/// Project and process of rows with a referenceId that do not name them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeadScope {
    pub(crate) project_id: Option<ObjectId>,
    pub(crate) process_id: Option<ObjectId>,
}

#[derive(Debug)]
pub(crate) struct Row {
    /// Counted from 1, without the header and empty lines.
    pub(crate) number: u64,
    pub(crate) lead_id: Option<String>,
    pub(crate) reference_id: Option<String>,
    /// The update's body on one line.
    pub(crate) body: Result<String, Fault>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    column: Option<String>,
    why: String,
}

impl Fault {
    fn of_row(why: impl Into<String>) -> Self {
        Self { column: None, why: why.into() }
    }

    fn of(column: &str, why: impl fmt::Display) -> Self {
        Self { column: Some(column.to_owned()), why: why.to_string() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.column {
            Some(column) => write!(f, "{column}: {}", self.why),
            None => f.write_str(&self.why),
        }
    }
}

pub(crate) enum Rows {
    Csv {
        reader: csv::Reader<Limited<File>>,
        columns: Vec<(String, Column)>,
        left: Rc<Cell<usize>>,
        scope: LeadScope,
        number: u64,
    },
    Ndjson {
        reader: BufReader<File>,
        scope: LeadScope,
        number: u64,
        line: u64,
    },
}

impl Rows {
    /// Opens a file, and checks the header of a CSV file.
    pub(crate) fn open(path: &Path, format: Format, scope: LeadScope) -> anyhow::Result<Self> {
        let name = path.display();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        match format {
            Format::Ndjson => Ok(Self::Ndjson { reader: BufReader::new(file), scope, number: 0, line: 0 }),
            Format::Csv => {
                let left = Rc::new(Cell::new(MAX_ROW_BYTES));
                let limited = Limited { inner: file, left: left.clone() };
                let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(limited);
                let header = reader.byte_headers().with_context(|| format!("cannot read the header of {name}"))?;
                let header = header.iter().map(|cell| std::str::from_utf8(cell).map(str::trim));
                let header = header.collect::<Result<Vec<_>, _>>().with_context(|| format!("the header of {name}"))?;
                let columns = columns(&header).map_err(|why| anyhow::anyhow!("the header of {name}: {why}"))?;
                let columns = header.iter().map(|name| (*name).to_owned()).zip(columns).collect();
                Ok(Self::Csv { reader, columns, left, scope, number: 0 })
            }
        }
    }

    pub(crate) fn metadata_columns(&self) -> Vec<&str> {
        match self {
            Self::Ndjson { .. } => Vec::new(),
            Self::Csv { columns, .. } => {
                let metadata = columns.iter().filter(|(_, column)| matches!(column, Column::Member(_)));
                metadata.map(|(name, _)| name.as_str()).collect()
            }
        }
    }

    /// Reads the next row; none at the end.
    ///
    /// # Errors
    /// The rest of the file cannot be read.
    pub(crate) fn next(&mut self) -> anyhow::Result<Option<Row>> {
        match self {
            Self::Csv { reader, columns, left, scope, number } => {
                left.set(MAX_ROW_BYTES);
                let mut record = ByteRecord::new();
                let read = reader.read_byte_record(&mut record);
                if !read.with_context(|| format!("row {} cannot be read", *number + 1))? {
                    return Ok(None);
                }
                *number += 1;
                Ok(Some(of_record(*number, columns, &record, *scope)))
            }
            Self::Ndjson { reader, scope, number, line } => loop {
                let mut text = Vec::new();
                let read = reader.by_ref().take(MAX_ROW_BYTES as u64 + 1).read_until(b'\n', &mut text);
                if read.with_context(|| format!("line {} cannot be read", *line + 1))? == 0 {
                    return Ok(None);
                }
                *line += 1;
                if text.len() > MAX_ROW_BYTES {
                    bail!("line {line} is longer than {MAX_ROW_BYTES} bytes");
                }
                let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text).trim_ascii();
                if !text.is_empty() {
                    *number += 1;
                    return Ok(Some(of_line(*number, text, *scope)));
                }
            },
        }
    }
}

/// Limits the length of a row; the caller resets `left` before each row.
pub(crate) struct Limited<R> {
    inner: R,
    left: Rc<Cell<usize>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(self.left.get());
        if room == 0 && !buffer.is_empty() {
            return Err(io::Error::other(format!("the row has more than {MAX_ROW_BYTES} bytes; is a quote missing?")));
        }
        let read = self.inner.read(&mut buffer[..room])?;
        self.left.set(self.left.get() - read);
        Ok(read)
    }
}

fn of_record(number: u64, columns: &[(String, Column)], record: &ByteRecord, scope: LeadScope) -> Row {
    let mut row = Row { number, lead_id: None, reference_id: None, body: Err(Fault::of_row("")) };
    // The ids are kept even if the row is invalid, so that the outcomes file can name the lead.
    for ((_, column), cell) in columns.iter().zip(record) {
        let id = || id_of(String::from_utf8_lossy(cell).trim());
        match column {
            Column::Id("leadId") => row.lead_id = id(),
            Column::Text("referenceId") => row.reference_id = id(),
            _ => {}
        }
    }
    row.body = body_of_record(columns, record, scope);
    row
}

fn id_of(text: &str) -> Option<String> {
    Some(text.chars().take(MAX_ID_CHARS).collect()).filter(|id: &String| !id.is_empty())
}

fn body_of_record(columns: &[(String, Column)], record: &ByteRecord, scope: LeadScope) -> Result<String, Fault> {
    if record.len() != columns.len() {
        let (has, should) = (record.len(), columns.len());
        return Err(Fault::of_row(format!("has {has} cells; the header has {should}")));
    }
    let mut body = Members::new();
    let mut metadata = Members::new();
    for ((name, column), cell) in columns.iter().zip(record) {
        let text = std::str::from_utf8(cell).map_err(|_| Fault::of(name, "is not UTF-8"))?;
        if text.is_empty() {
            continue;
        }
        if text.contains('\0') {
            return Err(Fault::of(name, "contains a NUL character, which cannot be stored"));
        }
        let members = match column {
            Column::Id(field) => {
                let id: ObjectId = text.trim().parse().map_err(|_| Fault::of(name, "must be 24 hex digits"))?;
                body.insert((*field).into(), raw(&id));
                continue;
            }
            Column::Text(field) => {
                body.insert((*field).into(), raw(text));
                continue;
            }
            Column::Version => {
                let version: u32 = text.trim().parse().map_err(|_| Fault::of(name, "must be a lead's version"))?;
                body.insert(name.as_str().into(), raw(&version));
                continue;
            }
            Column::Metadata => {
                let text =
                    json::check(text.as_bytes()).map_err(|e| Fault::of(name, format_args!("is not JSON: {e}")))?;
                json::members(text).map_err(|_| Fault::of(name, NotAnObject))?
            }
            Column::Member(key) => Members::from_iter([(key.as_str().into(), raw(text))]),
        };
        for (key, value) in members {
            if metadata.contains_key(&key) {
                return Err(Fault::of(name, format_args!("sets the metadata {key:?} a second time")));
            }
            metadata.insert(key, value);
        }
    }
    if !metadata.is_empty() {
        body.insert("metadata".into(), Cow::Owned(JsonObject::from_members(&metadata).into_raw()));
    }
    if !["metadata", "name", "targetState"].iter().any(|field| body.contains_key(*field)) {
        return Err(Fault::of_row("changes nothing: it has no targetState, no name and no metadata"));
    }
    add_scope(&mut body, scope)?;
    Ok(JsonObject::from_members(&body).get().to_owned())
}

/// A row of an NDJSON file. It is sent unchanged, unless project and process must be added.
fn of_line(number: u64, text: &[u8], scope: LeadScope) -> Row {
    let object = || {
        let text = json::check(text).map_err(|e| Fault::of_row(format!("is not JSON: {e}")))?;
        JsonObject::from_text(text.to_owned()).map_err(|e| Fault::of_row(e.to_string()))
    };
    let object = match object() {
        Ok(object) => object,
        Err(fault) => return Row { number, lead_id: None, reference_id: None, body: Err(fault) },
    };
    let mut members = object.members();
    let id = |name: &str| {
        let text: String = serde_json::from_str(members.get(name)?.get()).ok()?;
        id_of(&text)
    };
    let (lead_id, reference_id) = (id("leadId"), id("referenceId"));
    let body = add_scope(&mut members, scope).map(|changed| match changed {
        true => JsonObject::from_members(&members).get().to_owned(),
        false => object.get().to_owned(),
    });
    Row { number, lead_id, reference_id, body }
}

/// Adds project and process to a body with a referenceId; returns whether the body was changed.
fn add_scope(body: &mut Members<'_>, scope: LeadScope) -> Result<bool, Fault> {
    let given =
        |body: &Members<'_>, name: &str| body.get(name).is_some_and(|value| !matches!(value.get(), "null" | "\"\""));
    if !given(body, "referenceId") {
        return match given(body, "leadId") {
            true => Ok(false),
            false => Err(Fault::of_row("has neither leadId nor referenceId")),
        };
    }
    let mut changed = false;
    for (name, id) in [("projectId", scope.project_id), ("processId", scope.process_id)] {
        if given(body, name) {
            continue;
        }
        let Some(id) = id else {
            let why = "has a referenceId, which requires projectId and processId: add them, or use --project-id and --process-id";
            return Err(Fault::of_row(why));
        };
        body.insert(name.into(), raw(&id));
        changed = true;
    }
    Ok(changed)
}

fn raw<T: Serialize + ?Sized>(value: &T) -> Cow<'static, RawValue> {
    // Serializing a text, an id or a number cannot fail.
    to_raw_value(value).map_or(Cow::Borrowed(RawValue::NULL), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";

    fn scope() -> LeadScope {
        LeadScope { project_id: Some(ObjectId::from_bytes([1; 12])), process_id: Some(ObjectId::from_bytes([2; 12])) }
    }

    fn read(name: &str, content: &[u8], scope: LeadScope) -> anyhow::Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mut rows = Rows::open(&path, Format::of(&path)?, scope)?;
        let mut read = Vec::new();
        while let Some(row) = rows.next()? {
            read.push(row);
        }
        Ok(read)
    }

    fn render(rows: &[Row]) -> String {
        let lines = rows.iter().map(|row| {
            let what = match &row.body {
                Ok(body) => body.clone(),
                Err(fault) => format!("! {fault}"),
            };
            format!("{} {what}\n", row.number)
        });
        lines.collect()
    }

    #[test]
    fn csv_rows_become_update_bodies() {
        let text = "\u{feff}leadId, name,targetState,expectedVersion,metadata,metadata.make,city\r\n\
                    696102a4b8c1d2e3f4a5b6c7,Ada,interested,7,,Toyota,\"Bad\nHomburg\"\r\n\
                    \r\n\
                    696102A4B8C1D2E3F4A5B6C7,,,,\"{\"\"n\"\": 1.50, \"\"x\"\":null}\",,\r\n\
                    nonsense,Ada,,,,,\r\n\
                    696102a4b8c1d2e3f4a5b6c7,,,,,,\r\n\
                    696102a4b8c1d2e3f4a5b6c7,Ada\r\n\
                    696102a4b8c1d2e3f4a5b6c7,,,x,,,Rome\r\n\
                    696102a4b8c1d2e3f4a5b6c7,,,,[1],,\r\n\
                    696102a4b8c1d2e3f4a5b6c7,,,,\"{\"\"a\"\":1,\"\"a\"\":2}\",,\r\n\
                    696102a4b8c1d2e3f4a5b6c7,,,,\"{\"\"city\"\":1}\",,Rome\r\n\
                    ,Ada,,,,,";
        insta::assert_snapshot!(render(&read("a.csv", text.as_bytes(), LeadScope::default()).unwrap()));
        let bad = [b"leadId,name\n696102a4b8c1d2e3f4a5b6c7,\xff\n", LEAD.as_bytes(), b",a\0b"].concat();
        insta::assert_snapshot!(render(&read("b.csv", &bad, LeadScope::default()).unwrap()), @r"
        1 ! name: is not UTF-8
        2 ! name: contains a NUL character, which cannot be stored
        ");
    }

    #[test]
    fn rows_with_a_reference_id_get_project_and_process() {
        let csv = b"referenceId,processId,make\nR-1,,Kia\nR-2,030303030303030303030303,Kia\n";
        insta::assert_snapshot!(render(&read("a.csv", csv, scope()).unwrap()), @r#"
        1 {"referenceId":"R-1","metadata":{"make":"Kia"},"projectId":"010101010101010101010101","processId":"020202020202020202020202"}
        2 {"referenceId":"R-2","processId":"030303030303030303030303","metadata":{"make":"Kia"},"projectId":"010101010101010101010101"}
        "#);
        let lines = b"\n{\"referenceId\": \"R-1\", \"n\": 1.0}\n{\"leadId\": \"x\", \"n\": 1.0}\n{\"n\":1}\n[]\n{";
        insta::assert_snapshot!(render(&read("a.jsonl", lines, scope()).unwrap()), @r#"
        1 {"referenceId":"R-1","n":1.0,"projectId":"010101010101010101010101","processId":"020202020202020202020202"}
        2 {"leadId": "x", "n": 1.0}
        3 ! has neither leadId nor referenceId
        4 ! must be a JSON object
        5 ! is not JSON: EOF while parsing an object at line 1 column 1
        "#);
        let rows = read("a.csv", csv, LeadScope::default()).unwrap();
        assert!(rows[0].body.clone().unwrap_err().to_string().contains("--process-id"));
        assert_eq!(rows[0].reference_id.as_deref(), Some("R-1"));
    }

    #[test]
    fn a_row_without_end_is_rejected() {
        let text = ["leadId,name\n", LEAD, ",\"Ada\n", &"x\n".repeat(MAX_ROW_BYTES)].concat();
        let fault = format!("{:#}", read("a.csv", text.as_bytes(), LeadScope::default()).unwrap_err());
        assert!(fault.contains("row 1 cannot be read") && fault.contains("is a quote missing?"), "{fault}");
        let fault = read("a.ndjson", &vec![b' '; MAX_ROW_BYTES + 1], LeadScope::default()).unwrap_err().to_string();
        assert!(fault.starts_with("line 1 is longer"), "{fault}");
        assert!(Format::of(Path::new("leads.xlsx")).is_err());
    }

    proptest! {
        /// The text of a cell is the text in the metadata.
        #[test]
        fn cells_are_kept_as_text(cells in prop::collection::vec("[^\0]{1,20}", 1..20)) {
            let mut writer = csv::Writer::from_writer(Vec::new());
            writer.write_record(["leadId", "note"]).unwrap();
            for cell in &cells {
                writer.write_record([LEAD, cell]).unwrap();
            }
            let rows = read("a.csv", &writer.into_inner().unwrap(), LeadScope::default()).unwrap();
            let notes = rows.iter().map(|row| {
                let body: serde_json::Value = serde_json::from_str(row.body.as_ref().unwrap()).unwrap();
                body["metadata"]["note"].as_str().unwrap().to_owned()
            });
            prop_assert_eq!(notes.collect::<Vec<_>>(), cells);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>, csv: bool) {
            let _ = read(if csv { "a.csv" } else { "a.ndjson" }, &bytes, scope());
        }
    }
}

//! Reads the rows of a file as bodies of updates, or as errors.

use std::{
    borrow::Cow,
    fmt,
    fs::File,
    io::{BufRead, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use contract::{
    JsonObject, ObjectId,
    fields::{BodyError, Fields},
    json::{self, Members, NotAnObject},
    text::trim,
    update_body::UpdateBody,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::import::{
    columns::{Column, columns, names_address},
    csv_reader::{self, CsvReader, FaultKind, MAX_RECORD_BYTES, Record, RecordFault},
    text::{self, Encoding},
};

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
            Some("csv" | "tsv" | "txt") => Ok(Self::Csv),
            Some("ndjson" | "jsonl") => Ok(Self::Ndjson),
            _ => bail!("{} must end in .csv (.tsv, .txt) or .ndjson (.jsonl)", path.display()),
        }
    }

    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Ndjson => "ndjson",
        }
    }
}

/// What separates the cells of a CSV file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Separator(u8);

impl Separator {
    const NAMED: [(&str, u8); 3] = [("comma", b','), ("semicolon", b';'), ("tab", b'\t')];
}

impl std::str::FromStr for Separator {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((_, byte)) = Self::NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(Self(*byte));
        }
        match text.as_bytes() {
            [byte] if byte.is_ascii_punctuation() && *byte != b'"' || [b'\t'] == [*byte] => Ok(Self(*byte)),
            _ => Err("must be comma, semicolon, tab, or one character such as |"),
        }
    }
}

impl fmt::Display for Separator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(_, byte)| *byte == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{:?}", char::from(self.0)),
        }
    }
}

/// A file, and how it is read.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) scope: LeadScope,
    /// Detected if it is not given.
    pub(crate) separator: Option<Separator>,
}

/// Project and process of rows with a referenceId that do not name them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeadScope {
    pub(crate) project_id: Option<ObjectId>,
    pub(crate) process_id: Option<ObjectId>,
}

#[derive(Debug)]
pub(crate) struct Row {
    /// Counted from 1, without the header and blank rows.
    pub(crate) number: u64,
    /// The first line, counted from 1.
    pub(crate) line: u64,
    pub(crate) lead_id: Option<String>,
    pub(crate) reference_id: Option<String>,
    /// The update's body on one line.
    pub(crate) body: Result<String, Fault>,
}

impl Row {
    fn new(number: u64, line: u64) -> Self {
        Self { number, line, lead_id: None, reference_id: None, body: Err(Fault::of_row("")) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    column: Option<String>,
    why: String,
    /// The code with which the gateway would refuse it.
    pub(crate) code: Option<&'static str>,
}

impl Fault {
    fn of_row(why: impl Into<String>) -> Self {
        Self { column: None, why: why.into(), code: None }
    }

    fn of(column: &str, why: impl fmt::Display) -> Self {
        Self { column: Some(column.to_owned()), why: why.to_string(), code: None }
    }

    fn of_body(error: &BodyError) -> Self {
        Self { column: None, why: error.to_string(), code: Some(error.code()) }
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
    Csv(CsvRows),
    Ndjson(NdjsonRows),
}

impl Rows {
    /// Opens a file, and checks the header of a CSV file.
    pub(crate) fn open(source: &Source) -> anyhow::Result<Self> {
        let name = source.path.display();
        let open = File::open(&source.path).and_then(text::open);
        let (reader, encoding) = open.with_context(|| format!("cannot read {name}"))?;
        match source.format {
            Format::Ndjson => Ok(Self::Ndjson(NdjsonRows { reader, scope: source.scope, number: 0, line: 0 })),
            Format::Csv => {
                let rows = CsvRows::open(reader, encoding, source.scope, source.separator);
                Ok(Self::Csv(rows.with_context(|| format!("the header of {name}"))?))
            }
        }
    }

    pub(crate) fn metadata_columns(&self) -> Vec<&str> {
        match self {
            Self::Ndjson(_) => Vec::new(),
            Self::Csv(CsvRows { columns, .. }) => {
                let metadata = columns.iter().filter(|(_, column)| matches!(column, Column::Member(_)));
                metadata.map(|(name, _)| name.as_str()).collect()
            }
        }
    }

    /// The separator of a CSV file.
    pub(crate) fn separator(&self) -> Option<Separator> {
        match self {
            Self::Ndjson(_) => None,
            Self::Csv(rows) => Some(rows.separator),
        }
    }

    /// What is unusual about a CSV file.
    pub(crate) fn remark(&self) -> Option<String> {
        let Self::Csv(CsvRows { separator, encoding, .. }) = self else { return None };
        let encoding = match encoding {
            Encoding::Utf8 if separator.0 == b',' => return None,
            Encoding::Utf8 => "",
            Encoding::Utf16 { .. } => ", UTF-16",
        };
        Some(format!("separator: {separator} (--separator overrides it){encoding}"))
    }

    /// Reads the next row; none at the end.
    ///
    /// # Errors
    /// The rest of the file cannot be read.
    pub(crate) fn next(&mut self) -> anyhow::Result<Option<Row>> {
        match self {
            Self::Csv(rows) => rows.next(),
            Self::Ndjson(rows) => rows.next(),
        }
    }
}

pub(crate) struct CsvRows {
    reader: CsvReader<Box<dyn BufRead>>,
    encoding: Encoding,
    separator: Separator,
    /// Each with its name.
    columns: Vec<(String, Column)>,
    /// The index of the column leadId.
    lead_id: Option<usize>,
    scope: LeadScope,
    number: u64,
}

impl CsvRows {
    /// Reads the header. If no separator is given, it is the one in a line `sep=`, or the first one with which the
    /// header names the address of a lead.
    fn open(
        reader: Box<dyn BufRead>,
        encoding: Encoding,
        scope: LeadScope,
        separator: Option<Separator>,
    ) -> anyhow::Result<Self> {
        let mut reader = CsvReader::new(reader);
        let line = reader.read_separator_line()?.map(Separator);
        let mut found = separator.or(line);
        for (_, byte) in Separator::NAMED {
            if found.is_none() && reader.peek_header(byte)?.is_some_and(|header| names_address(&header)) {
                found = Some(Separator(byte));
            }
        }
        let separator = found.unwrap_or(Separator(b','));
        reader.peek_header(separator.0)?;
        let header = match reader.next()? {
            Some(Record { cells, fault: None, .. }) => cells,
            Some(_) => bail!("cannot be read as CSV with the separator {separator}; is a quote missing?"),
            None => Vec::new(),
        };
        let names = header.iter().map(|cell| std::str::from_utf8(cell).map(trim)).collect::<Result<Vec<_>, _>>()?;
        // Spreadsheets write separators for columns without a header.
        let named = names.iter().rposition(|name| !name.is_empty()).map_or(0, |last| last + 1);
        let columns = columns(&names[..named]).map_err(anyhow::Error::msg)?;
        let lead_id = columns.iter().position(|column| *column == Column::Id("leadId"));
        let columns: Vec<_> = names.iter().map(|name| (*name).to_owned()).zip(columns).collect();
        reader.set_layout(separator.0, columns.len());
        Ok(Self { reader, encoding, separator, columns, lead_id, scope, number: 0 })
    }

    fn next(&mut self) -> anyhow::Result<Option<Row>> {
        let record = self.reader.next().with_context(|| format!("row {} cannot be read", self.number + 1))?;
        let Some(record) = record else { return Ok(None) };
        self.number += 1;
        let mut row = Row::new(self.number, record.lines.0);
        // The ids are kept even if the row is invalid, so that the outcomes file can name the lead.
        for ((_, column), cell) in self.columns.iter().zip(&record.cells) {
            let id = || id_of(trim(&String::from_utf8_lossy(cell)));
            match column {
                Column::Id("leadId") => row.lead_id = id(),
                Column::Text("referenceId") => row.reference_id = id(),
                _ => {}
            }
        }
        row.body = self.body(&record);
        Ok(Some(row))
    }

    fn body(&self, record: &Record) -> Result<String, Fault> {
        let lines = match record.lines {
            (first, last) if first == last => format!("line {first}"),
            (first, last) => format!("lines {first} to {last}"),
        };
        if let Some(RecordFault { kind, line, cell }) = record.fault {
            let column = self.columns.get(cell).map_or_else(|| format!("cell {}", cell + 1), |(name, _)| name.clone());
            let at = if record.lines.0 == line { String::new() } else { format!(" in line {line}") };
            let double = "a quote within a quoted cell must be doubled";
            let why = match kind {
                FaultKind::QuoteNeverClosed => {
                    format!("the quote that opens {column:?}{at} is never closed; {double}")
                }
                FaultKind::TextBehindQuote => {
                    format!("text follows the closing quote of {column:?}{at}; {double}")
                }
                FaultKind::TooLong => format!("is longer than {MAX_RECORD_BYTES} bytes"),
            };
            return Err(Fault::of_row(format!("{lines}: {why}")));
        }
        if record.cells.len() != self.columns.len() {
            let (has, should) = (record.cells.len(), self.columns.len());
            return Err(Fault::of_row(format!("{lines}: has {has} cells; the header has {should}")));
        }
        if let Some((name, _)) =
            self.columns.iter().zip(&record.cells).find_map(|(column, cell)| self.hides_row(cell).then_some(column))
        {
            let why = format!("{name:?} contains a line that looks like a row of its own; is a quote missing?");
            return Err(Fault::of_row(format!("{lines}: {why} If the text is right, import it as NDJSON")));
        }
        body_of_record(&self.columns, &record.cells, self.scope)
    }

    /// Whether the text of a cell has a line that begins like a row, with a leadId. Two missing quotes can form one
    /// valid cell of all the rows between them.
    fn hides_row(&self, cell: &[u8]) -> bool {
        let Some(lead_id) = self.lead_id else { return false };
        cell.split(|byte| matches!(byte, b'\r' | b'\n')).skip(1).any(|line| {
            let cells = csv_reader::cells(line, self.separator.0).unwrap_or_default();
            let id = cells.get(lead_id).and_then(|cell| std::str::from_utf8(cell).ok());
            cells.len() > 1 && id.is_some_and(|id| id.trim().parse::<ObjectId>().is_ok())
        })
    }
}

pub(crate) struct NdjsonRows {
    reader: Box<dyn BufRead>,
    scope: LeadScope,
    number: u64,
    line: u64,
}

impl NdjsonRows {
    fn next(&mut self) -> anyhow::Result<Option<Row>> {
        loop {
            let mut text = Vec::new();
            let read = self.reader.by_ref().take(MAX_RECORD_BYTES as u64 + 1).read_until(b'\n', &mut text);
            if read.with_context(|| format!("line {} cannot be read", self.line + 1))? == 0 {
                return Ok(None);
            }
            self.line += 1;
            let too_long = text.len() > MAX_RECORD_BYTES && text.last() != Some(&b'\n');
            if too_long {
                self.reader.skip_until(b'\n')?;
            } else if text.trim_ascii().is_empty() {
                continue;
            }
            self.number += 1;
            let row = Row::new(self.number, self.line);
            return Ok(Some(match too_long {
                true => Row { body: Err(Fault::of_row(format!("is longer than {MAX_RECORD_BYTES} bytes"))), ..row },
                false => of_line(row, text.trim_ascii(), self.scope),
            }));
        }
    }
}

fn id_of(text: &str) -> Option<String> {
    Some(text.chars().take(MAX_ID_CHARS).collect()).filter(|id: &String| !id.is_empty())
}

fn body_of_record(columns: &[(String, Column)], record: &[Vec<u8>], scope: LeadScope) -> Result<String, Fault> {
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
                let id: ObjectId = trim(text).parse().map_err(|_| Fault::of(name, "must be 24 hex digits"))?;
                body.insert((*field).into(), raw(&id));
                continue;
            }
            // A referenceId that differs by a space would name another lead, or none.
            Column::Text(field @ "referenceId") => {
                body.insert((*field).into(), raw(trim(text)));
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
    if !body.contains_key("leadId") && !body.contains_key("referenceId") {
        return Err(Fault::of_row("has neither leadId nor referenceId"));
    }
    add_scope(&mut body, scope)?;
    Ok(on_one_line(JsonObject::from_members(&body).get()))
}

/// JSON without the line breaks between its tokens: inside of a text they are always escaped.
fn on_one_line(json: &str) -> String {
    json.replace(['\n', '\r'], " ")
}

/// A row of an NDJSON file. It is sent unchanged, unless project and process must be added.
fn of_line(row: Row, text: &[u8], scope: LeadScope) -> Row {
    let mut members = match Fields::from_json(text) {
        Ok(mut fields) => fields.rest(),
        Err(e) => return Row { body: Err(Fault::of_body(&e)), ..row },
    };
    let id = |name: &str| {
        let text: String = serde_json::from_str(members.get(name)?.get()).ok()?;
        id_of(&text)
    };
    let (lead_id, reference_id) = (id("leadId"), id("referenceId"));
    let body = add_scope(&mut members, scope).and_then(|changed| {
        let body = match changed {
            true => JsonObject::from_members(&members).get().to_owned(),
            false => String::from_utf8_lossy(text).into_owned(),
        };
        UpdateBody::parse_line(body.as_bytes(), None).map_err(|e| Fault::of_body(&e))?;
        Ok(body)
    });
    Row { lead_id, reference_id, body, ..row }
}

/// Adds project and process to a body with a referenceId; returns whether the body was changed.
fn add_scope(body: &mut Members<'_>, scope: LeadScope) -> Result<bool, Fault> {
    let given =
        |body: &Members<'_>, name: &str| body.get(name).is_some_and(|value| !matches!(value.get(), "null" | "\"\""));
    if !given(body, "referenceId") {
        return Ok(false);
    }
    let mut changed = false;
    for (name, id) in [("projectId", scope.project_id), ("processId", scope.process_id)] {
        if given(body, name) {
            continue;
        }
        let Some(id) = id else {
            let why = "has a referenceId, which requires projectId and processId: add them, or use --project-id and --process-id";
            return Err(Fault { code: Some("missing_field"), ..Fault::of_row(why) });
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
        let format = Format::of(&path)?;
        let mut rows = Rows::open(&Source { path, format, scope, separator: None })?;
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
    fn metadata_over_several_lines_is_sent_on_one() {
        let cell = "{\n  \"\"h\"\": [\r\n    {\"\"leadId\"\": \"\"x\"\", \"\"text\"\": \"\"a\\nb\"\"}\n  ]\n}";
        let rows = read("rows.csv", format!("leadId,metadata\n{LEAD},\"{cell}\"\n").as_bytes(), scope()).unwrap();

        let body = rows[0].body.as_ref().unwrap();

        assert!(!body.contains(['\n', '\r']), "{body}");
        let parsed: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(parsed["metadata"]["h"][0]["text"], "a\nb");
    }

    #[test]
    fn csv_rows_become_update_bodies() {
        let text = "\u{feff}leadId, name,targetState,$expectedVersion,metadata,metadata.make,city\r\n\
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
        let lines = b"\n{\"referenceId\": \"R-1\", \"n\": 1.0}\n{\"leadId\": \"696102a4b8c1d2e3f4a5b6c7\", \"n\": 1.0}\n{\"n\":1}\n[]\n{";
        insta::assert_snapshot!(render(&read("a.jsonl", lines, scope()).unwrap()), @r#"
        1 {"referenceId":"R-1","n":1.0,"projectId":"010101010101010101010101","processId":"020202020202020202020202"}
        2 {"leadId": "696102a4b8c1d2e3f4a5b6c7", "n": 1.0}
        3 ! Either leadId or referenceId is required
        4 ! The body must be a JSON object
        5 ! The body cannot be accepted as JSON: EOF while parsing an object at line 1 column 1
        "#);
        let rows = read("a.csv", csv, LeadScope::default()).unwrap();
        assert!(rows[0].body.clone().unwrap_err().to_string().contains("--process-id"));
        assert_eq!(rows[0].reference_id.as_deref(), Some("R-1"));
    }

    #[test]
    fn files_are_read_as_spreadsheets_write_them() {
        let row =
            |text: &str| format!("1 {{\"leadId\":\"{LEAD}\",\"name\":\"Ada\",\"metadata\":{{\"make\":\"{text}\"}}}}\n");
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        for (text, make, remark) in [
            ("leadId;name;make\r\nLEAD;Ada;Kia\r\n", "Kia", "separator: semicolon (--separator overrides it)"),
            ("leadId\tname\tmake\nLEAD\tAda\tK,ia", "K,ia", "separator: tab (--separator overrides it)"),
            ("sep=,\r\nleadId,name,make\r\nLEAD,Ada,Kia", "Kia", ""),
            ("\"SEP=|\"\r\nleadId|name|make\r\nLEAD|Ada|Kia", "Kia", "separator: '|' (--separator overrides it)"),
            ("\u{feff}\u{feff}leadId,name,make\nLEAD,Ada,Kia", "Kia", ""),
            (
                ";;;\nleadId;name;make;;\n;;;;\nLEAD;Ada;Kia;;\n;;\n",
                "Kia",
                "separator: semicolon (--separator overrides it)",
            ),
            ("leadId\u{200b},\u{a0}name,make\n\u{feff}LEAD\u{a0},Ada,K ia ", "K ia ", ""),
        ] {
            let text = text.replace("LEAD", LEAD);
            assert_eq!(render(&read("a.csv", text.as_bytes(), LeadScope::default()).unwrap()), row(make), "{text:?}");
            let wide = utf16(&format!("\u{feff}{text}"));
            assert_eq!(render(&read("a.txt", &wide, LeadScope::default()).unwrap()), row(make), "{text:?} in UTF-16");
            let (reader, encoding) = text::open(std::io::Cursor::new(text.into_bytes())).unwrap();
            let rows = Rows::Csv(CsvRows::open(reader, encoding, LeadScope::default(), None).unwrap());
            assert_eq!(rows.remark().unwrap_or_default(), remark);
        }
        assert_eq!(read("a.ndjson", &utf16("\u{feff}{\"leadId\":\"x\"}\n"), scope()).unwrap().len(), 1);
        for (text, fault) in [("", "must name the columns"), ("leadId,\"name\n", "is a quote missing?")] {
            let error = format!("{:#}", read("a.csv", text.as_bytes(), scope()).unwrap_err());
            assert!(error.contains(fault), "{error}");
        }
        for (text, separator) in [("tab", Some(b'\t')), ("|", Some(b'|')), ("\"", None), ("a", None), (";;", None)] {
            assert_eq!(text.parse().ok(), separator.map(Separator), "{text}");
        }
    }

    #[test]
    fn a_row_with_a_wrong_quote_is_named_with_its_lines() {
        let text = "leadId,note,n\n\
                    LEAD,\"broken,1\n\
                    LEAD,\"a \"b\" c\",1\n\
                    LEAD,\"begins here,1\n\
                    LEAD,x,1\n\
                    LEAD,\"and ends here\",1\n\
                    LEAD,\"two\nlines\"\n\
                    LEAD,\"hidden\nLEAD,x\",1\n\
                    LEAD,fine,1\n";
        let rows = read("a.csv", text.replace("LEAD", LEAD).as_bytes(), LeadScope::default()).unwrap();
        insta::assert_snapshot!(render(&rows), @r#"
        1 ! lines 2 to 4: text follows the closing quote of "note" in line 3; a quote within a quoted cell must be doubled
        2 {"leadId":"696102a4b8c1d2e3f4a5b6c7","metadata":{"note":"x","n":"1"}}
        3 {"leadId":"696102a4b8c1d2e3f4a5b6c7","metadata":{"note":"and ends here","n":"1"}}
        4 ! lines 7 to 8: has 2 cells; the header has 3
        5 ! lines 9 to 10: "note" contains a line that looks like a row of its own; is a quote missing? If the text is right, import it as NDJSON
        6 {"leadId":"696102a4b8c1d2e3f4a5b6c7","metadata":{"note":"fine","n":"1"}}
        "#);
        assert!(rows.iter().all(|row| row.lead_id.as_deref() == Some(LEAD)));
        assert!(Format::of(Path::new("leads.xlsx")).is_err());
        let long = ["{}\n".to_owned(), " ".repeat(MAX_RECORD_BYTES + 1), "\n{}".to_owned()].concat();
        let rows = read("a.ndjson", long.as_bytes(), LeadScope::default()).unwrap();
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(rows[1].body.clone().unwrap_err().to_string().contains("longer than"));
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

//! Splits a CSV file into records (RFC 4180), strictly: a quote that is never closed and text after a closing quote are
//! faults of their record, and reading continues with the next row.
//!
//! After a fault that reaches beyond its line, the quotes of the following lines cannot be paired with certainty. The
//! next record is the first following line that begins a complete record with the header's number of cells. The lines
//! before it belong to the faulty record: they are reported with it and never sent.

use std::io::{self, BufRead};

/// Longest record; the gateway's default limit is lower.
pub(crate) const MAX_RECORD_BYTES: usize = 1 << 20;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 8 << 10;

type Cells = Vec<Vec<u8>>;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The first and the last line, counted from 1.
    pub(crate) lines: (u64, u64),
    /// The cells before the fault, if there is one.
    pub(crate) cells: Cells,
    pub(crate) fault: Option<RecordFault>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordFault {
    pub(crate) kind: FaultKind,
    pub(crate) line: u64,
    pub(crate) cell: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultKind {
    QuoteNeverClosed,
    TextBehindQuote,
    TooLong,
}

/// The first record of a text.
#[derive(Debug, PartialEq, Eq)]
enum Split {
    /// The cells, and the length with the line break.
    Record(Cells, usize),
    /// The cells before the fault, and where the fault is.
    Fault(FaultKind, Cells, usize),
    /// The record continues beyond the text.
    Incomplete,
}

pub(crate) struct CsvReader<R> {
    inner: R,
    buffer: Vec<u8>,
    /// Where the unread part of the buffer begins, and its line.
    start: usize,
    line: u64,
    /// The line of the last byte that was read.
    last_line: u64,
    /// Whether `inner` has ended.
    at_end: bool,
    separator: u8,
    /// Cells per record.
    width: usize,
}

impl<R: BufRead> CsvReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        let (buffer, start, at_end) = (Vec::new(), 0, false);
        Self { inner, buffer, start, line: 1, last_line: 1, at_end, separator: b',', width: 0 }
    }

    /// Sets the layout of the following records.
    pub(crate) fn set_layout(&mut self, separator: u8, width: usize) {
        (self.separator, self.width) = (separator, width);
    }

    /// Reads the line `sep=;` that spreadsheets write before the header.
    pub(crate) fn read_separator_line(&mut self) -> io::Result<Option<u8>> {
        self.require(CHUNK_BYTES)?;
        let text = self.unread();
        let line = &text[..line_end(text, true).unwrap_or(text.len())];
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = line.strip_prefix(b"\"").and_then(|line| line.strip_suffix(b"\"")).unwrap_or(line);
        let [s, e, p, b'=', separator] = *line else { return Ok(None) };
        if ![s, e, p].eq_ignore_ascii_case(b"sep") {
            return Ok(None);
        }
        self.skip_line()?;
        Ok(Some(separator))
    }

    /// The cells of the next record with this separator. The record is not consumed; lines without text before it are.
    pub(crate) fn peek_header(&mut self, separator: u8) -> io::Result<Option<Cells>> {
        self.set_layout(separator, 0);
        self.require(CHUNK_BYTES)?;
        while !self.unread().is_empty() {
            match self.split()? {
                Split::Record(cells, _) if cells.iter().flatten().all(|byte| b" \t,;".contains(byte)) => {
                    self.skip_line()?;
                }
                Split::Record(cells, _) => return Ok(Some(cells)),
                Split::Fault(..) | Split::Incomplete => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Reads the next record that is not blank; none at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Record>> {
        while self.require(1)? {
            let first = self.line;
            match self.split()? {
                Split::Record(cells, bytes) => {
                    self.consume(bytes);
                    if !is_blank(&cells) {
                        let (cells, lines) = (self.without_excess(cells), (first, self.last_line));
                        return Ok(Some(Record { lines, cells, fault: None }));
                    }
                }
                Split::Fault(kind, cells, at) => {
                    let line = first + line_breaks(&self.unread()[..at]);
                    self.skip_line()?;
                    // A fault within the first line leaves no doubt where the next row begins.
                    if line > first || kind == FaultKind::QuoteNeverClosed {
                        self.skip_to_record()?;
                    }
                    let fault = Some(RecordFault { kind, line, cell: cells.len() });
                    return Ok(Some(Record { lines: (first, self.last_line), cells, fault }));
                }
                Split::Incomplete => break,
            }
        }
        Ok(None)
    }

    /// Skips lines until one begins a complete record.
    fn skip_to_record(&mut self) -> io::Result<()> {
        while self.require(1)? {
            match self.split()? {
                Split::Record(cells, _)
                    if !is_blank(&cells) && self.without_excess(cells.clone()).len() == self.width =>
                {
                    break;
                }
                _ => self.skip_line()?,
            }
        }
        Ok(())
    }

    /// Removes blank cells after the last column: spreadsheets write separators for columns without a header.
    fn without_excess(&self, mut cells: Cells) -> Cells {
        while cells.len() > self.width && self.width > 0 && cells.pop_if(|cell| cell.trim_ascii().is_empty()).is_some()
        {
        }
        cells
    }

    /// Splits the next record off. Incomplete only at the end of the file.
    fn split(&mut self) -> io::Result<Split> {
        loop {
            let text = self.unread();
            match split(text, self.separator, self.at_end) {
                Split::Incomplete if text.len() > MAX_RECORD_BYTES => {
                    return Ok(match split(text, self.separator, true) {
                        Split::Record(cells, _) => Split::Fault(FaultKind::TooLong, cells, 0),
                        fault => fault,
                    });
                }
                // Doubled, so that a long record is not split from its start for each chunk.
                Split::Incomplete if !self.at_end => {
                    self.require((2 * text.len()).clamp(CHUNK_BYTES, MAX_RECORD_BYTES + 1))?
                }
                split => return Ok(split),
            };
        }
    }

    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// Reads until this many bytes are unread, or to the end of the file. Returns whether there are as many.
    fn require(&mut self, bytes: usize) -> io::Result<bool> {
        if self.unread().len() < bytes && !self.at_end {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        while self.unread().len() < bytes && !self.at_end {
            let read = self.inner.fill_buf()?;
            self.buffer.extend_from_slice(read);
            let read = read.len();
            self.inner.consume(read);
            self.at_end = read == 0;
        }
        Ok(self.unread().len() >= bytes)
    }

    fn consume(&mut self, bytes: usize) {
        let consumed = &self.buffer[self.start..self.start + bytes];
        let breaks = line_breaks(consumed);
        self.last_line = self.line + breaks - u64::from(matches!(consumed.last(), Some(b'\n' | b'\r')));
        self.line += breaks;
        self.start += bytes;
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            if let Some(end) = line_end(self.unread(), self.at_end) {
                self.consume(end);
                return Ok(());
            }
            // The last byte may be the first half of a line break.
            let whole = self.unread().len();
            self.consume(if self.at_end { whole } else { whole.saturating_sub(1) });
            if !self.require(2)? && self.unread().is_empty() {
                return Ok(());
            }
        }
    }
}

/// The cells of a single line; none if a quote is wrong.
pub(crate) fn cells(line: &[u8], separator: u8) -> Option<Cells> {
    match split(line, separator, true) {
        Split::Record(cells, _) => Some(cells),
        _ => None,
    }
}

pub(crate) fn is_blank(cells: &[Vec<u8>]) -> bool {
    cells.iter().all(|cell| cell.trim_ascii().is_empty())
}

/// Splits the first record off a text, which the file ends with if `at_end`.
fn split(text: &[u8], separator: u8, at_end: bool) -> Split {
    let mut cells = Vec::new();
    let mut at = 0;
    loop {
        let begin = at;
        let cell = match text.get(at) {
            Some(b'"') => match unquote(&text[begin..]) {
                Some((cell, length)) => {
                    at += length;
                    cell
                }
                None if at_end => return Split::Fault(FaultKind::QuoteNeverClosed, cells, begin),
                None => return Split::Incomplete,
            },
            _ => {
                let length = text[at..].iter().position(|byte| [separator, b'\r', b'\n'].contains(byte));
                at += length.unwrap_or(text.len() - at);
                text[begin..at].to_vec()
            }
        };
        match text.get(at) {
            Some(byte) if *byte == separator => at += 1,
            Some(b'\r' | b'\n') => {
                let Some(end) = line_end(&text[at..], at_end) else { return Split::Incomplete };
                cells.push(cell);
                return Split::Record(cells, at + end);
            }
            Some(_) => return Split::Fault(FaultKind::TextBehindQuote, cells, at),
            None if at_end => {
                cells.push(cell);
                return Split::Record(cells, at);
            }
            None => return Split::Incomplete,
        }
        cells.push(cell);
    }
}

/// The text of a quoted cell, and its length with the quotes; none without a closing quote.
fn unquote(quoted: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut cell = Vec::new();
    let mut at = 1;
    loop {
        let length = quoted[at..].iter().position(|byte| *byte == b'"')?;
        cell.extend_from_slice(&quoted[at..at + length]);
        at += length + 1;
        if quoted.get(at) != Some(&b'"') {
            return Some((cell, at));
        }
        cell.push(b'"');
        at += 1;
    }
}

/// The length of the first line with its break (`\n`, `\r\n` or `\r`); none if the text ends before.
fn line_end(text: &[u8], at_end: bool) -> Option<usize> {
    let at = text.iter().position(|byte| matches!(byte, b'\r' | b'\n'))?;
    match (text[at], text.get(at + 1)) {
        (b'\r', Some(b'\n')) => Some(at + 2),
        (b'\r', None) if !at_end => None,
        _ => Some(at + 1),
    }
}

fn line_breaks(text: &[u8]) -> u64 {
    let mut breaks = 0;
    let mut rest = text;
    while let Some(end) = line_end(rest, true) {
        breaks += 1;
        rest = &rest[end..];
    }
    breaks
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;

    use super::*;

    /// Reads with a buffer of `part` bytes. The first record is the header.
    fn read(text: &[u8], separator: u8, part: usize) -> Vec<Record> {
        let mut reader = CsvReader::new(BufReader::with_capacity(part, text));
        let width = reader.peek_header(separator).unwrap().map_or(0, |header| header.len());
        reader.set_layout(separator, width);
        std::iter::from_fn(|| reader.next().unwrap()).skip(1).collect()
    }

    fn render(records: &[Record]) -> String {
        let line = |Record { lines: (first, last), cells, fault }: &Record| {
            let cells: Vec<_> = cells.iter().map(|cell| String::from_utf8_lossy(cell)).collect();
            let fault = fault.map(|fault| format!(" {:?} line {} cell {}", fault.kind, fault.line, fault.cell));
            format!("{first}-{last} {cells:?}{}\n", fault.unwrap_or_default())
        };
        records.iter().map(line).collect()
    }

    #[test]
    fn a_wrong_quote_is_a_fault_of_its_row() {
        let cases: [(&str, &str, &str); 11] = [
            (
                "never closed",
                "a,b\n1,x\n2,\"broken\n3,y\n4,z\n",
                "2-2 [\"1\", \"x\"]\n3-3 [\"2\"] QuoteNeverClosed line 3 cell 1\n4-4 [\"3\", \"y\"]\n5-5 [\"4\", \"z\"]\n",
            ),
            (
                "closed by the next row's quote",
                "a,b\n2,\"broken\n3,\"y\"\n4,z",
                "2-2 [\"2\"] TextBehindQuote line 3 cell 1\n3-3 [\"3\", \"y\"]\n4-4 [\"4\", \"z\"]\n",
            ),
            (
                "closed by a fully quoted row",
                "a,b\r\n\"2\",\"broken\r\n\"3\",\"y\"\r\n",
                "2-2 [\"2\"] TextBehindQuote line 3 cell 1\n3-3 [\"3\", \"y\"]\n",
            ),
            (
                "text behind a quote",
                "a,b\n2,\"x\"y\n3,\"x\" \n4,z\n",
                "2-2 [\"2\"] TextBehindQuote line 2 cell 1\n3-3 [\"3\"] TextBehindQuote line 3 cell 1\n4-4 [\"4\", \"z\"]\n",
            ),
            (
                "two faults in a row",
                "a,b\n2,\"x\n3,\"y\n4,z\n",
                "2-3 [\"2\"] TextBehindQuote line 3 cell 1\n4-4 [\"4\", \"z\"]\n",
            ),
            (
                "a following row of several lines",
                "a,b\n2,\"x\n3,\"y\ny\"\n4,z\n",
                "2-2 [\"2\"] TextBehindQuote line 3 cell 1\n3-4 [\"3\", \"y\\ny\"]\n5-5 [\"4\", \"z\"]\n",
            ),
            ("nothing behind it", "a,b\n2,\"x\n\nno row\n", "2-4 [\"2\"] QuoteNeverClosed line 2 cell 1\n"),
            ("quotes within text", "a,b\n2,5\" \"pipe\"\n", "2-2 [\"2\", \"5\\\" \\\"pipe\\\"\"]\n"),
            ("blank rows", "a,b\n\n,\n \"\", \n2,x\n,,,\n", "4-4 [\" \\\"\\\"\", \" \"]\n5-5 [\"2\", \"x\"]\n"),
            ("trailing separators", "a,b\n2,x,,\n3,x,y\n", "2-2 [\"2\", \"x\"]\n3-3 [\"3\", \"x\", \"y\"]\n"),
            ("old line breaks", "a,b\r2,\"x\ry\"\r3,z", "2-3 [\"2\", \"x\\ry\"]\n4-4 [\"3\", \"z\"]\n"),
        ];
        for (what, text, expected) in cases {
            for part in [1, 3, 8192] {
                assert_eq!(render(&read(text.as_bytes(), b',', part)), expected, "{what}, {part} bytes at once");
            }
        }
    }

    #[test]
    fn a_row_that_is_too_long_does_not_hide_the_next() {
        let long = "x".repeat(3 * MAX_RECORD_BYTES);
        let count = MAX_RECORD_BYTES / 64;
        let lines = format!("{}\n", "y".repeat(127)).repeat(count);
        let text = format!("a,b\n1,{long}\r\n2,\"{lines}3,\"z\"\n4,z");
        let read = read(text.as_bytes(), b',', CHUNK_BYTES);
        let faults: Vec<_> = read.iter().map(|record| record.fault.map(|fault| fault.kind)).collect();
        assert_eq!(faults, [Some(FaultKind::TooLong), Some(FaultKind::QuoteNeverClosed), None, None]);
        assert_eq!(read[1].lines, (3, 2 + count as u64));
        assert_eq!(read[3].cells, [b"4", b"z"]);
    }

    proptest! {
        /// Records that the csv crate wrote are read as they were written.
        #[test]
        fn written_cells_are_read(rows in prop::collection::vec(prop::collection::vec("[a\",;\r\n\t é]{0,6}", 3), 1..8),
                                  tab: bool, part in 1_usize..40) {
            let separator = if tab { b'\t' } else { b';' };
            let mut writer = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
            writer.write_record(["a", "b", "c"]).unwrap();
            for row in &rows {
                writer.write_record(row).unwrap();
            }
            let read = read(&writer.into_inner().unwrap(), separator, part);
            let read: Vec<Cells> = read.into_iter().map(|record| { assert_eq!(record.fault, None); record.cells }).collect();
            let cells = |row: &Vec<String>| row.iter().map(|cell| cell.clone().into_bytes()).collect::<Cells>();
            let written: Vec<Cells> = rows.iter().map(cells).filter(|row| !is_blank(row)).collect();
            prop_assert_eq!(read, written);
        }

        #[test]
        fn arbitrary_text_ends(text in "[a\",\r\n]{0,60}", part in 1_usize..20) {
            let records = read(text.as_bytes(), b',', part);
            prop_assert!(records.windows(2).all(|pair| pair[0].lines.1 < pair[1].lines.0));
        }
    }
}

//! The only writer: text, tables and JSON on standard output, remarks and progress on standard error.
//!
//! All output passes [`say`], [`json_text`] or [`note`], which escape control characters: no text from a request, a
//! file or an endpoint reaches the terminal as a command. Cells and fields cannot begin a line, either. The lints
//! `print_stdout` and `print_stderr` forbid other output in the crate.

pub(crate) mod escape;
pub(crate) mod progress;
#[cfg(test)]
mod tests;
pub(crate) mod timeline;

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::Context;
use contract::Timestamp;
use serde::Serialize;
use service_kit::escape::{escaped_json, escaped_line, escaped_text};

#[cfg(not(test))]
use crate::exit_status::output_error_code;

/// Prints a line, or several. Ends the program if they cannot be written.
pub(crate) fn say(line: impl Display) {
    write_line(&escaped_text(&line.to_string()));
}

/// Prints a remark on standard error.
pub(crate) fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "leadctl: {}", escaped_text(&line.to_string()));
}

/// Prints a name and its value, aligned with the other fields.
pub(crate) fn field(name: &str, value: impl Display) {
    say(format_args!("  {name:<12}{}", escaped_line(&value.to_string())));
}

pub(crate) fn minute(at: Timestamp) -> String {
    let text = at.to_iso();
    text.get(..16).map_or(text.clone(), |minute| format!("{minute}Z"))
}

/// Prints a value as JSON on one line.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    json_text(&serde_json::to_string(value).context("cannot write the result as JSON")?);
    Ok(())
}

/// Prints JSON as it was received.
pub(crate) fn json_text(text: &str) {
    write_line(&escaped_json(text));
}

#[cfg(not(test))]
fn write_line(line: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
        end_without_output(&error);
    }
}

/// Ends the program, quietly if the reader has ended (`leadctl … | head`). Commands print what they have done, so that
/// nothing is left half done here.
#[cfg(not(test))]
fn end_without_output(error: &io::Error) -> ! {
    if error.kind() != io::ErrorKind::BrokenPipe {
        note(format_args!("cannot write to standard output: {error}"));
    }
    std::process::exit(output_error_code(error).into())
}

#[cfg(test)]
use tests::write_line;

/// Prints a result: as JSON for programs, else as text.
pub(crate) fn show<T: Serialize>(as_json: bool, value: &T, text: impl FnOnce(&T)) -> anyhow::Result<()> {
    if as_json {
        return json(value);
    }
    text(value);
    Ok(())
}

/// Prints a table of items, or `none` if there are no items.
pub(crate) fn list<T, const N: usize>(none: &str, head: [&str; N], items: &[T], row: impl Fn(&T) -> [String; N]) {
    if items.is_empty() {
        return say(none);
    }
    say(table(Some(head), &items.iter().map(row).collect::<Vec<_>>()));
}

/// A table with columns as wide as their widest cell.
pub(crate) fn table<const N: usize>(head: Option<[&str; N]>, rows: &[[String; N]]) -> String {
    let head = head.map(|head| head.map(str::to_owned));
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.each_ref().map(|cell| escaped_line(cell))).collect();
    let lines = || head.iter().chain(&rows);
    let widths: [usize; N] =
        std::array::from_fn(|column| lines().map(|line| line[column].chars().count()).max().unwrap_or(0));
    let line = |line: &[String; N]| {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines().map(line).collect::<Vec<_>>().join("\n")
}

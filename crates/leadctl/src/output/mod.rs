//! Text, tables and JSON on standard output; progress on standard error.

pub(crate) mod escape;
pub(crate) mod progress;
pub(crate) mod timeline;

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::Context;
use serde::Serialize;

/// Prints a line at once. A closed pipe (`leadctl … | head`) is not an error.
pub(crate) fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Prints a name and its value, aligned with its neighbours.
pub(crate) fn field(name: &str, value: impl Display) {
    say(format_args!("  {name:<12}{value}"));
}

/// Prints a value as JSON on one line.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    say(serde_json::to_string(value).context("cannot write the result as JSON")?);
    Ok(())
}

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
    let lines = || head.iter().chain(rows);
    let widths: [usize; N] =
        std::array::from_fn(|column| lines().map(|line| line[column].chars().count()).max().unwrap_or(0));
    let line = |line: &[String; N]| {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_by_characters_not_bytes() {
        let rows = [["ä", "b"].map(str::to_owned), ["ccc", ""].map(str::to_owned)];
        assert_eq!(table(Some(["A", "LONG"]), &rows), "A    LONG\nä    b\nccc");
        assert_eq!(table(None, &rows), "ä    b\nccc");
    }
}

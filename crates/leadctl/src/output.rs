//! What is printed on standard output.

use std::{
    fmt::Display,
    io::{self, Write},
};

use anyhow::Context;
use serde::Serialize;

/// Prints a line at once. Nobody reading any more (`leadctl … | head`) is no reason to stop working.
pub(crate) fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Prints a name and its value, aligned with its neighbours.
pub(crate) fn field(name: &str, value: impl Display) {
    say(format_args!("  {name:<12}{value}"));
}

/// Prints a value for programs: JSON in one line.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    say(serde_json::to_string(value).context("cannot write the answer as JSON")?);
    Ok(())
}

/// A table: columns as wide as what stands in them, the last one as it is.
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
    fn a_table_is_aligned_whatever_stands_in_it() {
        let rows = [["ä", "b"].map(str::to_owned), ["ccc", ""].map(str::to_owned)];
        assert_eq!(table(Some(["A", "LONG"]), &rows), "A    LONG\nä    b\nccc");
        assert_eq!(table(None, &rows), "ä    b\nccc");
    }
}

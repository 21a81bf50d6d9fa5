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

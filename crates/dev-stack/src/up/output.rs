//! What `up` prints on standard output.

use std::{
    fmt::Display,
    io::{self, Write},
};

use service_kit::escape::escaped_text;

/// Prints a line at once, with control characters escaped. A closed pipe (`leadctl up | head`) does not stop the stack.
pub(super) fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{}", escaped_text(&line.to_string())).and_then(|()| out.flush());
}

/// Prints a name and its value, aligned with the other fields.
pub(super) fn field(name: &str, value: impl Display) {
    say(format_args!("  {name:<12}{value}"));
}

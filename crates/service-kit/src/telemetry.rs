//! Logs.

use std::{
    fmt::{self, Debug},
    io::IsTerminal,
};

use anyhow::Context;
use tracing::field::Field;
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt,
    fmt::format::{Writer, debug_fn},
};

use crate::{
    config::{LogConfig, LogFormat},
    escape::escaped_line,
};

/// Lines for people. A macro, because the type of the result cannot be written.
macro_rules! human {
    ($builder:expr) => {
        $builder.fmt_fields(debug_fn(write_field).delimited(" ")).compact()
    };
}

/// Sends this process's log lines to standard error. Call it once, before anything else.
pub fn init(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_filter)
        .with_context(|| format!("--log-filter {:?} is not a filter; try info", config.log_filter))?;
    let terminal = std::io::stderr().is_terminal();
    let json = match config.log_format {
        LogFormat::Auto => !terminal,
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(terminal);
    if json { builder.json().flatten_event(true).try_init() } else { human!(builder).try_init() }
        .map_err(|e| anyhow::anyhow!("cannot start logging: {e}"))
}

/// Writes a field of a line for people. A line break in a value would begin a line that looks like another event.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> fmt::Result {
    let value = escaped_line(&format!("{value:?}"));
    match field.name() {
        // Added by the bridge from the crate log, which the line already shows.
        name if name.starts_with("log.") => Ok(()),
        "message" => write!(writer, "{value}"),
        name => write!(writer, "{name}={value}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_its_fields_contain() {
        let lines = Lines::default();
        let writer = lines.clone();
        let builder = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).without_time();
        let text = "x\n2026-01-12T04:55:59Z  INFO forged\u{1b}[2J\u{9b}";
        tracing::subscriber::with_default(human!(builder).finish(), || {
            let span = tracing::info_span!("delivery", name = %text);
            span.in_scope(|| tracing::warn!(display = %text, debug = ?text, text, "failed: {text}"));
        });
        let printed = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert_eq!(printed.trim_end().chars().find(|c| c.is_control()), None, "{printed:?}");
        assert!(printed.contains("failed: x\\u{a}2026") && printed.contains(" display=x\\u{a}2026"), "{printed}");
    }
}

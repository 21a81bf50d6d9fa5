//! Sets up logging.

use std::{
    fmt::{self, Debug},
    io::{self, IsTerminal},
};

use anyhow::Context;
use tracing::field::Field;
use tracing_subscriber::{
    Layer,
    field::MakeExt,
    fmt::{
        MakeWriter,
        format::{Writer, debug_fn},
    },
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{
    config::{LogConfig, LogFormat},
    escape::escaped_line,
};

/// Formats lines for people. A macro, because the type of the result cannot be written.
macro_rules! human {
    ($layer:expr) => {
        $layer.fmt_fields(debug_fn(write_field).delimited(" ")).compact()
    };
}

/// Sends this process's log lines to standard error. Call it once, before anything else.
///
/// # Errors
/// Logging was started before.
pub fn init(config: &LogConfig) -> anyhow::Result<()> {
    init_to(io::stderr, io::stderr().is_terminal(), config)
}

/// Sends this process's log lines to a writer, with colors if it is a terminal.
///
/// # Errors
/// Logging was started before.
pub fn init_to<W>(writer: W, is_terminal: bool, config: &LogConfig) -> anyhow::Result<()>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let json = match config.log_format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(is_terminal);
    let layer = if json { layer.json().flatten_event(true).boxed() } else { human!(layer).boxed() };
    let logging = tracing_subscriber::registry().with(config.log_filter.clone()).with(layer);
    logging.try_init().context("cannot start logging")
}

/// Writes a field of a line for people. A line break in a value would begin a line that looks like another event.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> fmt::Result {
    let value = escaped_line(&format!("{value:?}"));
    match field.name() {
        // The bridge from the crate log adds these fields; the line shows them already.
        name if name.starts_with("log.") => Ok(()),
        "message" => write!(writer, "{value}"),
        name => write!(writer, "{name}={value}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

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
        let layer =
            tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).with_ansi(false).without_time();
        let text = "x\n2026-01-12T04:55:59Z  INFO forged\u{1b}[2J\u{9b}";
        tracing::subscriber::with_default(tracing_subscriber::registry().with(human!(layer)), || {
            let span = tracing::info_span!("delivery", name = %text);
            span.in_scope(|| tracing::warn!(display = %text, debug = ?text, text, "failed: {text}"));
        });
        let printed = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert_eq!(printed.trim_end().chars().find(|c| c.is_control()), None, "{printed:?}");
        assert!(printed.contains("failed: x\\u{a}2026") && printed.contains(" display=x\\u{a}2026"), "{printed}");
    }
}

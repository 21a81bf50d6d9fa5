//! Progress of long operations, on standard error.

use std::{
    fmt::Arguments,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use crate::output;

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(3);
/// Time between two redraws of a bar.
const FRAME: Duration = Duration::from_millis(100);
const WIDTH: u64 = 24;

/// Prints a line of progress every [`INTERVAL`].
pub(crate) struct Progress {
    printed_at: Instant,
}

impl Progress {
    pub(crate) fn start() -> Self {
        Self { printed_at: Instant::now() }
    }

    pub(crate) fn stream_read(&mut self, stream: &str, left: u64) {
        if self.printed_at.elapsed() >= INTERVAL {
            self.print(format_args!("reading {stream}: {left} messages left"));
        }
    }

    pub(crate) fn step(&mut self, what: &str) {
        if self.printed_at.elapsed() >= INTERVAL {
            self.print(format_args!("{what}"));
        }
    }

    fn print(&mut self, what: Arguments<'_>) {
        output::note(what);
        self.printed_at = Instant::now();
    }
}

/// Progress of a known number of rows: a bar on a terminal, otherwise a line every [`INTERVAL`].
pub(crate) struct Bar {
    total: u64,
    terminal: bool,
    started: Instant,
    /// Rows sent before this run.
    first: Option<u64>,
    shown_at: Instant,
}

impl Bar {
    pub(crate) fn new(total: u64) -> Self {
        let now = Instant::now();
        Self { total, terminal: io::stderr().is_terminal(), started: now, first: None, shown_at: now }
    }

    pub(crate) fn show(&mut self, sent: u64, waiting: usize) {
        let first = *self.first.get_or_insert(sent);
        if self.shown_at.elapsed() < if self.terminal { FRAME } else { INTERVAL } {
            return;
        }
        self.shown_at = Instant::now();
        let text = text(sent, self.total, waiting, sent - first, self.started.elapsed());
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K{} {text}", bar(sent, self.total));
        } else {
            output::note(text);
        }
    }

    /// Prints a line above the bar.
    pub(crate) fn print(&mut self, what: Arguments<'_>) {
        self.remove();
        output::note(what);
    }

    /// Removes the bar.
    pub(crate) fn remove(&mut self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn bar(done: u64, total: u64) -> String {
    let full = (done.min(total) * WIDTH).checked_div(total).unwrap_or(WIDTH);
    let repeat = |text: &str, count: u64| text.repeat(usize::try_from(count).unwrap_or(0));
    format!("[{}{}]", repeat("#", full), repeat(".", WIDTH - full))
}

/// `done` rows were sent by this run, in the time `took`.
fn text(sent: u64, total: u64, waiting: usize, done: u64, took: Duration) -> String {
    let mut text = format!("{sent} of {total} rows sent, {waiting} outcomes pending");
    let rate = done as f64 / took.as_secs_f64().max(0.001);
    if rate >= 1.0 && sent < total {
        let left = Duration::from_secs(((total - sent) as f64 / rate) as u64 + 1);
        text.push_str(&format!(", {rate:.0} rows/s, {} left", humantime::format_duration(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_rows_pending_outcomes_rate_and_time_left() {
        assert_eq!(bar(0, 100), format!("[{}]", ".".repeat(24)));
        assert_eq!(bar(50, 100), format!("[{}{}]", "#".repeat(12), ".".repeat(12)));
        assert_eq!(bar(0, 0), bar(7, 7));
        assert_eq!(
            text(4000, 10_000, 1000, 3000, Duration::from_secs(2)),
            "4000 of 10000 rows sent, 1000 outcomes pending, 1500 rows/s, 5s left"
        );
        assert_eq!(text(10, 10, 3, 10, Duration::from_secs(1)), "10 of 10 rows sent, 3 outcomes pending");
    }
}

//! Progress of what takes long, on standard error.

use std::{
    fmt::Arguments,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

/// How often something is said.
const INTERVAL: Duration = Duration::from_secs(3);
/// How often a bar is drawn.
const FRAME: Duration = Duration::from_millis(100);
/// How long a bar is.
const WIDTH: u64 = 24;

/// Says from time to time how far it is.
pub(crate) struct Progress {
    said_at: Instant,
}

impl Progress {
    pub(crate) fn start() -> Self {
        Self { said_at: Instant::now() }
    }

    /// A message of a stream was read, this many are left.
    pub(crate) fn read(&mut self, stream: &str, left: u64) {
        if self.said_at.elapsed() >= INTERVAL {
            self.say(format_args!("reading {stream}: {left} to go"));
        }
    }

    /// A step begins that may take long.
    pub(crate) fn step(&mut self, what: &str) {
        if self.said_at.elapsed() >= INTERVAL {
            self.say(format_args!("{what}"));
        }
    }

    fn say(&mut self, what: Arguments<'_>) {
        eprintln!("leadctl: {what}");
        self.said_at = Instant::now();
    }
}

/// How much of a known number of rows is done: a bar on a terminal, else a line from time to time.
pub(crate) struct Bar {
    total: u64,
    terminal: bool,
    begun: Instant,
    /// What was done before.
    first: Option<u64>,
    shown_at: Instant,
}

impl Bar {
    pub(crate) fn new(total: u64) -> Self {
        let now = Instant::now();
        Self { total, terminal: io::stderr().is_terminal(), begun: now, first: None, shown_at: now }
    }

    /// So many rows are sent, and so many of them wait for their outcomes.
    pub(crate) fn show(&mut self, sent: u64, waiting: usize) {
        let first = *self.first.get_or_insert(sent);
        if self.shown_at.elapsed() < if self.terminal { FRAME } else { INTERVAL } {
            return;
        }
        self.shown_at = Instant::now();
        let told = told(sent, self.total, waiting, sent - first, self.begun.elapsed());
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K{} {told}", bar(sent, self.total));
        } else {
            eprintln!("leadctl: {told}");
        }
    }

    /// Says something beside.
    pub(crate) fn say(&mut self, what: Arguments<'_>) {
        self.end();
        eprintln!("leadctl: {what}");
    }

    /// Takes the bar away.
    pub(crate) fn end(&mut self) {
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

/// How far it is, of which so many rows were done in this time.
fn told(sent: u64, total: u64, waiting: usize, done: u64, took: Duration) -> String {
    let mut text = format!("{sent} of {total} rows sent, {waiting} wait for their outcomes");
    let rate = done as f64 / took.as_secs_f64().max(0.001);
    if rate >= 1.0 && sent < total {
        let left = Duration::from_secs(((total - sent) as f64 / rate) as u64 + 1);
        text.push_str(&format!(", {rate:.0} a second, {} to go", humantime::format_duration(left)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is() {
        assert_eq!(bar(0, 100), format!("[{}]", ".".repeat(24)));
        assert_eq!(bar(50, 100), format!("[{}{}]", "#".repeat(12), ".".repeat(12)));
        assert_eq!(bar(0, 0), bar(7, 7));
        assert_eq!(
            told(4000, 10_000, 1000, 3000, Duration::from_secs(2)),
            "4000 of 10000 rows sent, 1000 wait for their outcomes, 1500 a second, 5s to go"
        );
        assert_eq!(told(10, 10, 3, 10, Duration::from_secs(1)), "10 of 10 rows sent, 3 wait for their outcomes");
    }
}

//! Progress of what takes long, on standard error.

use std::time::{Duration, Instant};

/// How often something is said.
const INTERVAL: Duration = Duration::from_secs(3);

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

    fn say(&mut self, what: std::fmt::Arguments<'_>) {
        eprintln!("leadctl: {what}");
        self.said_at = Instant::now();
    }
}

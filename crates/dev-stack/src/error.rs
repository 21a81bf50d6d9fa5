//! What can go wrong with a child, told so that its user can act on it.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// Why a child could not be started, kept or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is on none of the usual places, and may not or cannot be installed from here.
    #[error("{program} is not installed: {hint}")]
    Missing {
        /// The program looked for.
        program: &'static str,
        /// What to install and how.
        hint: String,
    },
    /// A helper command ended in failure.
    #[error("`{command}` failed:\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        output: String,
    },
    /// The operating system refused.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The refusal.
        source: io::Error,
    },
    /// Another process that lives owns the directory.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Postgres does not run as root, and its own user cannot be found or cannot reach the directory.
    #[error("{0}")]
    User(String),
    /// The child ended before it was ready.
    #[error("{name} ended before it was ready ({status}); its log ends with:\n{log}")]
    Died {
        /// Which child.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it logged since this start.
        log: String,
    },
    /// The child runs, but was not ready in time.
    #[error("{name} was not ready within {deadline:?}; its log ends with:\n{log}")]
    NotReady {
        /// Which child.
        name: String,
        /// The time it was given.
        deadline: Duration,
        /// The end of what it logged since this start.
        log: String,
    },
}

/// Names what was being done when the operating system refused.
pub(crate) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

//! Errors of child processes.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// Why a child could not be started, kept or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program was not found, and may not or cannot be installed.
    #[error("{program} is not installed: {hint}")]
    Missing {
        /// The program.
        program: &'static str,
        /// How to install it.
        hint: String,
    },
    /// A helper command failed.
    #[error("`{command}` failed:\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// Its output.
        output: String,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// The action.
        what: String,
        /// The error.
        source: io::Error,
    },
    /// Another running process owns the directory.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Postgres does not run as root, and its user does not exist or cannot reach the directory.
    #[error("{0}")]
    User(String),
    /// The child ended before it was ready.
    #[error("{name} ended before it was ready ({status}); its log ends with:\n{log}")]
    Died {
        /// The child.
        name: String,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its log since this start.
        log: String,
    },
    /// The child runs, but was not ready in time.
    #[error("{name} was not ready within {deadline:?}; its log ends with:\n{log}")]
    NotReady {
        /// The child.
        name: String,
        /// The deadline.
        deadline: Duration,
        /// The end of its log since this start.
        log: String,
    },
}

/// Adds the action to an I/O error.
pub(crate) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

//! Decides which errors of Postgres are temporary.

use std::io;

use crate::nats::error_chain;

/// A server in recovery or with `default_transaction_read_only`: it will accept writes again, or another server does.
pub(super) const READ_ONLY: &str = "25006";

/// Class 08 connection, 40 rollback, 53 resources, 57 operator intervention (shutdown, cancel), 58 system; 25006 a server
/// that does not write, 25P03 and 25P04 idle session closed, 55P03 lock not available.
const UNAVAILABLE: [&str; 9] = ["08", "40", "53", "57", "58", READ_ONLY, "25P03", "25P04", "55P03"];

/// Whether the statement or the connection may succeed later, unchanged. If it was a commit, its outcome is unknown.
pub fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(e) => {
            e.code().is_some_and(|code| UNAVAILABLE.iter().any(|unavailable| code.starts_with(unavailable)))
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

/// The error and its causes, without the phrase that sqlx puts before what [`gave_up`] says.
pub(super) fn reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Io(e) => error_chain(e),
        e => error_chain(e),
    }
}

/// The error after a deadline passed or the connection was given up.
pub(super) fn gave_up(reason: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, reason.into()))
}

//! Decides which errors of Postgres are temporary.

use std::io;

use sqlx::migrate::MigrateError;

use crate::nats::error_chain;

/// A server in recovery or with `default_transaction_read_only`: it will accept writes again, or another server does.
pub(super) const READ_ONLY: &str = "25006";

/// A lock was not available within `lock_timeout`.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// Class 08 connection, 40 rollback, 53 resources, 57 operator intervention (shutdown, cancel), 58 system; 25006 a
/// server that does not write, 25P03 and 25P04 idle session closed, 55P03 lock not available.
const UNAVAILABLE: [&str; 9] = ["08", "40", "53", "57", "58", READ_ONLY, "25P03", "25P04", LOCK_NOT_AVAILABLE];

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

/// Whether a migration failed because a lock was not available within `lock_timeout`.
pub(super) fn is_lock_timeout(error: &MigrateError) -> bool {
    let (MigrateError::Execute(e) | MigrateError::ExecuteMigration(e, _)) = error else { return false };
    e.as_database_error().is_some_and(|e| e.code().as_deref() == Some(LOCK_NOT_AVAILABLE))
}

/// The error and its causes, without the phrase that sqlx puts before an error of [`gave_up`].
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

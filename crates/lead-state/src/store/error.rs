//! Errors of the store. The variant determines the caller's next step.

use service_kit::postgres::error::is_unavailable;
use sqlx::error::DatabaseError;

/// Why a statement failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Retry: the database is unavailable, busy or restarting. If the connection was lost during a commit, only the
    /// checkpoint shows whether the transaction took effect.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// Read the checkpoint and the rules again: another reader moved the checkpoint, or the commit of this batch
    /// succeeded and its response was lost, or a process whose rules the batch used has changed. This attempt wrote
    /// nothing.
    #[error("the checkpoint was moved by another reader")]
    Fenced,
    /// Look up duplicates and decide again: an update of the batch is already in the ledger or queued. Nothing was
    /// written.
    #[error("an update of the batch is already in the ledger or queued")]
    Duplicate,
    /// Reject the value: the database cannot store it. Statements without it would succeed.
    #[error("the database cannot store a value: {0}")]
    InvalidValue(#[source] sqlx::Error),
    /// Stop: a stored value cannot be read.
    #[error("corrupt row in lead_state.{table}: {column} of {id}: {fault}")]
    Corrupt { table: &'static str, column: &'static str, id: String, fault: String },
    /// Stop: the tables contradict the state on which the leader decided.
    #[error("lead_state is inconsistent: {0}")]
    Inconsistent(String),
    /// Stop: the statement or the schema is wrong.
    #[error("the database refused a statement: {0}")]
    Refused(#[source] sqlx::Error),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            e if is_unavailable(e) => Self::Unavailable(error),
            sqlx::Error::Database(e) if is_duplicate_update(e.as_ref()) => Self::Duplicate,
            sqlx::Error::Database(e) if is_invalid_value(e.as_ref()) => Self::InvalidValue(error),
            _ => Self::Refused(error),
        }
    }
}

/// Class 22 data exception, 23 constraint violation, 54 program limit exceeded.
fn is_invalid_value(error: &dyn DatabaseError) -> bool {
    error.code().is_some_and(|code| ["22", "23", "54"].iter().any(|class| code.starts_with(class)))
}

/// Only a batch inserts into the ledger, so its key is violated only by a duplicate.
fn is_duplicate_update(error: &dyn DatabaseError) -> bool {
    error.is_unique_violation() && error.table().is_some_and(|table| table.starts_with("lead_updates"))
}

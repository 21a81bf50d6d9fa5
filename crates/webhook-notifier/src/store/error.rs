//! Errors of the store: what failed, and whether trying again can help.

use contract::rpc::RpcError;
use service_kit::{postgres::error::is_unavailable, rpc::internal};

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Postgres is unreachable, busy or restarting: try again.
    #[error("Postgres is unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// A row has a value that no version of this service writes: an operator has to correct it.
    #[error("corrupt row {id} in webhooks.{table}: {column} is {value:?}")]
    Corrupt { table: &'static str, column: &'static str, id: String, value: String },
    /// Postgres cannot store a value.
    #[error("Postgres rejected a value: {0}")]
    Data(#[source] sqlx::Error),
    /// The statement does not fit the schema.
    #[error("Postgres rejected a statement: {0}")]
    Rejected(#[source] sqlx::Error),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // Class 22 data exception, 23 constraint violation, 54 program limit exceeded.
        let is_data = |code: &str| ["22", "23", "54"].iter().any(|class| code.starts_with(class));
        match &error {
            e if is_unavailable(e) => Self::Unavailable(error),
            sqlx::Error::Database(e) if e.code().is_some_and(|code| is_data(&code)) => Self::Data(error),
            _ => Self::Rejected(error),
        }
    }
}

impl From<StoreError> for RpcError {
    fn from(error: StoreError) -> Self {
        internal("a query of the delivery log failed", &error)
    }
}

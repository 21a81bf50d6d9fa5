//! Errors of the store: what failed, and whether trying again can help.

use contract::rpc::RpcError;
use service_kit::rpc::internal;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Postgres is away, busy or restarting: try again.
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
        let has_class = |classes: &[&str]| {
            let code = error.as_database_error().and_then(|e| e.code());
            code.is_some_and(|code| classes.iter().any(|class| code.starts_with(class)))
        };
        // Class 08 connection, 40 rollback, 53 resources, 57 operator intervention (shutdown, cancel), 58 system; 25P03
        // and 25P04 idle session closed, 55P03 lock not available.
        let is_unavailable = has_class(&["08", "40", "53", "57", "58", "25P03", "25P04", "55P03"])
            || matches!(
                error,
                sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::Protocol(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed
            );
        // Class 22 data exception, 23 constraint violation, 54 program limit exceeded.
        let is_data = has_class(&["22", "23", "54"]);
        match (is_unavailable, is_data) {
            (true, _) => Self::Unavailable(error),
            (_, true) => Self::Data(error),
            _ => Self::Rejected(error),
        }
    }
}

impl From<StoreError> for RpcError {
    fn from(error: StoreError) -> Self {
        internal("a query of the delivery log failed", &error)
    }
}

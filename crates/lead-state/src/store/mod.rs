//! The lead_state schema: all SQL of this service. Rows become domain types here; a row that cannot names itself.

use std::str::FromStr;

use anyhow::Context;
use contract::{JsonObject, ObjectId, Timestamp};
use service_kit::{config::DatabaseConfig, postgres::Schema};
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use time::OffsetDateTime;

pub(crate) mod batch;
pub(crate) mod checkpoint;
pub(crate) mod config;
pub(crate) mod held;
pub(crate) mod leads;
pub(crate) mod ledger;
pub(crate) mod lists;
pub(crate) mod updates;

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The database is away, busy or restarting: try again.
    #[error("the database did not answer: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// A row does not hold what it must: nothing can be done but look.
    #[error("corrupt row in lead_state.{table}: {fault}")]
    Corrupt {
        /// Its table.
        table: &'static str,
        /// Which row, which column, what is wrong.
        fault: String,
    },
    /// A value cannot be stored: only what holds it is at fault.
    #[error("the database cannot hold a value: {0}")]
    Data(#[source] sqlx::Error),
    /// The statement or the schema is wrong.
    #[error("the database refused: {0}")]
    Refused(#[source] sqlx::Error),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let retry = match &error {
            // Class 08 connection, 40 rollback, 53 resources, 57 operator intervention (shutdown, cancel), 58 system,
            // 25P03/25P04 idle session cut, 55P03 lock not available.
            sqlx::Error::Database(e) => e.code().is_some_and(|code| {
                ["08", "40", "53", "57", "58"].iter().any(|class| code.starts_with(class))
                    || ["25P03", "25P04", "55P03"].contains(&code.as_ref())
            }),
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => true,
            _ => false,
        };
        // Class 22 data exception, 23 constraint violation, 54 program limit exceeded.
        let data = matches!(&error, sqlx::Error::Database(e)
            if e.code().is_some_and(|code| ["22", "23", "54"].iter().any(|class| code.starts_with(class))));
        match (retry, data) {
            (true, _) => Self::Unavailable(error),
            (_, true) => Self::Data(error),
            _ => Self::Refused(error),
        }
    }
}

/// The schema and its migrations.
pub(crate) fn schema() -> Schema {
    Schema::new("lead_state", sqlx::migrate!())
}

/// Options of every connection: what was left behind by a process that hangs is cut by the server, so that a standby
/// need not wait for it.
pub(crate) fn connect_options(config: &DatabaseConfig) -> anyhow::Result<PgConnectOptions> {
    Ok(PgConnectOptions::from_str(&config.database_url)
        .context("DATABASE_URL is not a postgres:// URL")?
        .application_name("lead-state")
        .options([
            // A leader that stopped in the middle of a transaction holds the checkpoint's row lock no longer than this.
            ("idle_in_transaction_session_timeout", "3s"),
            ("statement_timeout", "30s"),
            ("tcp_keepalives_idle", "5"),
            ("tcp_keepalives_interval", "2"),
            ("tcp_keepalives_count", "3"),
        ]))
}

/// A pool of connections; connects lazily, so a service can start before its database.
pub(crate) fn pool(config: &DatabaseConfig) -> anyhow::Result<PgPool> {
    Ok(PgPoolOptions::new()
        .max_connections(config.database_connections)
        .acquire_timeout(std::time::Duration::from_secs(5))
        .connect_lazy_with(connect_options(config)?))
}

fn id(table: &'static str, column: &str, bytes: &[u8]) -> Result<ObjectId, StoreError> {
    ObjectId::try_from(bytes).map_err(|e| StoreError::Corrupt { table, fault: format!("{column} {}: {e}", hex(bytes)) })
}

fn optional_id(table: &'static str, column: &str, bytes: Option<&[u8]>) -> Result<Option<ObjectId>, StoreError> {
    bytes.map(|bytes| id(table, column, bytes)).transpose()
}

fn object(table: &'static str, column: &str, row: ObjectId, text: String) -> Result<JsonObject, StoreError> {
    JsonObject::from_text(text).map_err(|e| StoreError::Corrupt { table, fault: format!("{column} of {row}: {e}") })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn time(at: Timestamp) -> OffsetDateTime {
    at.into()
}

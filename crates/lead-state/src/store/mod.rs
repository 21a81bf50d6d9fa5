//! The schema lead_state: all SQL of this service. Functions that write take a connection, so that a caller that has a
//! transaction cannot write outside of it.

use std::{str::FromStr, time::Duration};

use anyhow::Context;
use service_kit::{config::DatabaseConfig, postgres::Schema};
use sqlx::{
    PgPool, Postgres, Transaction,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub(crate) mod api_keys;
pub(crate) mod batch;
pub(crate) mod batch_state;
pub(crate) mod calls;
pub(crate) mod checkpoint;
mod columns;
mod error;
pub(crate) mod housekeeping;
pub(crate) mod leads;
pub(crate) mod ledger;
pub(crate) mod processes;
pub(crate) mod queued_updates;
mod row;
pub(crate) mod rules;
#[cfg(test)]
mod tests;
pub(crate) mod updates;

pub(crate) use error::StoreError;

/// How long to wait for a connection of the pool. Longer hides that Postgres is gone, shorter fails while the pool is
/// busy.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn schema() -> Schema {
    Schema::new("lead_state", sqlx::migrate!())
}

/// The options of every connection. The server closes connections that a stopped process left open, so that a standby
/// does not wait for their locks.
pub(crate) fn connect_options(config: &DatabaseConfig) -> anyhow::Result<PgConnectOptions> {
    let options = PgConnectOptions::from_str(&config.database_url).context("DATABASE_URL is not a postgres:// URL")?;
    Ok(options.application_name("lead-state").options([
        // Bounds how long a leader that stopped during a transaction holds the lock on the checkpoint.
        ("idle_in_transaction_session_timeout", "3s"),
        ("statement_timeout", "30s"),
        ("tcp_keepalives_idle", "5"),
        ("tcp_keepalives_interval", "2"),
        ("tcp_keepalives_count", "3"),
    ]))
}

/// A pool that connects on first use, so that the service can start before its database.
pub(crate) fn pool(config: &DatabaseConfig) -> anyhow::Result<PgPool> {
    Ok(PgPoolOptions::new()
        .max_connections(config.database_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(connect_options(config)?))
}

pub(crate) async fn acquire(pool: &PgPool) -> Result<PoolConnection<Postgres>, StoreError> {
    Ok(pool.acquire().await?)
}

pub(crate) async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StoreError> {
    Ok(pool.begin().await?)
}

pub(crate) async fn commit(transaction: Transaction<'_, Postgres>) -> Result<(), StoreError> {
    Ok(transaction.commit().await?)
}

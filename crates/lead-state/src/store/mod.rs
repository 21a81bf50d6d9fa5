//! The schema lead_state: all SQL of this service. Functions that write take a connection, so that a caller that has a
//! transaction cannot write outside of it.

use service_kit::{
    config::DatabaseConfig,
    postgres::{DatabaseUrlError, Pool, Schema, Session, Transaction},
};

pub(crate) mod api_keys;
pub(crate) mod batch;
pub(crate) mod batch_state;
pub(crate) mod calls;
pub(crate) mod checkpoint;
mod columns;
pub(crate) mod created_leads;
pub(crate) mod erasures;
mod error;
pub(crate) mod housekeeping;
pub(crate) mod lead_search;
pub(crate) mod leads;
pub(crate) mod ledger;
pub(crate) mod processes;
pub(crate) mod queued_updates;
mod row;
pub(crate) mod rules;
pub(crate) mod statistics;
#[cfg(test)]
mod tests;
pub(crate) mod updates;

pub(crate) use error::StoreError;

pub(crate) fn schema() -> Schema {
    Schema::new("lead_state", sqlx::migrate!())
}

/// A pool that connects on first use, so that the service can start before its database.
pub(crate) fn pool(config: &DatabaseConfig) -> Result<Pool, DatabaseUrlError> {
    Pool::new(config, "lead-state", &[])
}

pub(crate) async fn acquire(pool: &Pool) -> Result<Session, StoreError> {
    Ok(pool.acquire().await?)
}

pub(crate) async fn begin(pool: &Pool) -> Result<Transaction, StoreError> {
    Ok(pool.begin().await?)
}

pub(crate) async fn commit(transaction: Transaction) -> Result<(), StoreError> {
    transaction.commit().await?;
    Ok(())
}

//! Connects to Postgres.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

/// With a longer timeout, a wrong `--database-url` is reported late.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    let connected = timeout(CONNECT_TIMEOUT, PgConnection::connect(url)).await;
    connected
        .with_context(|| format!("Postgres does not answer within {CONNECT_TIMEOUT:?}"))?
        .context("cannot connect to Postgres; check --database-url (or DATABASE_URL)")
}

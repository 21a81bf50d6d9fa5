//! Connects to Postgres.

use anyhow::Context;
use service_kit::{
    config::DatabaseConfig,
    postgres::{Pool, Session},
};

/// A pool of one connection, which is made when it is first needed. Its commits do not wait for a synchronous standby:
/// the commands that use it change nothing but temporary tables.
pub(crate) fn pool(url: &str) -> anyhow::Result<Pool> {
    let config = DatabaseConfig { database_url: url.to_owned(), database_connections: 1 };
    Ok(Pool::new(&config, "leadctl", &[("synchronous_commit", "local")])?)
}

/// Connects at once, and reports why it cannot.
pub(crate) async fn connect(pool: &Pool) -> anyhow::Result<Session> {
    pool.connect_apart("leadctl", &[]).await.context("check --database-url (or DATABASE_URL)")
}

//! The schema of one service: its migrations, and waiting for them.

use std::future::Future;

use anyhow::Context;
use sqlx::{AssertSqlSafe, PgPool, migrate::Migrator};

use crate::{
    health::Readiness,
    nats::{error_chain, retry_backoff},
};

/// The schema of one service. Its migrations are recorded in the schema itself, so several services can share a database.
#[derive(Debug)]
pub struct Schema {
    name: &'static str,
    migrator: Migrator,
}

impl Schema {
    /// The schema of this name, with the migrations of `sqlx::migrate!()`.
    pub fn new(name: &'static str, mut migrator: Migrator) -> Self {
        migrator.create_schema(name);
        migrator.dangerous_set_table_name(format!("{name}._sqlx_migrations"));
        // A newer version may have migrated already; this version works with what the newer one added.
        migrator.set_ignore_missing(true);
        Self { name, migrator }
    }

    /// Runs the migrations that the database lacks.
    ///
    /// # Errors
    /// A migration failed, or differs from the one that ran under its number.
    pub async fn migrate(&self, pool: &PgPool) -> anyhow::Result<()> {
        self.migrator.run(pool).await.with_context(|| format!("cannot migrate the schema {}", self.name))
    }

    /// The versions of the migrations that the database lacks.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn missing_migrations(&self, pool: &PgPool) -> sqlx::Result<Vec<i64>> {
        let sql = AssertSqlSafe(format!("SELECT version FROM {}._sqlx_migrations WHERE success", self.name));
        let applied: Vec<i64> = match sqlx::query_scalar(sql).fetch_all(pool).await {
            // The table is created by the first migration.
            Err(sqlx::Error::Database(e)) if e.code().as_deref() == Some("42P01") => Vec::new(),
            applied => applied?,
        };
        let versions = self.migrator.iter().map(|migration| migration.version);
        Ok(versions.filter(|version| !applied.contains(version)).collect())
    }

    /// Waits until another program has run the migrations; `readiness` shows which ones are missing.
    pub async fn wait_until_migrated(&self, pool: &PgPool, readiness: &Readiness) {
        let name = self.name;
        retry_until_ready("schema", readiness, async || match self.missing_migrations(pool).await {
            Ok(missing) if missing.is_empty() => Ok(()),
            Ok(missing) => Err(format!("{name} lacks migrations {missing:?}; run `leadctl migrate`")),
            Err(e) => Err(error_chain(&e)),
        })
        .await;
    }
}

/// Waits until Postgres accepts a connection; `readiness` shows why it does not.
pub async fn wait_for_postgres(pool: &PgPool, readiness: &Readiness) {
    readiness.not_ready("postgres", "not connected");
    retry_until_ready("postgres", readiness, async || match pool.acquire().await {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("cannot connect to Postgres: {}", error_chain(&e))),
    })
    .await;
}

async fn retry_until_ready<F: Future<Output = Result<(), String>>>(
    what: &'static str,
    readiness: &Readiness,
    attempt: impl Fn() -> F,
) {
    for delay in retry_backoff() {
        let Err(reason) = attempt().await else { break };
        tracing::warn!("waiting for {what}: {reason}");
        readiness.not_ready(what, reason);
        tokio::time::sleep(delay).await;
    }
    readiness.ready(what);
}

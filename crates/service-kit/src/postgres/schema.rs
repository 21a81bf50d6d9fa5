//! The schema of one service: its migrations, and waiting for them.

use std::future::Future;

use sqlx::{
    AssertSqlSafe,
    migrate::{MigrateError, Migrator},
};

use super::{Pool, error::is_unavailable};
use crate::{
    health::Readiness,
    nats::{error_chain, retry_backoff},
};

/// Why a schema is not at this version.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A migration that ran has changed since. Nothing was written.
    #[error(
        "the schema {0} was created by an earlier version and cannot be migrated: start again with an empty database (for \
         `leadctl up`, remove its data directory: rm -r .leadrelay)"
    )]
    Outdated(&'static str),
    /// A migration failed.
    #[error("cannot migrate the schema {0}")]
    Migrate(&'static str, #[source] MigrateError),
    /// The migrations that ran are unknown.
    #[error("cannot read the migrations of the schema {0}")]
    Read(&'static str, #[source] sqlx::Error),
}

/// The schema of one service. Its migrations are recorded in the schema itself, so several services can share a
/// database.
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
    pub async fn migrate(&self, pool: &Pool) -> Result<(), SchemaError> {
        let migrated = async {
            let mut session = pool.acquire().await?;
            session.close_on_drop();
            session.migrate(&self.migrator).await
        };
        migrated.await.map_err(|e| match e {
            MigrateError::VersionMismatch(_) | MigrateError::VersionMissing(_) => SchemaError::Outdated(self.name),
            e => SchemaError::Migrate(self.name, e),
        })
    }

    /// Runs the migrations that the database lacks, as soon as Postgres is available; `readiness` shows why it is not.
    ///
    /// # Errors
    /// A migration failed, or differs from the one that ran under its number.
    pub async fn migrate_when_available(&self, pool: &Pool, readiness: &Readiness) -> Result<(), SchemaError> {
        retry_until_ready("schema", readiness, async || match self.migrate(pool).await {
            Err(SchemaError::Migrate(_, e)) if is_transient(&e) => Err(error_chain(&e)),
            migrated => Ok(migrated),
        })
        .await
    }

    /// The versions of the migrations that the database lacks.
    ///
    /// # Errors
    /// The database cannot be read, or one of its migrations differs from this version's.
    pub async fn missing_migrations(&self, pool: &Pool) -> Result<Vec<i64>, SchemaError> {
        let sql = AssertSqlSafe(format!("SELECT version, checksum FROM {}._sqlx_migrations WHERE success", self.name));
        let applied: Vec<(i64, Vec<u8>)> = match sqlx::query_as(sql).fetch_all(pool).await {
            // The table is created by the first migration.
            Err(sqlx::Error::Database(e)) if e.code().as_deref() == Some("42P01") => Vec::new(),
            applied => applied.map_err(|e| SchemaError::Read(self.name, e))?,
        };
        let mut missing = Vec::new();
        for migration in self.migrator.iter() {
            match applied.iter().find(|(version, _)| *version == migration.version) {
                None => missing.push(migration.version),
                Some((_, checksum)) if *checksum == *migration.checksum => {}
                Some(_) => return Err(SchemaError::Outdated(self.name)),
            }
        }
        Ok(missing)
    }

    /// Waits until another program has run the migrations; `readiness` shows which ones are missing.
    ///
    /// # Errors
    /// One of the database's migrations differs from this version's.
    pub async fn wait_until_migrated(&self, pool: &Pool, readiness: &Readiness) -> Result<(), SchemaError> {
        let name = self.name;
        retry_until_ready("schema", readiness, async || match self.missing_migrations(pool).await {
            Ok(missing) if missing.is_empty() => Ok(Ok(())),
            Ok(missing) => Err(format!("{name} lacks migrations {missing:?}; run `leadctl migrate`")),
            Err(e @ SchemaError::Outdated(_)) => Ok(Err(e)),
            Err(e) => Err(error_chain(&e)),
        })
        .await
    }
}

fn is_transient(error: &MigrateError) -> bool {
    match error {
        MigrateError::Execute(e) | MigrateError::ExecuteMigration(e, _) => is_unavailable(e),
        _ => false,
    }
}

/// Repeats an attempt until it succeeds; `readiness` shows why it does not.
pub async fn retry_until_ready<T, F: Future<Output = Result<T, String>>>(
    what: &'static str,
    readiness: &Readiness,
    attempt: impl Fn() -> F,
) -> T {
    let mut delays = retry_backoff();
    loop {
        let reason = match attempt().await {
            Ok(value) => {
                readiness.ready(what);
                return value;
            }
            Err(reason) => reason,
        };
        tracing::warn!("waiting for {what}: {reason}");
        readiness.not_ready(what, reason);
        tokio::time::sleep(delays.next().unwrap_or_default()).await;
    }
}

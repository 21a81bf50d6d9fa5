//! 7 Deliver, 8 Retry: what stands in Postgres, and all SQL. Set-based, checked at compile time.
//!
//! Every statement can be repeated, so an error here means one thing: try again.

use std::{str::FromStr, time::Duration};

use anyhow::Context;
use service_kit::{
    config::DatabaseConfig,
    health::Readiness,
    nats::{error_chain, retry_backoff},
};
use sqlx::{
    PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub(crate) mod claim;
pub(crate) mod deliveries;
pub(crate) mod health;
pub(crate) mod ordering;
pub(crate) mod outbox;
pub(crate) mod partitions;
pub(crate) mod query;
pub(crate) mod record;

/// How long to wait for a connection. Longer hides that Postgres is gone, shorter fails while the pool is merely busy.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects, and goes on trying until Postgres is there.
pub(crate) async fn connect(config: &DatabaseConfig, readiness: &Readiness) -> anyhow::Result<PgPool> {
    readiness.not_ready("postgres", "not connected");
    let options = PgConnectOptions::from_str(&config.database_url)
        .context("DATABASE_URL is not a postgres:// URL")?
        .application_name("webhook-notifier")
        // Every statement here finds its rows by index. A plan that was cached while a table was small would scan it when
        // it is large; and compiling such short statements costs more than running them.
        .options([("enable_seqscan", "off"), ("jit", "off")]);
    let pool = PgPoolOptions::new()
        .max_connections(config.database_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(options);
    for delay in retry_backoff() {
        match pool.acquire().await {
            Ok(_) => break,
            Err(e) => {
                tracing::warn!("cannot connect to Postgres, trying again: {}", error_chain(&e));
                readiness.not_ready("postgres", error_chain(&e));
                tokio::time::sleep(delay).await;
            }
        }
    }
    readiness.ready("postgres");
    Ok(pool)
}

/// The schema's migrations.
fn migrator() -> Migrator {
    let mut migrator: Migrator = sqlx::migrate!();
    // In the schema that they make, so that several services can share a database.
    migrator.create_schema("webhooks");
    migrator.dangerous_set_table_name("webhooks._sqlx_migrations");
    // A newer version may have migrated already: what it added, this one can live with.
    migrator.set_ignore_missing(true);
    migrator
}

/// Brings the `webhooks` schema up to date.
pub(crate) async fn migrate(pool: &PgPool) -> anyhow::Result<()> {
    migrator().run(pool).await.context("cannot bring the webhooks schema up to date")
}

/// Waits until somebody else has brought the schema up to this version; `readiness` says what it lacks.
pub(crate) async fn wait_for_schema(pool: &PgPool, readiness: &Readiness) {
    for delay in retry_backoff() {
        let why = match lacking(pool).await {
            Ok(lacking) if lacking.is_empty() => break,
            Ok(lacking) => format!("webhooks lacks migrations {lacking:?}: `leadctl migrate` makes them"),
            Err(e) => error_chain(&e),
        };
        tracing::warn!("waiting for the schema: {why}");
        readiness.not_ready("schema", why);
        tokio::time::sleep(delay).await;
    }
    readiness.ready("schema");
}

/// This version's migrations that the database does not have.
pub(crate) async fn lacking(pool: &PgPool) -> Result<Vec<i64>, sqlx::Error> {
    let applied = sqlx::query_scalar!("SELECT version FROM webhooks._sqlx_migrations WHERE success");
    let applied = match applied.fetch_all(pool).await {
        // Before the first migration there is no such table.
        Err(sqlx::Error::Database(e)) if e.code().as_deref() == Some("42P01") => Vec::new(),
        applied => applied?,
    };
    Ok(migrator().iter().map(|migration| migration.version).filter(|version| !applied.contains(version)).collect())
}

/// The id in a column that a CHECK keeps at twelve bytes.
fn id(bytes: [u8; 12]) -> contract::ObjectId {
    contract::ObjectId::from_bytes(bytes)
}

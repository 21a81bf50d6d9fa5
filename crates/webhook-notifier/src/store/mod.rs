//! The schema `webhooks`: all SQL of this service, checked at compile time. Every statement can be repeated.

use std::{str::FromStr, time::Duration};

use anyhow::Context;
use service_kit::{
    config::DatabaseConfig,
    health::Readiness,
    postgres::{Schema, schema::wait_for_postgres},
};
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub(crate) mod backlog;
pub(crate) mod claim;
pub(crate) mod deliveries;
pub(crate) mod error;
pub(crate) mod health;
pub(crate) mod ordering;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod partitions;
pub(crate) mod record;

/// How long to wait for a connection. Longer hides that Postgres is away, shorter fails while the pool is only busy.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects, and retries until Postgres is available.
pub(crate) async fn connect(config: &DatabaseConfig, readiness: &Readiness) -> anyhow::Result<PgPool> {
    let options = PgConnectOptions::from_str(&config.database_url)
        .context("DATABASE_URL is not a postgres:// URL")?
        .application_name("webhook-notifier")
        // Every statement finds its rows by index. A plan that was cached while a table was small would scan it once it
        // is large; and JIT compilation of short statements costs more than running them.
        .options([("enable_seqscan", "off"), ("jit", "off")]);
    let pool = PgPoolOptions::new()
        .max_connections(config.database_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(options);
    wait_for_postgres(&pool, readiness).await;
    Ok(pool)
}

pub(crate) fn schema() -> Schema {
    Schema::new("webhooks", sqlx::migrate!())
}

fn id(bytes: [u8; 12]) -> contract::ObjectId {
    contract::ObjectId::from_bytes(bytes)
}

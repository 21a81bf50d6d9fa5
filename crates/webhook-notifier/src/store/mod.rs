//! 7 Deliver, 8 Retry: what stands in Postgres, and all SQL. Set-based, checked at compile time.
//!
//! Every statement can be repeated, so an error here means one thing: try again.

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
    wait_for_postgres(&pool, readiness).await;
    Ok(pool)
}

/// The schema and its migrations.
pub(crate) fn schema() -> Schema {
    Schema::new("webhooks", sqlx::migrate!())
}

/// The id in a column that a CHECK keeps at twelve bytes.
fn id(bytes: [u8; 12]) -> contract::ObjectId {
    contract::ObjectId::from_bytes(bytes)
}

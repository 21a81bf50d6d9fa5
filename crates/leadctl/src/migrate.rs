//! `leadctl migrate`.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use service_kit::config::DatabaseConfig;
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};
use tokio::time::timeout;

use crate::output;

/// How long to wait for Postgres.
const CONNECT: Duration = Duration::from_secs(10);

/// Bring the database schemas of lead-state and webhook-notifier up to this version, and end. Forward only; safe while
/// services of the version before run. The services do the same at their start, unless they are told not to.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  leadctl migrate --database-url postgres://leadrelay@db.example.com/leadrelay")]
pub(crate) struct Migrate {
    #[command(flatten)]
    database: DatabaseConfig,
}

impl Migrate {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let url = &self.database.database_url;
        // A pool would try for as long as it may, and keep to itself why it cannot.
        let reached = timeout(CONNECT, PgConnection::connect(url)).await;
        let reached =
            reached.with_context(|| format!("Postgres does not answer within {CONNECT:?}")).and_then(|tried| {
                tried.context("cannot connect to Postgres; --database-url or DATABASE_URL says where it is")
            });
        reached?.close().await.context("cannot disconnect from Postgres")?;
        let pool = PgPoolOptions::new().max_connections(2).connect(url).await.context("cannot connect to Postgres")?;
        lead_state::migrate(&self.database).await?;
        output::say("schema lead_state is up to date");
        webhook_notifier::migrate(&pool).await?;
        output::say("schema webhooks is up to date");
        pool.close().await;
        Ok(())
    }
}

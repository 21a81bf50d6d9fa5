//! `leadctl migrate`.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use service_kit::config::DatabaseConfig;
use sqlx::postgres::PgPoolOptions;

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
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(CONNECT)
            .connect(&self.database.database_url)
            .await
            .context("cannot connect to Postgres; --database-url or DATABASE_URL says where it is")?;
        lead_state::migrate(&self.database).await?;
        output::say("schema lead_state is up to date");
        webhook_notifier::migrate(&pool).await?;
        output::say("schema webhooks is up to date");
        pool.close().await;
        Ok(())
    }
}

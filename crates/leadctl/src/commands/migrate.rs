//! `leadctl migrate`.

use anyhow::Context;
use clap::Args;
use service_kit::config::DatabaseConfig;
use sqlx::{Connection, postgres::PgPoolOptions};

use crate::{clients::postgres, output};

/// Migrate the database schemas of lead-state and webhook-notifier to this version. There is no way back; services of the
/// previous version can keep running. The services do the same when they start, unless that is switched off.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  leadctl migrate --database-url postgres://leadrelay@db.example.com/leadrelay")]
pub(crate) struct Migrate {
    #[command(flatten)]
    database: DatabaseConfig,
}

impl Migrate {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let url = &self.database.database_url;
        // A pool would retry until its timeout and hide the reason.
        postgres::connect(url).await?.close().await.context("cannot disconnect from Postgres")?;
        let pool = PgPoolOptions::new().max_connections(2).connect(url).await.context("cannot connect to Postgres")?;
        lead_state::migrate(&self.database).await?;
        output::say("schema lead_state is up to date");
        webhook_notifier::migrate(&pool).await?;
        output::say("schema webhooks is up to date");
        pool.close().await;
        Ok(())
    }
}

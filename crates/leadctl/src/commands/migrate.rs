//! `leadctl migrate`.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use service_kit::config::DatabaseConfig;
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};
use tokio::time::{Instant, error::Elapsed, sleep};

use crate::{clients::postgres, output};

/// Between two attempts to connect. Shorter attempts would only fill the output while Postgres starts.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Migrate the database schemas of lead-state and webhook-notifier to this version. There is no way back; services of the
/// previous version can keep running. The services do the same when they start, unless that is switched off.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  leadctl migrate --database-url postgres://leadrelay@db.example.com/leadrelay")]
pub(crate) struct Migrate {
    #[command(flatten)]
    database: DatabaseConfig,
    /// How long to wait for a Postgres that cannot be reached or is starting, e.g. 10m. A wrong password or database is
    /// reported at once.
    #[arg(long, default_value = "0s")]
    wait: humantime::Duration,
}

impl Migrate {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let url = &self.database.database_url;
        // A pool would retry until its timeout and hide the reason.
        connect(url, self.wait.into()).await?.close().await.context("cannot disconnect from Postgres")?;
        let pool = PgPoolOptions::new().max_connections(2).connect(url).await.context("cannot connect to Postgres")?;
        lead_state::migrate(&self.database).await?;
        output::say("schema lead_state is up to date");
        webhook_notifier::migrate(&pool).await?;
        output::say("schema webhooks is up to date");
        pool.close().await;
        Ok(())
    }
}

/// Connects, again and again for `wait` while Postgres is unavailable.
async fn connect(url: &str, wait: Duration) -> anyhow::Result<PgConnection> {
    let deadline = Instant::now() + wait;
    let mut reported = None;
    loop {
        match postgres::connect(url).await {
            Err(e) if is_unavailable(&e) && Instant::now() < deadline => {
                let reason = format!("{e:#}");
                if reported.as_ref() != Some(&reason) {
                    output::note(format!("waiting for Postgres: {reason}"));
                    reported = Some(reason);
                }
                sleep(RETRY_INTERVAL).await;
            }
            connected => return connected,
        }
    }
}

/// Whether Postgres may accept the same connection later.
fn is_unavailable(error: &anyhow::Error) -> bool {
    if error.downcast_ref::<Elapsed>().is_some() {
        return true;
    }
    match error.downcast_ref::<sqlx::Error>() {
        Some(sqlx::Error::Io(_)) => true,
        // Starting or stopping; too many connections.
        Some(sqlx::Error::Database(e)) => matches!(e.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

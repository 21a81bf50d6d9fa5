//! `leadctl migrate`.

use std::time::Duration;

use clap::Args;
use service_kit::{
    config::DatabaseConfig,
    postgres::{Pool, error::is_unavailable},
};
use tokio::time::{Instant, sleep};

use crate::{clients::postgres, output};

/// The pause between two attempts to connect. A shorter one would only fill the output while Postgres starts.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Migrate the database schemas of lead-state and webhook-notifier to this version. There is no way back; services of
/// the previous version can keep running. The services do the same when they start, unless that is switched off.
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
        let pool = postgres::pool(&self.database.database_url)?;
        wait_for(&pool, self.wait.into()).await?;
        lead_state::migrate(&self.database).await?;
        output::say("schema lead_state is up to date");
        webhook_notifier::migrate(&self.database).await?;
        output::say("schema webhooks is up to date");
        Ok(())
    }
}

/// Connects. Retries for `wait` while Postgres is unavailable.
async fn wait_for(pool: &Pool, wait: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + wait;
    let mut reported = None;
    loop {
        match postgres::connect(pool).await {
            Err(e) if may_pass(&e) && Instant::now() < deadline => {
                let reason = format!("{e:#}");
                if reported.as_ref() != Some(&reason) {
                    output::note(format!("waiting for Postgres: {reason}"));
                    reported = Some(reason);
                }
                sleep(RETRY_INTERVAL).await;
            }
            connected => return connected.map(drop),
        }
    }
}

/// Whether Postgres may accept the same connection later.
fn may_pass(error: &anyhow::Error) -> bool {
    error.downcast_ref::<sqlx::Error>().is_some_and(is_unavailable)
}

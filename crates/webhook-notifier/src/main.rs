//! 7 Deliver, 8 Retry: the webhook-notifier as a program.

use clap::Parser;
use service_kit::{
    config::{self, LogConfig},
    lifecycle, telemetry,
};
use webhook_notifier::Config;

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Delivers the outcomes of lead updates to callback URLs.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  webhook-notifier --nats-url nats://127.0.0.1:4222 \\\n    \
                  --database-url postgres://leadrelay@127.0.0.1:5432/leadrelay --health-listen 0.0.0.0:8081"
)]
struct Cli {
    #[command(flatten)]
    log: LogConfig,
    #[command(flatten)]
    config: Config,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli: Cli = config::parse()?;
    telemetry::init(&cli.log)?;
    webhook_notifier::run(cli.config, lifecycle::shutdown_on_signal()?).await
}

//! The lead-state service.

use clap::Parser;
use service_kit::{
    config::{self, LogConfig},
    lifecycle, telemetry,
};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Applies lead updates, each exactly once, in the order of the log.
///
/// Example: lead-state --nats-url nats://nats:4222 --database-url postgres://leadrelay@postgres/leadrelay
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    config: lead_state::Config,
    #[command(flatten)]
    log: LogConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli: Cli = config::parse()?;
    telemetry::init(&cli.log)?;
    lead_state::run(cli.config, lifecycle::shutdown_on_signal()?).await
}

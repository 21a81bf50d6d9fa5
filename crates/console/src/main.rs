//! The console as a process.

use clap::Parser;
use service_kit::{
    config::{self, LogConfig},
    lifecycle, telemetry,
};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Serves the operator console: web pages about leads, updates, deliveries and callbacks.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    console: console::Config,
    #[command(flatten)]
    log: LogConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli: Cli = config::parse()?;
    telemetry::init(&cli.log)?;
    console::run(cli.console, lifecycle::shutdown_on_signal()?).await
}

//! 1 Accept: the gateway as a process.

use clap::Parser;
use service_kit::{
    config::{self, LogConfig},
    lifecycle, telemetry,
};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Accepts lead updates over HTTP and NATS. Each update is in the command log before the gateway responds.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    gateway: gateway::Config,
    #[command(flatten)]
    log: LogConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli: Cli = config::parse()?;
    telemetry::init(&cli.log)?;
    gateway::run(cli.gateway, lifecycle::shutdown_on_signal()?).await
}

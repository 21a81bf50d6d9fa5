//! Postgres and NATS for `up`, as child processes, where the operator did not name other ones.

use std::path::Path;

use anyhow::{Context, anyhow};
use service_kit::config::NatsConfig;

use crate::{
    Error, LocalNats, LocalPostgres, NatsOptions, PostgresOptions,
    up::{data_dir::DataDir, field},
};

/// The servers that `up` started itself.
#[derive(Default)]
pub(super) struct Servers {
    postgres: Option<LocalPostgres>,
    nats: Option<LocalNats>,
}

impl Servers {
    /// Starts a Postgres, and returns its URL.
    pub(super) async fn start_postgres(&mut self, data: &DataDir) -> anyhow::Result<String> {
        let options = PostgresOptions::durable(data.join("postgres"));
        let postgres =
            LocalPostgres::start(options, &|line| field("note", line)).await.context("cannot start Postgres")?;
        field("Postgres", format_args!("127.0.0.1:{}", postgres.port()));
        let url = postgres.url();
        self.postgres = Some(postgres);
        Ok(url)
    }

    /// The URL of the producer of the nats-server that was started.
    pub(super) fn producer_nats_url(&self) -> Option<String> {
        self.nats.as_ref().map(LocalNats::producer_url)
    }

    /// Starts a nats-server, and returns how to reach it.
    pub(super) async fn start_nats(&mut self, data: &DataDir) -> anyhow::Result<NatsConfig> {
        let options = NatsOptions::durable(data.join("nats"));
        let nats = LocalNats::start(options, &|line| field("note", line)).await.context("cannot start nats-server")?;
        let (major, minor, patch) = nats.version();
        field("NATS", format_args!("127.0.0.1:{} (nats-server {major}.{minor}.{patch})", nats.port()));
        let config = NatsConfig::at(nats.url());
        self.nats = Some(nats);
        Ok(config)
    }

    /// Resolves with an error when a server ends on its own.
    pub(super) async fn died(&mut self) -> anyhow::Error {
        let Self { postgres, nats } = self;
        let postgres = async {
            match postgres {
                Some(server) => {
                    let ended = server.exited().await;
                    died("Postgres", ended, &server.dir().join("postgres.log"))
                }
                None => std::future::pending().await,
            }
        };
        let nats = async {
            match nats {
                Some(server) => {
                    let ended = server.exited().await;
                    died("nats-server", ended, &server.dir().join("nats.log"))
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            error = postgres => error,
            error = nats => error,
        }
    }

    /// Stops both at the same time, in an orderly way.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        let Self { mut postgres, mut nats } = self;
        let nats = async {
            match &mut nats {
                Some(server) => server.stop().await.map(drop).context("cannot stop nats-server"),
                None => Ok(()),
            }
        };
        let postgres = async {
            match &mut postgres {
                Some(server) => server.stop().await.map(drop).context("cannot stop Postgres"),
                None => Ok(()),
            }
        };
        let (nats, postgres) = tokio::join!(nats, postgres);
        nats.and(postgres)
    }
}

fn died(what: &str, ended: Result<std::process::ExitStatus, Error>, log: &Path) -> anyhow::Error {
    let how = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
    anyhow!("{what} ended unexpectedly ({how}); see its log {}", log.display())
}

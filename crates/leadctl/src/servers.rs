//! Postgres and NATS for `up`: private ones as child processes, or those that the operator named.

use std::path::Path;

use anyhow::{Context, anyhow};
use dev_stack::{LocalNats, LocalPostgres, NatsOptions, PostgresOptions};
use service_kit::config::NatsConfig;

use crate::{files::DataDir, output};

/// The servers that `up` started itself, if any.
#[derive(Default)]
pub(crate) struct Servers {
    postgres: Option<LocalPostgres>,
    nats: Option<LocalNats>,
}

impl Servers {
    /// Starts a Postgres, and returns its URL.
    pub(crate) async fn start_postgres(&mut self, data: &DataDir) -> anyhow::Result<String> {
        let options = PostgresOptions::durable(data.join("postgres"));
        let postgres = LocalPostgres::start(options, &|line| output::field("note", line))
            .await
            .context("cannot start Postgres")?;
        output::field("Postgres", format_args!("127.0.0.1:{}", postgres.port()));
        let url = postgres.url();
        self.postgres = Some(postgres);
        Ok(url)
    }

    /// Starts a nats-server, and returns how to reach it.
    pub(crate) async fn start_nats(&mut self, data: &DataDir) -> anyhow::Result<NatsConfig> {
        let options = NatsOptions::durable(data.join("nats"));
        let nats =
            LocalNats::start(options, &|line| output::field("note", line)).await.context("cannot start nats-server")?;
        let (major, minor, patch) = nats.version();
        output::field("NATS", format_args!("127.0.0.1:{} (nats-server {major}.{minor}.{patch})", nats.port()));
        let config = NatsConfig::at(nats.url());
        self.nats = Some(nats);
        Ok(config)
    }

    /// Resolves when one of them ends that nobody told to, with what to say about it.
    pub(crate) async fn died(&mut self) -> anyhow::Error {
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

    /// Stops them in order, at the same time.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
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

fn died(what: &str, ended: Result<std::process::ExitStatus, dev_stack::Error>, log: &Path) -> anyhow::Error {
    let how = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
    anyhow!("{what} ended though nobody told it to ({how}); its log is {}", log.display())
}

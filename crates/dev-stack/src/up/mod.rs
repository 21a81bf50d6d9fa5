//! `leadctl up`: the whole system on this machine, in the foreground.
//!
//! Postgres and NATS are child processes, the three services and the console are tasks of this process. If any of them
//! ends on its own, everything stops. A signal drains the services first, then stops the servers.

mod client;
mod data_dir;
mod demo;
mod output;
mod receiver;
mod servers;
mod services;
mod stack_env;

use std::{env, net::SocketAddr, path::PathBuf, sync::Mutex, time::Duration};

use anyhow::{Context, anyhow};
use clap::Args;
use contract::secret::Secret;
use futures::future::LocalBoxFuture;
use secrets::new_sealing_key;
use service_kit::{
    config::{LogConfig, LogFormat, NatsConfig, SecretsConfig},
    http,
    lifecycle::{self, DRAIN_DEADLINE, Tasks},
    nats,
    postgres::schema::SchemaError,
    telemetry,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use self::demo::RenderTimeline;
use crate::{
    Install,
    up::{
        data_dir::{DataDir, Ports},
        demo::Demo,
        output::{field, say},
        receiver::Receiver,
        servers::Servers,
        services::{Keys, Sockets},
        stack_env::{OtherStack, STACK, STACK_ENV},
    },
};

/// How long the services may take until a note points to their log. A first start migrates and creates streams within
/// a second or two; a migration or recovery of much data takes longer.
const READY_NOTICE: Duration = Duration::from_secs(60);
/// Added to the services' own drain deadline, so that their error is the one that is printed.
const DRAIN_LEEWAY: Duration = Duration::from_secs(3);
/// Replicas of streams on a cluster: the least that survives the loss of a server.
const CLUSTER_REPLICAS: u8 = 3;
const LOG: &str = "leadrelay.log";
const PORTS: &str = "ports.json";
/// The key that seals callbacks' secrets, unless the operator passes one.
const SECRETS_KEY: &str = "secrets.key";
/// The key that seals sessions of the console.
const CONSOLE_KEY: &str = "console.key";

/// Run the whole system on this machine: Postgres, NATS, the three services and the console, until Ctrl-C. A second
/// start continues with the data of the first. Once everything is ready, DATA_DIR/stack.env holds the settings that
/// clients need.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  leadctl up --demo\n  leadctl up --data-dir /var/lib/leadrelay --listen 127.0.0.1:8080\n  \
                  set -a; . .leadrelay/stack.env; leadctl update get UPDATE_ID"
)]
pub struct Up {
    /// The directory of all data; only one `up` can use it at a time.
    #[arg(long, env = "LEADRELAY_DATA_DIR", default_value = ".leadrelay")]
    data_dir: PathBuf,
    /// Address of the HTTP API. Default: the port of the previous start on 127.0.0.1, or a free one.
    #[arg(long, env = "GATEWAY_LISTEN")]
    listen: Option<SocketAddr>,
    /// Create a demo project with leads and a webhook receiver, send two updates and show what happens.
    #[arg(long)]
    demo: bool,
    /// If Postgres or NATS is missing, print how to install it instead of installing it.
    #[arg(long)]
    no_install: bool,
    /// Use this NATS instead of a private one.
    #[arg(long, env = "NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// Credentials file for the NATS of --nats-url.
    #[arg(long, env = "NATS_CREDS", requires = "nats_url")]
    nats_creds: Option<PathBuf>,
    /// CA certificates (PEM) for the NATS of --nats-url.
    #[arg(long, env = "NATS_CA", requires = "nats_url")]
    nats_ca: Option<PathBuf>,
    /// Client certificate (PEM) for the NATS of --nats-url.
    #[arg(long, env = "NATS_CERT", requires_all = ["nats_url", "nats_key"])]
    nats_cert: Option<PathBuf>,
    /// Private key (PEM) of the client certificate.
    #[arg(long, env = "NATS_KEY", requires = "nats_cert")]
    nats_key: Option<PathBuf>,
    /// Replicas of the streams when they are created. Default: 3 if the NATS of --nats-url is a cluster, otherwise 1.
    #[arg(long, env = "STREAM_REPLICAS", value_parser = clap::value_parser!(u8).range(1..=5))]
    stream_replicas: Option<u8>,
    /// Use this Postgres instead of a private one.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    // By default a key is created and kept in DATA_DIR/secrets.key.
    #[command(flatten)]
    secrets: SecretsConfig,
    /// Log to standard error instead of DATA_DIR/leadrelay.log (rotated to leadrelay.log.1; at most 64 MiB in all).
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    log: LogConfig,
}

struct Running {
    gateway_url: String,
    console_url: String,
    nats: NatsConfig,
    /// Of the private NATS only.
    producer_nats_url: Option<String>,
    database_url: String,
    demo: Option<Demo>,
}

impl Up {
    /// Runs the stack until a signal, or until a part of it fails.
    ///
    /// # Errors
    /// The first failure: a server or service that does not start, or that ends on its own.
    pub fn run(self, render_timeline: RenderTimeline) -> LocalBoxFuture<'static, anyhow::Result<()>> {
        Box::pin(self.run_until_signal(render_timeline))
    }

    async fn run_until_signal(mut self, render_timeline: RenderTimeline) -> anyhow::Result<()> {
        let shutdown = lifecycle::shutdown_on_signal()?;
        let data = DataDir::open(&self.data_dir)?;
        // The settings of the previous start are not valid until this start is ready.
        data.remove(STACK_ENV)?;
        self.start_log(&data)?;
        say("Starting Leadrelay");
        field("data", data.path().display());
        self.ignore_own_servers(&data)?;

        let mut servers = Servers::default();
        let mut tasks = Tasks::new(shutdown.clone());
        let started = shutdown.run_until_cancelled(self.start(&data, &mut servers, &mut tasks, &shutdown)).await;
        let ended = match started {
            Some(Ok(running)) => supervise(&data, &mut servers, tasks, running, &shutdown, render_timeline).await,
            Some(Err(e)) => Err(e),
            None => Ok(()),
        };
        let stopped = servers.stop().await;
        if ended.is_ok() && stopped.is_ok() {
            say("Stopped.");
        }
        ended.and(stopped)
    }

    /// Removes the URLs of this stack's private servers, which the environment contains if the shell has loaded
    /// `stack.env`.
    fn ignore_own_servers(&mut self, data: &DataDir) -> Result<(), OtherStack> {
        let loaded = env::var_os(STACK).map(PathBuf::from);
        let mut ignored = Vec::new();
        for (name, url) in [("NATS_URL", &mut self.nats_url), ("DATABASE_URL", &mut self.database_url)] {
            if let Some(given) = url.as_deref()
                && !stack_env::is_given(given, loaded.as_deref(), data.path())?
            {
                *url = None;
                ignored.push(name);
            }
        }
        if !ignored.is_empty() {
            let names = ignored.join(" and ");
            field("note", format_args!("{names} of {STACK_ENV}: ignored, because this start runs the servers itself"));
        }
        Ok(())
    }

    /// The operator's keys, or the data directory's, which the first start creates.
    fn secrets(&self, data: &DataDir) -> anyhow::Result<SecretsConfig> {
        if self.secrets.secrets_key.is_some() {
            return Ok(self.secrets.clone());
        }
        Ok(SecretsConfig { secrets_key: Some(stored_key(data, SECRETS_KEY)?), ..self.secrets.clone() })
    }

    fn start_log(&self, data: &DataDir) -> anyhow::Result<()> {
        if self.verbose {
            return telemetry::init(&self.log);
        }
        let log_format = match self.log.log_format {
            LogFormat::Auto => LogFormat::Human,
            format => format,
        };
        let file = Mutex::new(data.log(LOG)?);
        telemetry::init_to(file, false, &LogConfig { log_format, ..self.log.clone() })
    }

    /// The NATS of the operator.
    fn given_nats(&self) -> Option<NatsConfig> {
        Some(NatsConfig {
            nats_creds: self.nats_creds.clone(),
            nats_ca: self.nats_ca.clone(),
            nats_cert: self.nats_cert.clone(),
            nats_key: self.nats_key.clone(),
            ..NatsConfig::at(self.nats_url.as_ref()?)
        })
    }

    /// The replicas of new streams on the operator's NATS.
    async fn replicas_on(&self, nats: &NatsConfig) -> anyhow::Result<u8> {
        let server = services::connect(nats).await?.server_info();
        let replicas = self.stream_replicas.unwrap_or(if server.cluster.is_some() { CLUSTER_REPLICAS } else { 1 });
        let place = match server.cluster {
            Some(cluster) => format!("cluster {cluster}"),
            None => "one server".to_owned(),
        };
        let replicas_text = if replicas == 1 { "1 replica".to_owned() } else { format!("{replicas} replicas") };
        field("NATS", format_args!("{place} (nats-server {}); new streams get {replicas_text}", server.version));
        Ok(replicas)
    }

    /// Starts the servers, then the services as tasks.
    async fn start(
        &self,
        data: &DataDir,
        servers: &mut Servers,
        tasks: &mut Tasks,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Running> {
        if self.nats_url.is_none() || self.database_url.is_none() {
            let install = if self.no_install { Install::Forbidden } else { Install::Allowed };
            crate::ensure_installed(install, &|line| field("note", line)).await?;
        }
        let database_url = match &self.database_url {
            Some(url) => url.clone(),
            None => servers.start_postgres(data).await?,
        };
        let (nats, stream_replicas) = match self.given_nats() {
            Some(nats) => {
                let replicas = self.replicas_on(&nats).await?;
                (nats, replicas)
            }
            None => (servers.start_nats(data).await?, self.stream_replicas.unwrap_or(1)),
        };

        let mut ports = data.read_json::<Ports>(PORTS)?.unwrap_or_default();
        let gateway = match self.listen {
            Some(address) => http::bind(address).await?,
            None => listen(ports.gateway).await?,
        };
        let gateway_address = gateway.local_addr().context("cannot read the gateway's address")?;
        ports.gateway = Some(gateway_address.port());
        let console = listen(ports.console).await?;
        let console_address = console.local_addr().context("cannot read the console's address")?;
        ports.console = Some(console_address.port());
        let demo = match self.demo {
            false => None,
            true => {
                let listener = listen(ports.receiver).await?;
                let address = listener.local_addr().context("cannot read the receiver's address")?;
                ports.receiver = Some(address.port());
                let demo = Demo::open(data, format!("http://{address}"))?;
                serve_receiver(tasks, listener, demo.receiver.clone());
                Some(demo)
            }
        };
        data.write_json(PORTS, &ports)?;

        // A gateway that listens on all addresses is reached here on 127.0.0.1.
        let host = if gateway_address.ip().is_unspecified() { "127.0.0.1".into() } else { host(gateway_address) };
        let gateway_url = format!("http://{host}:{}", gateway_address.port());
        let console_url = format!("http://{console_address}");
        let keys = Keys { secrets: self.secrets(data)?, console: stored_key(data, CONSOLE_KEY)? };
        let sockets = Sockets { gateway, gateway_url: gateway_url.clone(), console };
        services::spawn(tasks, sockets, &nats, stream_replicas, &database_url, keys, shutdown)?;
        field("gateway", &gateway_url);
        field("console", &console_url);
        if let Some(demo) = &demo {
            field("receiver", demo.receiver_url());
        }
        if !self.verbose {
            field("log", data.join(LOG).display());
        }
        let producer_nats_url = servers.producer_nats_url();
        Ok(Running { gateway_url, console_url, nats, producer_nats_url, database_url, demo })
    }
}

/// A key of the data directory, which the first start creates.
fn stored_key(data: &DataDir, name: &str) -> anyhow::Result<Secret> {
    if let Some(key) = data.read(name)? {
        return Ok(key.into());
    }
    let key = new_sealing_key(rand::random());
    data.write(name, &format!("{key}\n"))?;
    Ok(key.into())
}

fn host(address: SocketAddr) -> String {
    if address.is_ipv6() { format!("[{}]", address.ip()) } else { address.ip().to_string() }
}

/// Listens on the port of the previous start, or on a free one.
async fn listen(last: Option<u16>) -> anyhow::Result<TcpListener> {
    let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
    if let Some(port) = last
        && let Ok(listener) = TcpListener::bind(local(port)).await
    {
        return Ok(listener);
    }
    http::bind(local(0)).await
}

/// The receiver runs until the process ends, so that it accepts the deliveries of draining services.
fn serve_receiver(tasks: &mut Tasks, listener: TcpListener, receiver: Receiver) {
    let router = receiver.router();
    tasks
        .spawn_background("receiver", http::serve(listener, router, http::Limits::default(), CancellationToken::new()));
}

/// Prepares the stack for clients, then waits until a part of it ends.
async fn supervise(
    data: &DataDir,
    servers: &mut Servers,
    tasks: Tasks,
    running: Running,
    shutdown: &CancellationToken,
    render_timeline: RenderTimeline,
) -> anyhow::Result<()> {
    let services = tasks.run(DRAIN_DEADLINE + DRAIN_LEEWAY);
    tokio::pin!(services);
    let prepare = async {
        match shutdown.run_until_cancelled(prepare(data, running, render_timeline)).await {
            Some(Err(e)) => e,
            Some(Ok(())) | None => std::future::pending().await,
        }
    };
    let failure = tokio::select! {
        ended = &mut services => return ended.map_err(|e| explain_old_data(e, data)),
        error = prepare => error,
        error = servers.died() => error,
    };
    shutdown.cancel();
    // Later failures are consequences of the first one.
    let _ = services.await;
    Err(failure)
}

/// Replaces the error about an outdated schema, which does not name the data directory.
fn explain_old_data(error: anyhow::Error, data: &DataDir) -> anyhow::Error {
    let is_old = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref::<SchemaError>(), Some(SchemaError::Outdated(_)))
    };
    if !error.chain().any(is_old) {
        return error;
    }
    anyhow!(
        "the database is from an earlier, incompatible version of Leadrelay: to start with an empty one, remove {} (or with \
         --database-url, drop the schemas lead_state and webhooks)",
        data.path().display()
    )
}

/// Waits until the services answer, runs the demo, and writes the settings for clients.
async fn prepare(data: &DataDir, running: Running, render_timeline: RenderTimeline) -> anyhow::Result<()> {
    let Running { gateway_url, console_url, nats: config, producer_nats_url, database_url, demo } = running;
    let client = services::connect(&config).await?;
    let ready = services::ready(&gateway_url, &client);
    tokio::pin!(ready);
    match tokio::time::timeout(READY_NOTICE, &mut ready).await {
        Ok(ready) => ready?,
        // If the stack stopped here, the next start would begin the migration or recovery again.
        Err(_) => {
            field("note", format_args!("the services are not ready yet; see {}", data.join(LOG).display()));
            ready.await?;
        }
    }
    say("Everything is ready.");

    let mut environment =
        vec![(STACK, data.path().display().to_string()), ("LEADRELAY_GATEWAY_URL", gateway_url.clone())];
    let mut ending = None;
    if let Some(mut demo) = demo
        && let Some(next) = demo.run(data, &client, &gateway_url, render_timeline).await
    {
        environment.extend(next.environment);
        ending = Some(next.ending);
    }
    let token = console::create_login(&nats::jetstream(&client), console::LoginRole::Operator)
        .await
        .context("cannot make a login for the console")?;
    let login_url = console::login_url(&console_url, &token);
    environment.extend([("LEADRELAY_CONSOLE_URL", console_url), ("LEADRELAY_CONSOLE_LOGIN_URL", login_url.clone())]);
    environment.extend(producer_nats_url.map(|url| ("LEADRELAY_PRODUCER_NATS_URL", url)));
    environment.extend(stack_env::nats_variables(config));
    environment.push(("DATABASE_URL", database_url));
    data.write(STACK_ENV, &stack_env::render(&environment))?;

    say("");
    if let Some(ending) = ending {
        say(ending);
        say("");
    }
    field("console", format_args!("{login_url} (signs in once, within an hour)"));
    field("settings", data.join(STACK_ENV).display());
    say("Ctrl-C stops everything.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_database_is_reported_with_the_directory_to_remove() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let old = anyhow::Error::from(SchemaError::Outdated("lead_state")).context("task lead-state failed");

        let explained = explain_old_data(old, &data).to_string();
        let other = explain_old_data(anyhow!("other"), &data).to_string();

        assert!(explained.contains(&format!("remove {}", data.path().display())), "{explained}");
        assert_eq!(other, "other");
    }
}

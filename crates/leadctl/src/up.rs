//! `leadctl up`: the whole system on this machine, in the foreground.
//!
//! Postgres and NATS are child processes, the three services are tasks of this one. Whatever ends unasked ends all of
//! it; a signal drains the services first, then stops the servers.

use std::{net::SocketAddr, path::PathBuf, sync::Mutex, time::Duration};

use anyhow::{Context, anyhow};
use clap::{Args, Parser};
use contract::{
    ObjectId,
    rpc::{DELIVERY_OF_UPDATE, Delivery, GetUpdate, KEY_LIST, Keys, ListKeys},
};
use dev_stack::Install;
use secrets::new_sealing_key;
use service_kit::{
    config::{HealthConfig, LogConfig, LogFormat, NatsConfig, SecretsConfig},
    http,
    lifecycle::{self, DRAIN_DEADLINE, Tasks},
    telemetry,
};
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::{
    admin,
    demo::Demo,
    files::{DataDir, Ports},
    gateway_client::Gateway,
    output::{self, field, say},
    receiver::Receiver,
    servers::Servers,
};

/// How long the services may take until all of them answer. A first start migrates and makes streams within a second or
/// two; recovery of a large log takes longer.
const READY: Duration = Duration::from_secs(60);
/// What the services have beyond their own deadline to drain, so that theirs is the one that speaks.
const LEEWAY: Duration = Duration::from_secs(3);
/// Where the services log.
const LOG: &str = "leadrelay.log";
/// Where clients find what they need.
const STACK_ENV: &str = "stack.env";
const PORTS: &str = "ports.json";
/// Where the key is that seals callbacks' secrets, unless the operator gave one.
const SECRETS_KEY: &str = "secrets.key";

/// Run the whole system on this machine: Postgres, NATS and the three services, until Ctrl-C. A second start continues
/// where the first one was. What clients need stands in DATA_DIR/stack.env once everything is ready.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  leadctl up --demo\n  leadctl up --data-dir /var/lib/leadrelay --listen 127.0.0.1:8080\n  \
                  set -a; . .leadrelay/stack.env; leadctl update get UPDATE_ID"
)]
pub(crate) struct Up {
    /// Where everything is kept; one `up` at a time.
    #[arg(long, env = "LEADRELAY_DATA_DIR", default_value = ".leadrelay")]
    data_dir: PathBuf,
    /// Address of the HTTP API. By default a free port of 127.0.0.1, the one of last time if it is still free.
    #[arg(long, env = "GATEWAY_LISTEN")]
    listen: Option<SocketAddr>,
    /// Add a project with leads and a receiver that shows what arrives; send two updates and say what happens.
    #[arg(long)]
    demo: bool,
    /// Do not install Postgres and NATS where they are missing; say what to install.
    #[arg(long)]
    no_install: bool,
    /// Use this NATS instead of a private one.
    #[arg(long, env = "NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// A credentials file for that NATS.
    #[arg(long, env = "NATS_CREDS", requires = "nats_url")]
    nats_creds: Option<PathBuf>,
    /// A file of CA certificates for that NATS.
    #[arg(long, env = "NATS_CA", requires = "nats_url")]
    nats_ca: Option<PathBuf>,
    /// A file with a certificate for that NATS.
    #[arg(long, env = "NATS_CERT", requires_all = ["nats_url", "nats_key"])]
    nats_cert: Option<PathBuf>,
    /// A file with the private key of that certificate.
    #[arg(long, env = "NATS_KEY", requires = "nats_cert")]
    nats_key: Option<PathBuf>,
    /// Use this Postgres instead of a private one.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// The keys that callbacks' secrets are sealed with. By default one is made, and kept in DATA_DIR/secrets.key.
    #[command(flatten)]
    secrets: SecretsConfig,
    /// Log to standard error instead of DATA_DIR/leadrelay.log, which makes room for itself: it and leadrelay.log.1 have at most 64 MiB.
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    log: LogConfig,
}

/// Everything that runs, and where.
struct Running {
    gateway_url: String,
    nats: NatsConfig,
    database_url: String,
    demo: Option<Demo>,
}

impl Up {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let shutdown = lifecycle::shutdown_on_signal()?;
        let data = DataDir::open(&self.data_dir)?;
        // Not true any more, or not yet.
        data.remove(STACK_ENV)?;
        self.start_log(&data)?;
        say("Leadrelay starts");
        field("data", data.path().display());

        let mut servers = Servers::default();
        let mut tasks = Tasks::new(shutdown.clone());
        let started = shutdown.run_until_cancelled(self.start(&data, &mut servers, &mut tasks, &shutdown)).await;
        let ended = match started {
            Some(Ok(running)) => watch(&data, &mut servers, tasks, running, &shutdown).await,
            Some(Err(e)) => Err(e),
            None => Ok(()),
        };
        let stopped = servers.stop().await;
        if ended.is_ok() && stopped.is_ok() {
            say("Stopped.");
        }
        ended.and(stopped)
    }

    /// The operator's keys, or the one of this data directory, made on the first start.
    fn secrets(&self, data: &DataDir) -> anyhow::Result<SecretsConfig> {
        if self.secrets.secrets_key.is_some() {
            return Ok(self.secrets.clone());
        }
        let key = match data.read(SECRETS_KEY)? {
            Some(key) => key,
            None => {
                let key = new_sealing_key(rand::random());
                data.write(SECRETS_KEY, &format!("{key}\n"))?;
                key
            }
        };
        Ok(SecretsConfig { secrets_key: Some(key.into()), ..self.secrets.clone() })
    }

    fn start_log(&self, data: &DataDir) -> anyhow::Result<()> {
        if self.verbose {
            return telemetry::init(&self.log);
        }
        let filter = EnvFilter::try_new(&self.log.log_filter)
            .with_context(|| format!("--log-filter {:?} is not a filter; try info", self.log.log_filter))?;
        let file = Mutex::new(data.log(LOG)?);
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(file).with_ansi(false);
        let started = match self.log.log_format {
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
            LogFormat::Auto | LogFormat::Human => builder.compact().try_init(),
        };
        started.map_err(|e| anyhow!("cannot start logging: {e}"))
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
            dev_stack::ensure_installed(install, &|line| output::field("note", line)).await?;
        }
        let database_url = match &self.database_url {
            Some(url) => url.clone(),
            None => servers.start_postgres(data).await?,
        };
        let nats = match &self.nats_url {
            Some(url) => NatsConfig {
                nats_url: url.clone(),
                nats_creds: self.nats_creds.clone(),
                nats_ca: self.nats_ca.clone(),
                nats_cert: self.nats_cert.clone(),
                nats_key: self.nats_key.clone(),
            },
            None => servers.start_nats(data).await?,
        };

        let mut ports = data.read_json::<Ports>(PORTS)?.unwrap_or_default();
        let gateway = match self.listen {
            Some(address) => http::bind(address).await?,
            None => listen(ports.gateway).await?,
        };
        let gateway_address = gateway.local_addr().context("the gateway has no address")?;
        ports.gateway = Some(gateway_address.port());
        let demo = match self.demo {
            false => None,
            true => {
                let listener = listen(ports.receiver).await?;
                let address = listener.local_addr().context("the receiver has no address")?;
                ports.receiver = Some(address.port());
                let demo = Demo::open(data, format!("http://{address}"))?;
                serve_receiver(tasks, listener, demo.receiver.clone());
                Some(demo)
            }
        };
        data.write_json(PORTS, &ports)?;

        spawn_services(tasks, gateway, &nats, &database_url, &self.secrets(data)?, shutdown)?;
        // What listens on all addresses is reached here on this one.
        let host = if gateway_address.ip().is_unspecified() { "127.0.0.1".into() } else { host(gateway_address) };
        let gateway_url = format!("http://{host}:{}", gateway_address.port());
        field("gateway", &gateway_url);
        if let Some(demo) = &demo {
            field("receiver", demo.receiver_url());
        }
        if !self.verbose {
            field("log", data.join(LOG).display());
        }
        Ok(Running { gateway_url, nats, database_url, demo })
    }
}

fn host(address: SocketAddr) -> String {
    if address.is_ipv6() { format!("[{}]", address.ip()) } else { address.ip().to_string() }
}

/// Listens on the port of last time, or on a free one.
async fn listen(last: Option<u16>) -> anyhow::Result<TcpListener> {
    let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
    if let Some(port) = last
        && let Ok(listener) = TcpListener::bind(local(port)).await
    {
        return Ok(listener);
    }
    http::bind(local(0)).await
}

/// The receiver outlives the services: what they still tell while they drain arrives.
fn serve_receiver(tasks: &mut Tasks, listener: TcpListener, receiver: Receiver) {
    let router = receiver.router();
    tasks
        .spawn_background("receiver", http::serve(listener, router, http::Limits::default(), CancellationToken::new()));
}

/// The three services, each as it would run alone; environment variables of theirs hold here too.
fn spawn_services(
    tasks: &mut Tasks,
    gateway: TcpListener,
    nats: &NatsConfig,
    database_url: &str,
    secrets: &SecretsConfig,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let health = || HealthConfig { health_listen: ([127, 0, 0, 1], 0).into() };
    let database = ["--database-url", database_url];

    let mut config: lead_state::Config = config_of(&database)?;
    (config.nats, config.health, config.secrets) = (nats.clone(), health(), secrets.clone());
    tasks.spawn("lead-state", lead_state::run(config, shutdown.clone()));

    let mut config: gateway::Config = config_of(&[])?;
    (config.nats, config.health) = (nats.clone(), health());
    tasks.spawn("gateway", gateway::run_on(gateway, config, shutdown.clone()));

    let mut config: webhook_notifier::Config = config_of(&database)?;
    (config.nats, config.health, config.secrets) = (nats.clone(), health(), secrets.clone());
    // Whoever runs all of it on one machine has the endpoints there too.
    config.allow_http = true;
    for network in ["127.0.0.0/8", "::1/128"] {
        config.allow_networks.push(network.parse().context("not a network")?);
    }
    tasks.spawn("webhook-notifier", webhook_notifier::run(config, shutdown.clone()));
    Ok(())
}

#[derive(Parser)]
struct Service<T: Args> {
    #[command(flatten)]
    config: T,
}

/// A service's configuration, from these arguments, its environment variables and its defaults.
fn config_of<T: Args>(arguments: &[&str]) -> anyhow::Result<T> {
    let service = Service::try_parse_from(["up"].iter().chain(arguments)).map_err(|e| anyhow!("{e}"))?;
    Ok(service.config)
}

/// Makes everything ready, then watches over it until it ends.
async fn watch(
    data: &DataDir,
    servers: &mut Servers,
    tasks: Tasks,
    running: Running,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let services = tasks.run(DRAIN_DEADLINE + LEEWAY);
    tokio::pin!(services);
    let prepare = async {
        match shutdown.run_until_cancelled(prepare(data, running)).await {
            Some(Err(e)) => e,
            Some(Ok(())) | None => std::future::pending().await,
        }
    };
    let failure = tokio::select! {
        ended = &mut services => return ended,
        error = prepare => error,
        error = servers.died() => error,
    };
    shutdown.cancel();
    // The first failure is the one to tell.
    let _ = services.await;
    Err(failure)
}

/// Waits until everything answers, gives the demo, and tells clients where everything is.
async fn prepare(data: &DataDir, running: Running) -> anyhow::Result<()> {
    let Running { gateway_url, nats, database_url, demo } = running;
    tokio::time::timeout(READY, ready(&gateway_url, &nats)).await.map_err(|_| {
        anyhow!("the services were not ready within {READY:?}; {} says why", data.join(LOG).display())
    })??;
    say("Everything is ready.");

    let mut environment = vec![("LEADRELAY_GATEWAY_URL", gateway_url.clone())];
    let mut ending = None;
    if let Some(mut demo) = demo {
        let client = admin::connect(&nats).await?;
        let shown = demo.run(data, &client, &gateway_url).await.context("the demo failed")?;
        environment.extend(shown.environment);
        ending = Some(shown.ending);
    }
    environment.extend([("NATS_URL", nats.nats_url), ("DATABASE_URL", database_url)]);
    let lines = environment.into_iter().map(|(name, value)| format!("{name}={value}\n"));
    data.write(STACK_ENV, &lines.collect::<String>())?;

    say("");
    if let Some(ending) = ending {
        say(ending);
        say("");
    }
    field("settings", data.join(STACK_ENV).display());
    say("Ctrl-C stops everything.");
    Ok(())
}

/// Resolves once all three services do their work.
async fn ready(gateway_url: &str, nats: &NatsConfig) -> anyhow::Result<()> {
    let client = admin::connect(nats).await?;
    let nobody = ObjectId::from_bytes([0; 12]);
    let keys = ListKeys { project_id: nobody };
    let deliveries = GetUpdate { project_id: nobody, update_id: nobody };
    let gateway = Gateway::new(gateway_url, "nobody's")?;
    loop {
        let lead_state = admin::call::<_, Keys>(&client, KEY_LIST, &keys);
        let notifier = admin::call::<_, Vec<Delivery>>(&client, DELIVERY_OF_UPDATE, &deliveries);
        // Once it has read the keys, it knows that this is none.
        let gateway = gateway.get("/api/v1/leads/get");
        let (lead_state, notifier, gateway) = tokio::join!(lead_state, notifier, gateway);
        let knows_keys = gateway.is_ok_and(|answer| answer.code().as_deref() == Some("invalid_api_key"));
        if lead_state.is_ok() && notifier.is_ok() && knows_keys {
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
}

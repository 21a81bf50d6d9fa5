//! A private nats-server with JetStream.

use crate::{
    Say, Tls,
    error::{During, Error},
    process::{ChildOptions, Probe, Process, Signal, clear_leftover},
    programs::{self, run},
    server_dir::ServerDir,
};
use async_nats::{Client, ConnectError, ConnectOptions};
use std::{
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};
use tokio::process::Command;

const USER: &str = "leadrelay";
/// The user of internal producers.
const PRODUCER: &str = "producer";

/// From start to the first accepted connection, without the time in which the server restores its streams. A server
/// that is stopped meanwhile begins again at its next start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How long a shutdown may take before SIGKILL.
const GRACE_PERIOD: Duration = Duration::from_secs(15);

/// The directory of the streams in the server's directory.
const STORE: &str = "store";

/// The first version that can sync before it acks.
const SYNCS_SINCE: (u32, u32) = (2, 10);

/// Options of a nats-server.
#[derive(Clone, Debug, Default)]
pub struct NatsOptions {
    /// Its directory, created if necessary; `None` for a temporary one.
    pub dir: Option<PathBuf>,
    /// Whether JetStream syncs before it acks. A server before 2.10 cannot: see [`LocalNats::syncs`].
    pub sync: bool,
    /// The preferred port. If it is not free: the port of the previous start, or any free port.
    pub port: Option<u16>,
    /// Users and permissions. By default the owner with all permissions, and a producer in an account of its own, who
    /// may publish for every project.
    pub authorization: Option<Authorization>,
    /// With TLS, unencrypted connections are rejected. By default there is no TLS.
    pub tls: Option<Tls>,
    /// The server to run; by default the one that is named in the environment or found on this machine.
    pub program: Option<PathBuf>,
    /// Its place in a cluster; `None` for a server of its own. See [`LocalNats::start_cluster`].
    pub cluster: Option<ClusterMember>,
}

/// The place of a nats-server in a cluster on 127.0.0.1.
#[derive(Clone, Debug)]
pub struct ClusterMember {
    /// The name of the cluster. Servers refuse routes from another cluster.
    pub cluster: String,
    /// The name of the server, unique in its cluster.
    pub name: String,
    /// The port for the routes from its peers.
    pub route_port: u16,
    /// The route ports of all members.
    pub peers: Vec<u16>,
    /// The port for monitoring over HTTP.
    pub monitor_port: u16,
}

/// Users and permissions of a nats-server.
#[derive(Clone)]
pub struct Authorization {
    /// An `authorization` or `accounts` block of nats-server's configuration.
    pub config: String,
    /// Environment variables that the text refers to.
    pub environment: Vec<(String, String)>,
    /// The user of the server's owner.
    pub user: String,
    /// The owner's password.
    pub password: String,
}

/// Leaves out the passwords.
impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authorization").field("user", &self.user).finish_non_exhaustive()
    }
}

impl NatsOptions {
    /// Keeps its data in `dir`; survives power cuts if the server can sync.
    pub fn durable(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()), sync: true, ..Self::default() }
    }

    /// A temporary server that leaves no files behind. It syncs like a durable one, so that tests behave like
    /// production.
    pub fn throwaway() -> Self {
        Self { sync: true, ..Self::default() }
    }
}

/// A private nats-server on 127.0.0.1, with JetStream and messages of up to 4 MB.
///
/// It runs until this value is dropped, the process ends, or a method stops it.
#[derive(Debug)]
pub struct LocalNats {
    // Dropped in this order: the server first, then its temporary directory.
    process: Process,
    home: ServerDir,
    program: PathBuf,
    version: (u32, u32, u32),
    settings: Settings,
    port: u16,
}

/// The settings of a server besides its ports and files.
#[derive(Debug)]
struct Settings {
    sync: bool,
    authorization: Authorization,
    tls: Option<Tls>,
    cluster: Option<ClusterMember>,
}

impl LocalNats {
    /// Starts the server and waits until it accepts a client.
    ///
    /// # Errors
    /// [`Error::Missing`] without nats-server; [`Error::InUse`] when another process has the directory;
    /// [`Error::Died`] or [`Error::NotReady`] with its log when it does not start.
    pub async fn start(options: NatsOptions, say: Say<'_>) -> Result<Self, Error> {
        let program = options.program.map_or_else(programs::nats_server, Ok)?;
        let version = version(&program).await?;
        let sync = options.sync && (version.0, version.1) >= SYNCS_SINCE;
        if options.sync && !sync {
            say(&format!(
                "nats-server {}.{}.{} cannot sync before it acks: acked messages survive a crash, but not a power \
                 cut; use 2.10 or later for that",
                version.0, version.1, version.2
            ));
        }
        let home = ServerDir::open(options.dir.as_deref(), None, say)?;
        let mark = home.join("nats.conf").display().to_string();
        clear_leftover(&home.join("nats.pid"), &mark, &[Signal::Term], GRACE_PERIOD).await?;

        let authorization = match options.authorization {
            Some(authorization) => authorization,
            None => Authorization::with_password(home.secret("password")?),
        };
        let settings = Settings { sync, authorization, tls: options.tls, cluster: options.cluster };
        let launch = async |port| launch(&program, &home, &settings, port).await;
        let (process, port) = home.launch(options.port, launch).await?;
        Ok(Self { process, home, program, version, settings, port })
    }

    /// The owner's URL, `nats://user:password@127.0.0.1:port` (`tls://` with TLS). It is stable for a directory and
    /// port.
    pub fn url(&self) -> String {
        let Authorization { user, password, .. } = &self.settings.authorization;
        self.url_for(user, password)
    }

    /// The URL of the producer, if the server has the default users.
    pub fn producer_url(&self) -> String {
        self.url_for(PRODUCER, &self.settings.authorization.password)
    }

    /// The URL for another user.
    pub fn url_for(&self, user: &str, password: &str) -> String {
        let scheme = if self.settings.tls.is_some() { "tls" } else { "nats" };
        format!("{scheme}://{user}:{password}@127.0.0.1:{}", self.port)
    }

    /// Connects a client. `async_nats::connect` ignores the user and password in the URL.
    ///
    /// # Errors
    /// The server does not run.
    pub async fn connect(&self) -> Result<Client, ConnectError> {
        connect(&self.settings, self.port).await
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's pid, also after it has ended.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The server's directory.
    pub fn dir(&self) -> &Path {
        self.home.path()
    }

    /// The server's version.
    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// Whether an ack of JetStream means that the message is on disk.
    pub fn syncs(&self) -> bool {
        self.settings.sync
    }

    /// The name of the server in its cluster, if it is a member of one.
    pub fn name(&self) -> Option<&str> {
        self.settings.cluster.as_ref().map(|member| member.name.as_str())
    }

    /// The URL of its monitoring port, if it is a member of a cluster.
    pub fn monitor_url(&self) -> Option<String> {
        self.settings.cluster.as_ref().map(|member| format!("http://127.0.0.1:{}", member.monitor_port))
    }

    /// Resolves when the server ends for any reason. Cancel-safe.
    ///
    /// # Errors
    /// The system cannot wait for it.
    pub async fn exited(&mut self) -> Result<ExitStatus, Error> {
        self.process.exited().await
    }

    /// Stops it gracefully; kills it after 15 s.
    ///
    /// # Errors
    /// The system cannot signal or wait.
    pub async fn stop(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[Signal::Term]).await
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// The system cannot signal or wait.
    pub async fn kill9(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[]).await
    }

    /// Stops it if it runs, and starts it with the same data, port and URL.
    ///
    /// # Errors
    /// As for [`LocalNats::start`]; and [`Error::Died`] when another process took the port in the meantime.
    pub async fn restart(&mut self) -> Result<(), Error> {
        self.stop().await?;
        self.process = launch(&self.program, &self.home, &self.settings, self.port).await?;
        Ok(())
    }

    /// Stops it if it runs, and starts it with an empty store, as after the loss of its disk.
    ///
    /// # Errors
    /// As for [`LocalNats::restart`]; the system cannot remove the store.
    pub async fn restart_empty(&mut self) -> Result<(), Error> {
        self.stop().await?;
        let store = self.home.join(STORE);
        std::fs::remove_dir_all(&store).during(|| format!("removing {}", store.display()))?;
        self.restart().await
    }

    /// Sends a signal, such as [`Signal::Stop`] to freeze it and [`Signal::Cont`] to resume it.
    ///
    /// # Errors
    /// The system cannot signal.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        self.process.signal(signal)
    }
}

impl Drop for LocalNats {
    fn drop(&mut self) {
        if self.process.is_watched() {
            self.home.leave_cleanup_to_watcher();
        }
    }
}

impl Authorization {
    /// The default users, under this password.
    pub(crate) fn with_password(password: String) -> Self {
        let config = default_accounts(&password);
        Self { config, environment: Vec::new(), user: USER.into(), password }
    }
}

/// The account of the services and the account of producers, as in `deploy/nats/accounts.conf`, but for all projects.
fn default_accounts(password: &str) -> String {
    format!(
        "accounts {{
  LEADRELAY {{
    jetstream: enabled
    users: [ {{ user: {USER}, password: \"{password}\" }} ]
    exports: [ {{ service: \"leads.intake.>\" }}, {{ stream: \"leads.evt.>\" }} ]
  }}
  PRODUCERS {{
    users: [ {{ user: {PRODUCER}, password: \"{password}\" }} ]
    imports: [
      {{ service: {{ account: LEADRELAY, subject: \"leads.intake.>\" }}, to: \"leads.cmd.>\" }}
      {{ stream: {{ account: LEADRELAY, subject: \"leads.evt.>\" }} }}
    ]
  }}
}}"
    )
}

async fn launch(program: &Path, home: &ServerDir, settings: &Settings, port: u16) -> Result<Process, Error> {
    let Settings { sync, authorization, tls, cluster } = settings;
    let sync = if *sync { "sync_interval: always" } else { "" };
    let quoted = |name: &str| format!("{:?}", home.join(name).display().to_string());
    let tls = tls.as_ref().map(|tls| {
        let file = |path: &Path| format!("{:?}", path.display().to_string());
        format!(
            "tls {{\n  cert_file: {}\n  key_file: {}\n  ca_file: {}\n  verify: {}\n}}\n",
            file(&tls.certificate),
            file(&tls.key),
            file(&tls.ca),
            tls.verify_clients
        )
    });
    let config = format!(
        "listen: \"127.0.0.1:{port}\"\n\
         max_payload: 4MB\n\
         pid_file: {pid_file}\n\
         {authorization}\n\
         jetstream {{\n  store_dir: {store}\n  {sync}\n}}\n\
         {tls}{cluster}",
        authorization = authorization.config,
        tls = tls.unwrap_or_default(),
        cluster = cluster.as_ref().map(ClusterMember::config).unwrap_or_default(),
        pid_file = quoted("nats.pid"),
        store = quoted(STORE),
    );
    home.write_private("nats.conf", &config)?;

    let mut command = std::process::Command::new(program);
    command.arg("-c").arg(home.join("nats.conf")).current_dir(home.path());
    command.envs(authorization.environment.iter().map(|(name, value)| (name, value)));
    let log = home.join("nats.log");
    let options = ChildOptions {
        name: "nats-server",
        log: &log,
        user: None,
        signals: if home.cleanup_dir().is_some() { &[] } else { &[Signal::Term] },
        grace_period: GRACE_PERIOD,
        cleanup_dir: home.cleanup_dir(),
    };
    let mut process = Process::spawn(&command, &options)?;
    // The password is unique to this directory, so another server on this port is not mistaken for ours.
    let log = process.log().clone();
    let probe = async || match connect(settings, port).await {
        Ok(_) => Probe::Ready,
        Err(_) if log.text().is_ok_and(|log| restores_streams(&log)) => Probe::Recovering,
        Err(_) => Probe::NotReady,
    };
    process.ready(START_DEADLINE, probe).await?;
    Ok(process)
}

/// Whether a server with this log restores its streams. It accepts no connections until then.
fn restores_streams(log: &str) -> bool {
    log.contains("Starting restore for stream") && !log.contains("Server is ready")
}

async fn connect(settings: &Settings, port: u16) -> Result<Client, ConnectError> {
    let Authorization { user, password, .. } = &settings.authorization;
    let mut options = ConnectOptions::with_user_and_password(user.clone(), password.clone());
    if let Some(tls) = &settings.tls {
        options = options.require_tls(true).add_root_certificates(tls.ca.clone());
        if tls.verify_clients {
            options = options.add_client_certificate(tls.certificate.clone(), tls.key.clone());
        }
    }
    options.connect(format!("nats://127.0.0.1:{port}")).await
}

/// Parses `nats-server --version`: `nats-server: v2.9.10`.
async fn version(program: &Path) -> Result<(u32, u32, u32), Error> {
    let what = format!("{} --version", program.display());
    let printed = run(Command::new(program).arg("--version"), &what).await?;
    parse_version(&printed).ok_or(Error::Command { command: what, output: printed })
}

fn parse_version(printed: &str) -> Option<(u32, u32, u32)> {
    let version = printed.trim().rsplit_once(' ')?.1.trim_start_matches('v');
    // A development build has a suffix: `2.12.0-dev`.
    let mut parts = version.split(['.', '-', '+']);
    let mut number = || parts.next()?.parse().ok();
    Some((number()?, number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::{parse_version, restores_streams};

    #[test]
    fn versions_of_releases_and_development_builds_are_parsed() {
        assert_eq!(parse_version("nats-server: v2.9.10\n"), Some((2, 9, 10)));
        assert_eq!(parse_version("nats-server: v2.12.0-dev"), Some((2, 12, 0)));
        assert_eq!(parse_version("nats-server"), None);
    }

    #[test]
    fn a_server_restores_its_streams_before_it_is_ready() {
        let mut log = "[1] [INF] Starting JetStream\n".to_owned();
        assert!(!restores_streams(&log));
        log += "[1] [INF]   Starting restore for stream 'LEADRELAY > LEAD_COMMANDS'\n";
        assert!(restores_streams(&log));
        log += "[1] [INF] Server is ready\n";
        assert!(!restores_streams(&log));
    }
}

//! A private Postgres.

mod standby;

use crate::{
    Say, Tls,
    error::{During, Error},
    process::{ChildOptions, Probe, Process, Signal, clear_leftover},
    programs::{self, run},
    quiet,
    server_dir::ServerDir,
    user::User,
};
use sqlx::{Connection, PgConnection};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Once,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, process::Command};

/// The database and its owner.
const NAME: &str = "leadrelay";

/// From start to the first answered query, without the time of a recovery after a crash. A server that is stopped
/// during recovery recovers from the same checkpoint at its next start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How long a start may take until a recovery is reported. A start after a clean stop takes a fraction of this time.
const RECOVERY_NOTICE: Duration = Duration::from_secs(3);

/// SQLSTATE `cannot_connect_now`: the server starts, recovers or stops.
const CANNOT_CONNECT_NOW: &str = "57P03";

/// How long a shutdown may take before the next, stronger signal. A shutdown writes all buffers to disk.
const GRACE_PERIOD: Duration = Duration::from_secs(30);

/// Options of a Postgres.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// Its directory, created if necessary; `None` for a temporary one.
    pub dir: Option<PathBuf>,
    /// Whether a commit waits for the disk. Without fsync, data survives crashes of processes, but not a power cut.
    pub fsync: bool,
    /// The preferred port. If it is not free: the port of the previous start, or any free port.
    pub port: Option<u16>,
    /// A directory for an initialized cluster, which temporary servers copy to start faster. The first server creates
    /// it. All copies have the same password.
    pub template: Option<PathBuf>,
    /// With TLS, unencrypted connections are rejected. By default there is no TLS.
    pub tls: Option<Tls>,
    /// Whether the server keeps the log that [`LocalPostgres::start_standby`] and [`LocalPostgres::rewind`] need.
    pub replication: bool,
}

impl PostgresOptions {
    /// Keeps its data in `dir`; survives power cuts.
    pub fn durable(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()), fsync: true, ..Self::default() }
    }

    /// A temporary server that leaves no files behind and does not wait for the disk.
    pub fn throwaway() -> Self {
        Self::default()
    }
}

/// A private Postgres on 127.0.0.1, with a database `leadrelay`.
///
/// It runs until this value is dropped, the process ends, or a method stops it.
#[derive(Debug)]
pub struct LocalPostgres {
    // Dropped in this order: the server first, then its temporary directory.
    process: Process,
    home: ServerDir,
    programs: PathBuf,
    settings: Settings,
    password: String,
    port: u16,
}

/// The settings that a server has at each start.
#[derive(Debug, Clone)]
struct Settings {
    fsync: bool,
    replication: bool,
    tls: Option<Tls>,
}

impl LocalPostgres {
    /// Starts the server and waits until it answers a query: about 1 s for a new directory, 0.1 s for an existing one.
    ///
    /// # Errors
    /// [`Error::Missing`] without postgres and initdb; [`Error::InUse`] when another process has the directory;
    /// [`Error::Died`] or [`Error::NotReady`] with its log when it does not start.
    pub async fn start(options: PostgresOptions, say: Say<'_>) -> Result<Self, Error> {
        let programs = programs::postgres()?;
        let data = options.dir.as_deref().unwrap_or(Path::new("")).join("data");
        let home = ServerDir::open(options.dir.as_deref(), User::for_postgres(&data)?, say)?;
        let data = home.join("data");
        if !data.exists() {
            match &options.template {
                Some(template) => copy_or_create(&programs, &home, template).await?,
                None => initialize(&programs, &home, options.fsync).await?,
            }
        }
        let mark = data.display().to_string();
        clear_leftover(&data.join("postmaster.pid"), &mark, &[Signal::Int, Signal::Quit], GRACE_PERIOD).await?;

        let password = home.secret("password")?;
        let settings = Settings { fsync: options.fsync, replication: options.replication, tls: options.tls };
        let launch = async |port| launch(&programs, &home, &settings, &password, port, say).await;
        let (process, port) = home.launch(options.port, launch).await?;
        Ok(Self { process, home, programs, settings, password, port })
    }

    /// `postgres://user:password@127.0.0.1:port/leadrelay`; with TLS, clients verify the certificate. The URL is stable
    /// for a directory and port.
    pub fn url(&self) -> String {
        url(self.settings.tls.as_ref(), &self.password, self.port)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's pid, also after it has ended.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The server's directory.
    pub fn dir(&self) -> &Path {
        self.home.path()
    }

    /// The path of another program of this Postgres, such as `pgbench` or `pg_dump`, which may not be installed.
    pub fn program(&self, name: &str) -> PathBuf {
        // `postgres` may be a link into the directory of the other programs.
        let postgres = self.programs.join("postgres");
        postgres.canonicalize().unwrap_or(postgres).with_file_name(name)
    }

    /// Resolves when the server ends for any reason. Cancel-safe.
    ///
    /// # Errors
    /// The system cannot wait for it.
    pub async fn exited(&mut self) -> Result<ExitStatus, Error> {
        self.process.exited().await
    }

    /// Disconnects all clients, writes all buffers to disk and stops; uses stronger signals after 30 s.
    ///
    /// # Errors
    /// The system cannot signal or wait.
    pub async fn stop(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[Signal::Int, Signal::Quit]).await
    }

    /// Stops it and its backends at once, as a crash would: without a checkpoint, so that the next start recovers.
    ///
    /// This is SIGQUIT, Postgres' "immediate" shutdown: after SIGKILL, the backends would keep running for a while.
    ///
    /// # Errors
    /// The system cannot signal or wait.
    pub async fn kill9(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[Signal::Quit]).await
    }

    /// Stops it if it runs, and starts it with the same data, port and URL.
    ///
    /// # Errors
    /// As for [`LocalPostgres::start`]; and [`Error::Died`] when another process took the port in the meantime.
    pub async fn restart(&mut self) -> Result<(), Error> {
        self.stop().await?;
        self.process = launch(&self.programs, &self.home, &self.settings, &self.password, self.port, &quiet).await?;
        Ok(())
    }

    /// Freezes or resumes the postmaster: new connections hang, existing ones keep working.
    ///
    /// # Errors
    /// The system cannot signal.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        self.process.signal(signal)
    }
}

impl Drop for LocalPostgres {
    fn drop(&mut self) {
        if self.process.is_watched() {
            self.home.leave_cleanup_to_watcher();
        }
    }
}

fn url(tls: Option<&Tls>, password: &str, port: u16) -> String {
    let tls = tls.map(|tls| format!("?sslmode=verify-full&sslrootcert={}", tls.ca.display()));
    format!("postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}{}", tls.unwrap_or_default())
}

async fn launch(
    programs: &Path,
    home: &ServerDir,
    settings: &Settings,
    password: &str,
    port: u16,
    say: Say<'_>,
) -> Result<Process, Error> {
    let tls = settings.tls.as_ref();
    let data = home.join("data");
    let mut command = std::process::Command::new(programs.join("postgres"));
    command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
    for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=100"] {
        command.args(["-c", setting]);
    }
    if settings.fsync {
        // At full speed the default of 1 GB fills within two minutes, and after each checkpoint Postgres writes every
        // page in full once more.
        command.args(["-c", "max_wal_size=4GB"]);
    } else {
        // Not `synchronous_commit=off`, which would lose commits in a crash of the server.
        for setting in ["fsync=off", "shared_buffers=32MB"] {
            command.args(["-c", setting]);
        }
    }
    if settings.replication {
        // The first setting is for a standby that was disconnected, the second for pg_rewind.
        command.args(["-c", "wal_keep_size=256MB", "-c", "wal_log_hints=on"]);
    } else if !settings.fsync {
        command.args(["-c", "full_page_writes=off"]);
    }
    if let Some(tls) = tls {
        // Copied, because Postgres rejects a key that others can read, and may run as another user.
        for (name, from) in [("server.crt", &tls.certificate), ("server.key", &tls.key)] {
            let text = fs::read_to_string(from).during(|| format!("reading {}", from.display()))?;
            home.write_private(name, &text)?;
        }
        home.write_private("hba.conf", "hostssl all all 127.0.0.1/32 scram-sha-256\n")?;
        let setting = |name: &str, file: &str| format!("{name}={}", home.join(file).display());
        for setting in [
            "ssl=on".to_owned(),
            setting("ssl_cert_file", "server.crt"),
            setting("ssl_key_file", "server.key"),
            setting("hba_file", "hba.conf"),
        ] {
            command.args(["-c", &setting]);
        }
    }
    // Messages in English, because this module searches them.
    command.env("LC_ALL", "C").current_dir(home.path());
    let log = home.join("postgres.log");
    let options = ChildOptions {
        name: "postgres",
        log: &log,
        user: home.user(),
        signals: if home.cleanup_dir().is_some() { &[Signal::Quit] } else { &[Signal::Int, Signal::Quit] },
        grace_period: GRACE_PERIOD,
        cleanup_dir: home.cleanup_dir(),
    };
    let mut process = Process::spawn(&command, &options)?;
    let url = url(tls, password, port);
    let (started, reported) = (Instant::now(), Once::new());
    let probe_and_report = async || {
        let found = probe(&url, &data).await;
        if found == Probe::Recovering && started.elapsed() > RECOVERY_NOTICE {
            reported.call_once(|| say("Postgres is recovering after a crash; the start waits for it"));
        }
        found
    };
    process.ready(START_DEADLINE, probe_and_report).await?;
    Ok(process)
}

/// Whether a server with this data directory answers: another server may have taken the port.
async fn probe(url: &str, data: &Path) -> Probe {
    let mut connection = match PgConnection::connect(url).await {
        Ok(connection) => connection,
        // A standby recovers for as long as it is one, and may never be able to answer.
        Err(e) if cannot_connect_now(&e) && !data.join("standby.signal").exists() => return Probe::Recovering,
        Err(_) => return Probe::NotReady,
    };
    let serving: Result<String, _> =
        sqlx::query_scalar("select current_setting('data_directory')").fetch_one(&mut connection).await;
    connection.close().await.ok();
    serving.is_ok_and(|serving| Path::new(&serving) == data).into()
}

fn cannot_connect_now(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some(CANNOT_CONNECT_NOW))
}

/// Drops the databases that no client uses. In single-user mode a statement ends with its line.
const DROP_UNUSED: &str = "update pg_database set datistemplate = false where datname = 'template0';
drop database template0;
drop database postgres;
";

/// Creates the cluster and its database. The directory is renamed into place at the end, so it is never incomplete.
async fn initialize(programs: &Path, home: &ServerDir, fsync: bool) -> Result<(), Error> {
    home.secret("password")?;
    let fresh = home.join("data.new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).during(|| format!("removing {}", fresh.display()))?;
    }
    let mut initdb = as_user(&programs.join("initdb"), home);
    initdb.arg("-D").arg(&fresh).args(["-U", NAME, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
    initdb.arg("--pwfile").arg(home.join("password"));
    if !fsync {
        // Small WAL segments are faster to create and to copy.
        initdb.args(["--no-sync", "--wal-segsize=1"]);
    }
    run(&mut initdb, "initdb").await?;

    let mut single = as_user(&programs.join("postgres"), home);
    single.arg("--single").arg("-D").arg(&fresh);
    if !fsync {
        single.args(["-c", "fsync=off"]);
    }
    single.arg("template1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let create = format!("create database {NAME};\n");
    // Each dropped database leaves a quarter less to copy.
    let statements = if fsync { create } else { DROP_UNUSED.to_owned() + &create };
    let creating = || "creating the database".to_owned();
    let mut child = single.spawn().during(creating)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(statements.as_bytes()).await.during(creating)?;
    }
    let output = child.wait_with_output().await.during(creating)?;
    // In single-user mode, a failed statement does not change the exit status.
    let printed = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || printed.contains("ERROR:") {
        return Err(Error::Command { command: "postgres --single".to_owned(), output: printed.trim().to_owned() });
    }
    let data = home.join("data");
    fs::rename(&fresh, &data).during(|| format!("renaming {}", fresh.display()))
}

/// Copies the template into a new directory, or creates the template first.
async fn copy_or_create(programs: &Path, home: &ServerDir, template: &Path) -> Result<(), Error> {
    let version = run(Command::new(programs.join("postgres")).arg("--version"), "postgres --version").await?;
    let template = template.join(version.trim().replace([' ', '/'], "-"));
    if template.join("data").exists() {
        copy(&template, home.path()).await?;
        // Another user may have created the template.
        return match home.user() {
            Some(user) => {
                run(Command::new("chown").arg("-R").arg(format!("{}:{}", user.uid, user.gid)).arg(home.path()), "chown")
                    .await
                    .map(drop)
            }
            None => Ok(()),
        };
    }
    initialize(programs, home, false).await?;
    if let Some(parent) = template.parent() {
        fs::create_dir_all(parent).during(|| format!("creating {}", parent.display()))?;
        let draft = tempfile::tempdir_in(parent).during(|| format!("creating a directory in {}", parent.display()))?;
        copy(home.path(), draft.path()).await?;
        // If another process was faster, its template is used.
        if fs::rename(draft.path(), &template).is_ok() {
            let _ = draft.keep();
        }
    }
    Ok(())
}

async fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let mut cp = Command::new("cp");
    cp.arg("-pR").arg(from.join("data")).arg(from.join("password")).arg(to);
    run(&mut cp, "cp").await.map(drop)
}

fn as_user(program: &Path, home: &ServerDir) -> Command {
    let mut command = std::process::Command::new(program);
    command.env("LC_ALL", "C").current_dir(home.path()).stdin(Stdio::null());
    if let Some(user) = home.user() {
        user.apply(&mut command);
    }
    let mut command = Command::from(command);
    command.kill_on_drop(true);
    command
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn a_server_that_accepts_no_connections_yet_is_recovering_unless_it_is_a_standby() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://u:p@{}/d?sslmode=disable", listener.local_addr().unwrap());
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let _startup_message = client.read(&mut [0; 1024]).await.unwrap();
                let fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";
                let length = (fields.len() as u32 + 4).to_be_bytes();
                client.write_all(&[&b"E"[..], &length, fields].concat()).await.unwrap();
            }
        });
        let data = tempfile::tempdir().unwrap();

        assert_eq!(probe(&url, data.path()).await, Probe::Recovering);
        fs::write(data.path().join("standby.signal"), "").unwrap();
        assert_eq!(probe(&url, data.path()).await, Probe::NotReady);
    }
}

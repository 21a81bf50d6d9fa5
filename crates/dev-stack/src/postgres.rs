//! A private Postgres.

use crate::{
    Say, Tls,
    error::{During, Error},
    home::Home,
    port,
    process::{Keep, Process, Signal, clear_leftover},
    programs::{self, run},
    user::User,
};
use sqlx::{Connection, PgConnection};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{io::AsyncWriteExt, process::Command};

/// The database, and the role that owns it.
const NAME: &str = "leadrelay";

/// From start to the first answered query. Recovery after a crash is in it.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How long a shutdown may take before the next, harsher signal. A shutdown writes all that is in memory to disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ports tried before giving up, when others keep taking them first.
const PORT_ATTEMPTS: usize = 5;

/// What kind of Postgres to start.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// The directory it lives in, made if need be; `None` is a throw-away.
    pub dir: Option<PathBuf>,
    /// Whether a commit waits for the disk. Without, data survives the death of every process, but no power cut.
    pub fsync: bool,
    /// The port to take if it is free; else, and by default, the one of last time if it is free, else any.
    pub port: Option<u16>,
    /// A directory for a ready-made cluster, which saves a throw-away most of its start: made by the first, copied by
    /// the others. All of them have one password.
    pub template: Option<PathBuf>,
    /// TLS, and nothing else. By default nothing is encrypted.
    pub tls: Option<Tls>,
}

impl PostgresOptions {
    /// One that keeps its data in `dir`, safe against power cuts.
    pub fn durable(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()), fsync: true, ..Self::default() }
    }

    /// One that leaves nothing behind and never waits for the disk.
    #[must_use]
    pub fn throwaway() -> Self {
        Self::default()
    }
}

/// A Postgres of one's own on 127.0.0.1, with a database `leadrelay`.
///
/// It runs until this value is dropped, the process ends, or one of the methods ends it.
#[derive(Debug)]
pub struct LocalPostgres {
    // In this order: a throw-away's directory goes after its server.
    process: Process,
    home: Home,
    programs: PathBuf,
    fsync: bool,
    tls: Option<Tls>,
    password: String,
    port: u16,
}

impl LocalPostgres {
    /// Starts it and waits until it answers a query: about a second for a new directory, a tenth for a known one.
    ///
    /// # Errors
    /// [`Error::Missing`] without postgres and initdb; [`Error::InUse`] when another process has the directory;
    /// [`Error::Died`] or [`Error::NotReady`] with its log when it does not start.
    pub async fn start(options: PostgresOptions, say: Say<'_>) -> Result<Self, Error> {
        let programs = programs::postgres()?;
        let data = options.dir.as_deref().unwrap_or(Path::new("")).join("data");
        let home = Home::open(options.dir.as_deref(), User::for_postgres(&data)?, say)?;
        let data = home.join("data");
        if !data.exists() {
            match &options.template {
                Some(template) => copy_or_make(&programs, &home, template).await?,
                None => initialise(&programs, &home, options.fsync).await?,
            }
        }
        let mark = data.display().to_string();
        clear_leftover(&data.join("postmaster.pid"), &mark, &[Signal::Int, Signal::Quit], PATIENCE).await?;

        let password = home.secret("password")?;
        let mut wanted = [options.port, home.last_port()].into_iter().flatten().find(|port| port::is_free(*port));
        let mut attempt = 1;
        let (process, port) = loop {
            let port = match wanted.take() {
                Some(port) => port,
                None => port::free().during(|| "looking for a free port".to_owned())?,
            };
            match launch(&programs, &home, options.fsync, options.tls.as_ref(), &password, port).await {
                Ok(process) => break (process, port),
                Err(Error::Died { log, .. }) if port_was_taken(&log) && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        };
        home.keep_port(port)?;
        Ok(Self { process, home, programs, fsync: options.fsync, tls: options.tls, password, port })
    }

    /// `postgres://user:password@127.0.0.1:port/leadrelay`, with TLS and the server's certificate verified where it has
    /// one: the same for as long as directory and port are.
    #[must_use]
    pub fn url(&self) -> String {
        url(self.tls.as_ref(), &self.password, self.port)
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's pid; after its end, the one it had.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The directory it lives in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.home.path()
    }

    /// Where another program of this Postgres is, such as `pgbench` or `pg_dump`. It may not be installed.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        // `postgres` may be a link out of a directory that has it alone.
        let postgres = self.programs.join("postgres");
        postgres.canonicalize().unwrap_or(postgres).with_file_name(name)
    }

    /// Resolves when the server ends, whoever ended it. May be dropped and called again.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub async fn exited(&mut self) -> Result<ExitStatus, Error> {
        self.process.exited().await
    }

    /// Disconnects everybody, writes everything to disk and ends. Harsher after 30 s.
    ///
    /// # Errors
    /// When the system refuses to signal or to wait.
    pub async fn stop(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[Signal::Int, Signal::Quit]).await
    }

    /// Ends it and all its backends at once, as a crash would: no checkpoint, nothing said to clients, and the next
    /// start recovers.
    ///
    /// This is SIGQUIT, Postgres' own "immediate" end: SIGKILL would leave its backends to find out for themselves.
    ///
    /// # Errors
    /// When the system refuses to signal or to wait.
    pub async fn kill9(&mut self) -> Result<ExitStatus, Error> {
        self.process.stop(&[Signal::Quit]).await
    }

    /// Starts it again on the same data, port and URL, after it ended or was ended.
    ///
    /// # Errors
    /// As for [`LocalPostgres::start`]; and [`Error::Died`] when somebody took the port in the meantime.
    pub async fn restart(&mut self) -> Result<(), Error> {
        self.stop().await?;
        self.process =
            launch(&self.programs, &self.home, self.fsync, self.tls.as_ref(), &self.password, self.port).await?;
        Ok(())
    }

    /// Freezes the postmaster or lets it go on: new connections hang, those there are work on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        self.process.signal(signal)
    }
}

impl Drop for LocalPostgres {
    fn drop(&mut self) {
        if self.process.is_watched() {
            self.home.leave_to_watcher();
        }
    }
}

fn url(tls: Option<&Tls>, password: &str, port: u16) -> String {
    let tls = tls.map(|tls| format!("?sslmode=verify-full&sslrootcert={}", tls.ca.display()));
    format!("postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}{}", tls.unwrap_or_default())
}

pub(crate) fn port_was_taken(log: &str) -> bool {
    log.to_lowercase().contains("address already in use")
}

async fn launch(
    programs: &Path,
    home: &Home,
    fsync: bool,
    tls: Option<&Tls>,
    password: &str,
    port: u16,
) -> Result<Process, Error> {
    let data = home.join("data");
    let mut command = std::process::Command::new(programs.join("postgres"));
    command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
    for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=100"] {
        command.args(["-c", setting]);
    }
    if fsync {
        // Updates at full speed write the default of a gigabyte within a minute or two, and each checkpoint has every page written
        // whole once more.
        command.args(["-c", "max_wal_size=4GB"]);
    } else {
        // Not `synchronous_commit=off`: that would lose what was committed when the server dies.
        for setting in ["fsync=off", "full_page_writes=off", "shared_buffers=32MB"] {
            command.args(["-c", setting]);
        }
    }
    if let Some(tls) = tls {
        // Copied: Postgres takes no key that others can read, and may run as another user.
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
    // Messages in English: they are searched for.
    command.env("LC_ALL", "C").current_dir(home.path());
    let log = home.join("postgres.log");
    let keep = Keep {
        name: "postgres",
        log: &log,
        user: home.user(),
        signals: if home.litter().is_some() { &[Signal::Quit] } else { &[Signal::Int, Signal::Quit] },
        patience: PATIENCE,
        litter: home.litter(),
    };
    let mut process = Process::spawn(&command, &keep)?;
    let url = url(tls, password, port);
    let data = data.display().to_string();
    process.ready(START_DEADLINE, async || answers(&url, &data).await).await?;
    Ok(process)
}

/// Whether the server of this very data directory answers: a port may have become another's.
async fn answers(url: &str, data: &str) -> bool {
    let Ok(mut connection) = PgConnection::connect(url).await else { return false };
    let serving: Result<String, _> =
        sqlx::query_scalar("select current_setting('data_directory')").fetch_one(&mut connection).await;
    connection.close().await.ok();
    serving.is_ok_and(|serving| serving == data)
}

/// Makes the cluster and its database. Renamed into place at the end, so that there is a whole one or none.
async fn initialise(programs: &Path, home: &Home, fsync: bool) -> Result<(), Error> {
    home.secret("password")?;
    let fresh = home.join("data.new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).during(|| format!("removing {}", fresh.display()))?;
    }
    let mut initdb = as_user(&programs.join("initdb"), home);
    initdb.arg("-D").arg(&fresh).args(["-U", NAME, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
    initdb.arg("--pwfile").arg(home.join("password"));
    if !fsync {
        // A throw-away has little to log, and a small log is quickly made and copied.
        initdb.args(["--no-sync", "--wal-segsize=1"]);
    }
    run(&mut initdb, "initdb").await?;

    let mut single = as_user(&programs.join("postgres"), home);
    single.arg("--single").arg("-D").arg(&fresh);
    if !fsync {
        single.args(["-c", "fsync=off"]);
    }
    single.arg("postgres").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let creating = || "creating the database".to_owned();
    let mut child = single.spawn().during(creating)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(format!("create database {NAME};\n").as_bytes()).await.during(creating)?;
    }
    let output = child.wait_with_output().await.during(creating)?;
    // In this mode an error of the statement does not show in the exit status.
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || said.contains("ERROR:") {
        return Err(Error::Command { command: "postgres --single".to_owned(), output: said.trim().to_owned() });
    }
    let data = home.join("data");
    fs::rename(&fresh, &data).during(|| format!("renaming {}", fresh.display()))
}

/// Fills a fresh home from the template, or makes the template on the way.
async fn copy_or_make(programs: &Path, home: &Home, template: &Path) -> Result<(), Error> {
    let version = run(Command::new(programs.join("postgres")).arg("--version"), "postgres --version").await?;
    let template = template.join(version.trim().replace([' ', '/'], "-"));
    if template.join("data").exists() {
        copy(&template, home.path()).await?;
        // The template may have been made by another user.
        return match home.user() {
            Some(user) => {
                run(Command::new("chown").arg("-R").arg(format!("{}:{}", user.uid, user.gid)).arg(home.path()), "chown")
                    .await
                    .map(drop)
            }
            None => Ok(()),
        };
    }
    initialise(programs, home, false).await?;
    if let Some(parent) = template.parent() {
        fs::create_dir_all(parent).during(|| format!("creating {}", parent.display()))?;
        let draft = tempfile::tempdir_in(parent).during(|| format!("creating a directory in {}", parent.display()))?;
        copy(home.path(), draft.path()).await?;
        // When another process was faster, its template is as good.
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

fn as_user(program: &Path, home: &Home) -> Command {
    let mut command = std::process::Command::new(program);
    command.env("LC_ALL", "C").current_dir(home.path()).stdin(Stdio::null());
    if let Some(user) = home.user() {
        user.apply(&mut command);
    }
    let mut command = Command::from(command);
    command.kill_on_drop(true);
    command
}

//! Real servers: their data survives restarts, and no server outlives its owner.
#![expect(clippy::unwrap_used, reason = "clippy sees no test in the functions that tests share")]

use dev_stack::{
    Error, LocalNats, LocalPostgres, NatsOptions, PostgresOptions, port,
    process::{ChildOptions, Process, Signal},
    quiet,
};
use sqlx::{Connection, PgConnection};
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

fn postgres_in(dir: &Path) -> PostgresOptions {
    PostgresOptions { dir: Some(dir.to_owned()), ..PostgresOptions::throwaway() }
}

/// A directory that Postgres' user can reach even if root created it.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

async fn execute(url: &str, statement: &'static str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(statement).execute(&mut connection).await.unwrap();
}

async fn notes(url: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("select text from notes order by text").fetch_all(&mut connection).await.unwrap()
}

/// State, parent and process group of a process, from `/proc/PID/stat`.
fn stat(pid: u32) -> Option<(char, u32, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn runs(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, ..)| state != 'Z')
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts the example `owner`; returns it with the pid and directory of each server.
fn owner(dir: Option<&Path>) -> (std::process::Child, Vec<(u32, PathBuf)>) {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().with_file_name("examples").join("owner");
    let mut owner = Command::new(program).args(dir).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines().take(2);
    let servers: Vec<_> = lines
        .map(|line| {
            let line = line.unwrap();
            let (pid, dir) = line.split_once(' ').unwrap();
            (pid.parse().unwrap(), PathBuf::from(dir))
        })
        .collect();
    assert_eq!(servers.len(), 2, "the owner did not start its servers");
    (owner, servers)
}

#[tokio::test]
async fn postgres_keeps_data_and_url_through_a_crash_and_a_new_owner() {
    let dir = open_dir();
    let options = postgres_in(&dir.path().join("postgres"));
    let mut postgres = LocalPostgres::start(options.clone(), &quiet).await.unwrap();
    let (url, pid) = (postgres.url(), postgres.pid());
    execute(&url, "create table notes (text text); insert into notes values ('kept')").await;

    let busy = LocalPostgres::start(options.clone(), &quiet).await.unwrap_err();
    assert!(matches!(busy, Error::InUse(_)), "{busy}");

    postgres.kill9().await.unwrap();
    assert!(!runs(pid));
    assert!(PgConnection::connect(&url).await.is_err());
    postgres.restart().await.unwrap();
    assert_eq!((notes(&url).await, postgres.url()), (vec!["kept".to_owned()], url.clone()));

    drop(postgres);
    let mut postgres = LocalPostgres::start(options, &quiet).await.unwrap();
    assert_eq!((notes(&url).await, postgres.url()), (vec!["kept".to_owned()], url));
    assert!(postgres.stop().await.unwrap().success());
}

#[tokio::test]
async fn nats_keeps_streams_and_url_through_a_crash_and_a_new_owner() {
    let dir = tempfile::tempdir().unwrap();
    let options = NatsOptions { port: Some(port::free().unwrap()), ..NatsOptions::durable(dir.path().join("nats")) };
    let mut nats = LocalNats::start(options.clone(), &quiet).await.unwrap();
    assert_eq!(Some(nats.port()), options.port);
    assert_eq!(nats.syncs(), nats.version() >= (2, 10, 0));
    let url = nats.url();
    let messages = async |nats: &LocalNats| {
        let context = async_nats::jetstream::new(nats.connect().await.unwrap());
        context.get_stream("NOTES").await.unwrap().cached_info().state.messages
    };

    let context = async_nats::jetstream::new(nats.connect().await.unwrap());
    let stream = async_nats::jetstream::stream::Config {
        name: "NOTES".to_owned(),
        subjects: vec!["notes".to_owned()],
        ..Default::default()
    };
    context.create_stream(stream).await.unwrap();
    context.publish("notes", "kept".into()).await.unwrap().await.unwrap();

    nats.kill9().await.unwrap();
    assert!(!runs(nats.pid()));
    nats.restart().await.unwrap();
    assert_eq!((messages(&nats).await, nats.url()), (1, url.clone()));

    drop(nats);
    let mut nats = LocalNats::start(NatsOptions { port: None, ..options }, &quiet).await.unwrap();
    assert_eq!((messages(&nats).await, nats.url()), (1, url.clone()));
    nats.stop().await.unwrap();
}

#[tokio::test]
async fn temporary_servers_leave_no_files_behind() {
    let template = tempfile::tempdir().unwrap();
    let options = PostgresOptions { template: Some(template.path().join("template")), ..PostgresOptions::throwaway() };
    let made = LocalPostgres::start(options.clone(), &quiet).await.unwrap();
    let copied = LocalPostgres::start(options, &quiet).await.unwrap();
    let nats = LocalNats::start(NatsOptions::throwaway(), &quiet).await.unwrap();
    execute(&made.url(), "create table notes (text text)").await;
    execute(&copied.url(), "create table notes (text text)").await;

    let mut traces = vec![(made.pid(), made.dir().to_owned()), (copied.pid(), copied.dir().to_owned())];
    traces.push((nats.pid(), nats.dir().to_owned()));
    drop((made, copied, nats));
    until("servers and directories are gone", || traces.iter().all(|(pid, dir)| !runs(*pid) && !dir.exists()));

    let mut ended = LocalNats::start(NatsOptions::throwaway(), &quiet).await.unwrap();
    ended.stop().await.unwrap();
    let dir = ended.dir().to_owned();
    assert!(dir.exists(), "a stopped temporary server can be started again");
    drop(ended);
    assert!(!dir.exists());
}

#[test]
fn servers_and_temporary_directories_are_removed_after_the_owner_is_killed() {
    let (mut owner, servers) = owner(None);
    for (pid, dir) in &servers {
        assert!(runs(*pid) && dir.exists());
        assert_eq!(stat(*pid).unwrap().2, *pid, "a Ctrl-C in the terminal would reach the server");
    }
    owner.kill().unwrap();
    owner.wait().unwrap();
    until("servers and directories are gone", || servers.iter().all(|(pid, dir)| !runs(*pid) && !dir.exists()));
}

#[tokio::test]
async fn servers_left_by_an_owner_killed_with_its_watchers_are_stopped() {
    let dir = open_dir();
    let (mut owner, servers) = owner(Some(dir.path()));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let watches = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sh")
            && stat(pid).is_some_and(|(.., group)| servers.iter().any(|(server, _)| *server == group));
        if watches {
            Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        }
    }
    owner.kill().unwrap();
    owner.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(servers.iter().all(|(pid, _)| runs(*pid)), "the test did not leave leftovers");

    let mut postgres = LocalPostgres::start(postgres_in(&dir.path().join("postgres")), &quiet).await.unwrap();
    let nats = NatsOptions { dir: Some(dir.path().join("nats")), ..NatsOptions::throwaway() };
    let mut nats = LocalNats::start(nats, &quiet).await.unwrap();
    assert!(servers.iter().all(|(pid, _)| !runs(*pid)));
    postgres.stop().await.unwrap();
    nats.stop().await.unwrap();

    // A stale pid file whose pid belongs to another process: that process is left alone.
    let mut other = Command::new("sleep").arg("60").spawn().unwrap();
    let pid_file = dir.path().join("postgres/data/postmaster.pid");
    fs::write(&pid_file, format!("{}\n", other.id())).unwrap();
    drop(postgres);
    let mut postgres = LocalPostgres::start(postgres_in(&dir.path().join("postgres")), &quiet).await.unwrap();
    assert!(runs(other.id()));
    other.kill().unwrap();
    other.wait().unwrap();
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_directory_that_postgres_cannot_reach_is_replaced_by_a_link() {
    // Root's temporary directories are closed to other users. As another user, the directory stays reachable.
    let closed = tempfile::tempdir().unwrap();
    let dir = closed.path().join("postgres");
    let messages = Mutex::new(Vec::new());
    let say = |line: &str| messages.lock().unwrap().push(line.to_owned());
    let mut postgres = LocalPostgres::start(postgres_in(&dir), &say).await.unwrap();
    postgres.stop().await.unwrap();
    assert_eq!(dir.is_symlink(), !messages.lock().unwrap().is_empty());
    let (url, place) = (postgres.url(), postgres.dir().to_owned());
    drop(postgres);
    let mut postgres = LocalPostgres::start(postgres_in(&dir), &say).await.unwrap();
    assert_eq!((postgres.url(), postgres.dir()), (url, &*place));
    assert!(messages.lock().unwrap().len() <= 1, "{messages:?}");
    postgres.stop().await.unwrap();
    drop(postgres);
    fs::remove_dir_all(place).unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_start_shows_its_log() {
    let dir = open_dir();
    fs::create_dir_all(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/PG_VERSION"), "1\n").unwrap();
    let error = LocalPostgres::start(postgres_in(dir.path()), &quiet).await.unwrap_err();
    assert!(matches!(&error, Error::Died { log, .. } if log.contains("postgres:") || log.contains("FATAL")), "{error}");
}

#[tokio::test]
async fn a_process_reports_its_status_and_is_stopped_by_signals() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let options = ChildOptions {
        name: "a shell",
        log: &log,
        user: None,
        signals: &[Signal::Term],
        grace_period: Duration::from_millis(500),
        cleanup_dir: None,
    };
    let spawn = |script: &str| Process::spawn(Command::new("sh").args(["-c", script]), &options).unwrap();

    let error = spawn("echo out; echo err >&2; exit 3").ready(Duration::from_secs(5), async || false).await;
    match error.unwrap_err() {
        Error::Died { status, log, .. } => assert_eq!((status.code(), &*log), (Some(3), "out\nerr")),
        error => panic!("{error}"),
    }

    let mut slow = spawn("echo slow; exec sleep 60");
    let error = slow.ready(Duration::from_millis(200), async || false).await.unwrap_err();
    assert!(matches!(&error, Error::NotReady { log, .. } if log == "slow"), "{error}");
    slow.signal(Signal::Stop).unwrap();
    until("it is frozen", || stat(slow.pid()).unwrap().0 == 'T');
    slow.signal(Signal::Cont).unwrap();
    until("it goes on", || stat(slow.pid()).unwrap().0 != 'T');
    assert_eq!(slow.stop(&[Signal::Term]).await.unwrap().to_string(), "signal: 15 (SIGTERM)");

    let mut ignoring = spawn("trap '' TERM; echo ready; while :; do sleep 0.05; done");
    until("it ignores SIGTERM", || ignoring.log().tail().contains("ready"));
    assert_eq!(ignoring.stop(&[Signal::Term]).await.unwrap().to_string(), "signal: 9 (SIGKILL)");

    let dropped = spawn("trap '' TERM; echo ready; while :; do sleep 0.05; done");
    until("it ignores SIGTERM", || dropped.log().tail().contains("ready"));
    let pid = dropped.pid();
    drop(dropped);
    until("the watcher has killed it", || !runs(pid));
}

//! Servers and services, each test with its own.
#![expect(clippy::unwrap_used, reason = "clippy sees no test in the functions that tests share")]

use sqlx::{Connection, PgConnection};
use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use test_support::{Service, binary, eventually, free_port, http_client, nats, postgres};

const TEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The example `listen`, and its URL.
fn listen() -> (Service, String) {
    let port = free_port();
    let tests = std::env::current_exe().unwrap();
    let mut command = Command::new(tests.parent().unwrap().with_file_name("examples").join("listen"));
    command.arg(port.to_string());
    (Service::spawn("listen", command), format!("http://127.0.0.1:{port}/"))
}

async fn is_up(url: &str) -> bool {
    http_client().get(url).timeout(Duration::from_millis(300)).send().await.is_ok()
}

#[tokio::test]
async fn a_service_is_frozen_killed_and_restarted() {
    let (mut service, url) = listen();
    service.wait_for_http(&url, TEST_TIMEOUT).await;
    let line = service.wait_for_log("listening on ", TEST_TIMEOUT).await;
    assert!(url.contains(line.strip_prefix("listening on ").unwrap()), "{line}");

    service.freeze();
    assert!(!is_up(&url).await);
    service.thaw();
    assert!(is_up(&url).await);

    service.kill9().await;
    assert!(!is_up(&url).await);
    let first = service.pid();
    service.restart().await;
    assert_ne!(service.pid(), first);
    service.wait_for_http(&url, TEST_TIMEOUT).await;
    assert_eq!(service.log().lines().count(), 1, "only the output since the restart");
    assert_eq!(service.terminate().await.to_string(), "signal: 15 (SIGTERM)");

    service.restart().await;
    service.wait_for_http(&url, TEST_TIMEOUT).await;
    let pid = service.pid();
    drop(service);
    eventually(TEST_TIMEOUT, "it ends when dropped", async || !is_up(&url).await).await;
    eventually(TEST_TIMEOUT, "it is reaped", async || !Path::new(&format!("/proc/{pid}")).exists()).await;
}

#[tokio::test]
#[should_panic(expected = "no good ended before it was ready (exit status: 4); its log ends with:\nmissing a setting")]
async fn a_service_that_ends_early_panics_with_its_log() {
    let mut command = Command::new("sh");
    command.args(["-c", "echo missing a setting >&2; exit 4"]);
    Service::spawn("no good", command).wait_for_http("http://127.0.0.1:1/", TEST_TIMEOUT).await;
}

#[tokio::test]
async fn servers_are_independent() {
    let start = Instant::now();
    let (one, other, nats) = tokio::join!(postgres(), postgres(), nats());
    for postgres in [&one, &other] {
        let mut connection = PgConnection::connect(&postgres.url()).await.unwrap();
        sqlx::raw_sql("create table notes (text text)").execute(&mut connection).await.unwrap();
    }
    let client = nats.connect().await.unwrap();
    assert_eq!(client.server_info().max_payload, 4 << 20);
    let stream = async_nats::jetstream::stream::Config { name: "NOTES".to_owned(), ..Default::default() };
    async_nats::jetstream::new(client).create_stream(stream).await.unwrap();
    assert!(start.elapsed() < TEST_TIMEOUT);
}

#[tokio::test]
async fn binaries_are_built_from_this_workspace() {
    let mut with_postgres = Command::new(binary("with-postgres"));
    with_postgres.args(["--", "sh", "-c", "echo $DATABASE_URL; exit 5"]);
    let mut service = Service::spawn("with-postgres", with_postgres);
    assert_eq!(service.exited().await.code(), Some(5), "{}", service.log());
    assert!(service.log().starts_with("postgres://leadrelay:"), "{}", service.log());
}

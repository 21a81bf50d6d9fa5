//! TLS to NATS, with certificates on both sides; TLS to Postgres; and TLS between clients and the gateway.

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::CertificateDer;
use service_kit::config::NatsConfig;
use sqlx::{Connection, PgConnection};
use test_support::{
    LocalNats, LocalPostgres, NatsOptions, PostgresOptions, Tls, binary, eventually, nats_with, postgres_with,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::Command,
    time::timeout,
};

use crate::support::{Ca, LeadctlRun, Stack, TEST_TIMEOUT, assert_main_job, service, written};

fn text(path: &Path) -> String {
    path.display().to_string()
}

async fn servers(tls: &Tls) -> (LocalNats, LocalPostgres) {
    let nats = nats_with(NatsOptions { tls: Some(tls.clone()), ..NatsOptions::throwaway() });
    let postgres = postgres_with(PostgresOptions { tls: Some(tls.clone()), ..PostgresOptions::throwaway() });
    tokio::join!(nats, postgres)
}

/// Servers with certificates of a new authority in a directory, and another authority.
struct Certified {
    dir: tempfile::TempDir,
    tls: Tls,
    /// The certificate of the other authority.
    stranger: PathBuf,
    nats: LocalNats,
    postgres: LocalPostgres,
}

impl Certified {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name, content: &str| written(dir.path(), name, content);
        let authority = Ca::new("ca");
        let server = authority.certify("127.0.0.1", 2040);
        let (certificate, key) = (write("server.crt", &server.certificate), write("server.key", &server.key));
        let tls = Tls { certificate, key, ca: write("ca.pem", &authority.pem), verify_clients: true };
        let stranger = write("stranger.pem", &Ca::new("stranger").pem);
        let (nats, postgres) = servers(&tls).await;
        Self { dir, tls, stranger, nats, postgres }
    }
}

#[tokio::test]
async fn the_main_job_works_over_tls() {
    let Certified { dir: _dir, tls, nats, postgres, .. } = Certified::start().await;
    assert!(nats.url().starts_with("tls://") && postgres.url().contains("sslmode=verify-full"));
    let operator = NatsConfig {
        nats_ca: Some(tls.ca.clone()),
        nats_cert: Some(tls.certificate.clone()),
        nats_key: Some(tls.key.clone()),
        ..NatsConfig::at(nats.url())
    };
    let files = [("NATS_CA", &tls.ca), ("NATS_CERT", &tls.certificate), ("NATS_KEY", &tls.key)];
    let files = files.map(|(name, file)| (name.to_owned(), text(file)));

    let stack = Stack::start_on(nats, postgres, &operator, |_| files.to_vec()).await;

    assert_main_job(&stack).await;
    let in_clear =
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL AND NOT ssl";
    assert_eq!(stack.count(in_clear).await, 0, "connections to Postgres are encrypted");
    let project = stack.api.project_id.to_string();
    for args in [&["key", "list", "--project", &project][..], &["migrate"]] {
        let mut command = stack.leadctl_command(args);
        command.envs(files.iter().map(|(name, value)| (name, value)));
        LeadctlRun::of(command).await.assert_ok();
    }
}

#[tokio::test]
async fn an_unverified_nats_is_refused_with_the_reason() {
    let Certified { dir: _dir, tls, stranger, nats, postgres } = Certified::start().await;
    let (good, wrong, cert, key) = (text(&tls.ca), text(&stranger), text(&tls.certificate), text(&tls.key));

    // The first gateway has a CA that did not sign the server's certificate. The second has no client certificate,
    // which the server requires.
    for (extra, expected) in [
        (vec![("NATS_CA", wrong.as_str()), ("NATS_CERT", &cert), ("NATS_KEY", &key)], "UnknownIssuer"),
        (vec![("NATS_CA", good.as_str())], "ertificate"),
    ] {
        let (mut gateway, _) = service("gateway", &nats, &postgres, &extra);
        let line = gateway.wait_for_log("cannot connect to NATS", TEST_TIMEOUT).await;
        assert!(line.contains(expected), "{line}");
    }

    // NATS also rejects a client without TLS.
    let stream = TcpStream::connect(("127.0.0.1", nats.port())).await.expect("a connection");
    let mut lines = BufReader::new(stream);
    let mut answer = String::new();
    lines.read_line(&mut answer).await.expect("INFO");
    assert!(answer.contains("\"tls_required\":true"), "{answer}");
    lines.get_mut().write_all(b"CONNECT {}\r\nPING\r\n").await.expect("a write");
    answer.clear();
    while matches!(lines.read_line(&mut answer).await, Ok(read) if read > 0) {}
    assert!(!answer.contains("PONG"), "{answer}");
}

#[tokio::test]
async fn an_unverified_postgres_is_refused_with_the_reason() {
    let Certified { dir: _dir, tls, stranger, nats, postgres } = Certified::start().await;
    let (good, wrong, cert, key) = (text(&tls.ca), text(&stranger), text(&tls.certificate), text(&tls.key));
    let plain = postgres_with(PostgresOptions::throwaway()).await;
    let wrong_ca = postgres.url().replace(&good, &wrong);

    for (url, expected) in [
        (wrong_ca.clone(), "UnknownIssuer"),
        (postgres.url().replace("127.0.0.1", "localhost"), "not valid for name"),
        (format!("{}?sslmode=verify-full&sslrootcert={good}", plain.url()), "does not support TLS"),
        (postgres.url().replace("sslmode=verify-full", "sslmode=disable"), "no encryption"),
    ] {
        let refused = PgConnection::connect(&url).await.expect_err("refused").to_string();
        assert!(refused.contains(expected), "{refused}");
        let mut command = Command::new(binary("leadctl"));
        command.arg("migrate").env("DATABASE_URL", &url);
        LeadctlRun::of(command).await.assert_fails(expected);
    }
    let extra = [("DATABASE_URL", wrong_ca.as_str()), ("NATS_CA", &good), ("NATS_CERT", &cert), ("NATS_KEY", &key)];
    let (mut lead_state, _) = service("lead-state", &nats, &postgres, &extra);
    let line = lead_state.wait_for_log("cannot connect to Postgres", TEST_TIMEOUT).await;
    assert!(line.contains("UnknownIssuer"), "{line}");
}

/// Sends a request over TLS, trusting only this certificate. Returns the negotiated protocol and the status line.
fn request_over_tls(address: &str, trusted: &CertificateDer<'static>) -> Result<(Vec<u8>, String), String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connection = rustls::ClientConnection::new(Arc::new(config), "localhost".try_into().expect("a name"));
    let tcp = std::net::TcpStream::connect(address).map_err(|e| e.to_string())?;
    tcp.set_read_timeout(Some(TEST_TIMEOUT)).expect("a timeout");
    let mut stream = rustls::StreamOwned::new(connection.expect("a connection"), tcp);
    stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").map_err(|e| e.to_string())?;
    let mut status = vec![0; 12];
    stream.read_exact(&mut status).map_err(|e| e.to_string())?;
    let agreed = stream.conn.alpn_protocol().unwrap_or_default().to_vec();
    Ok((agreed, String::from_utf8_lossy(&status).into_owned()))
}

#[tokio::test]
async fn the_gateway_serves_tls_and_takes_a_renewed_certificate_without_a_restart() {
    let stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (chain, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let generate = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (first, renewed) = (generate(), generate());
    std::fs::write(&chain, first.cert.pem()).expect("written");
    std::fs::write(&key, first.signing_key.serialize_pem()).expect("written");
    let (chain_path, key_path) = (text(&chain), text(&key));
    let extra = [
        ("GATEWAY_TLS_CERT", chain_path.as_str()),
        ("GATEWAY_TLS_KEY", key_path.as_str()),
        ("GATEWAY_HEADER_TIMEOUT", "1s"),
    ];
    let (mut gateway, api) = stack.second_gateway(&extra).await;
    let address = api.url.strip_prefix("http://").expect("http").to_owned();
    let request = |trusted: &CertificateDer<'static>| request_over_tls(&address, trusted);

    let answered = Ok((b"http/1.1".to_vec(), "HTTP/1.1 404".to_owned()));
    assert_eq!(request(first.cert.der()), answered);
    assert!(request(renewed.cert.der()).is_err_and(|e| e.contains("certificate")));
    // The gateway closes the connections of a client without a handshake, and of one that sends HTTP without TLS.
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let mut plain = TcpStream::connect(&address).await.expect("a connection");
        plain.write_all(bytes).await.expect("sent");
        let mut answer = Vec::new();
        let _ = timeout(TEST_TIMEOUT, plain.read_to_end(&mut answer)).await.expect("cut");
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }

    // A new certificate is not used while its key is missing, and is used once the key is there.
    std::fs::write(&chain, renewed.cert.pem()).expect("written");
    gateway.wait_for_log("keeping the current TLS certificate", TEST_TIMEOUT).await;
    assert_eq!(request(first.cert.der()), answered);
    std::fs::write(&key, renewed.signing_key.serialize_pem()).expect("written");
    eventually(TEST_TIMEOUT, "the renewed certificate is served", async || request(renewed.cert.der())).await;
    assert!(request(first.cert.der()).is_err());
}

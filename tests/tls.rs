//! TLS to NATS and Postgres, with certificates on both sides of NATS: it works, and it is checked.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use service_kit::config::NatsConfig;
use sqlx::{Connection, PgConnection};
use test_support::{LocalNats, LocalPostgres, NatsOptions, PostgresOptions, Tls, binary, nats_with, postgres_with};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::{
    main_job::main_job,
    stack::{SOON, Stack, service},
};

/// A CA of one's own.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

impl Ca {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new([]).expect("a certificate");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let file = dir.join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).expect("a certificate").pem()).expect("a file");
        Self { issuer: Issuer::new(params, key), file }
    }

    /// A certificate for this host, for servers and clients.
    fn certify(&self, dir: &Path, host: &str) -> Tls {
        let mut params = CertificateParams::new([host.to_owned()]).expect("a certificate");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let (certificate_file, key_file) = (dir.join(format!("{host}.crt")), dir.join(format!("{host}.key")));
        std::fs::write(&certificate_file, certificate.pem()).expect("a file");
        std::fs::write(&key_file, key.serialize_pem()).expect("a file");
        Tls { certificate: certificate_file, key: key_file, ca: self.file.clone(), verify_clients: true }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

async fn servers(tls: &Tls) -> (LocalNats, LocalPostgres) {
    let nats = nats_with(NatsOptions { tls: Some(tls.clone()), ..NatsOptions::throwaway() });
    let postgres = postgres_with(PostgresOptions { tls: Some(tls.clone()), ..PostgresOptions::throwaway() });
    tokio::join!(nats, postgres)
}

#[tokio::test]
async fn the_main_job_over_tls() {
    let dir = tempfile::tempdir().expect("a directory");
    let tls = Ca::new(dir.path(), "ca").certify(dir.path(), "127.0.0.1");
    let (nats, postgres) = servers(&tls).await;
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
    main_job(&stack).await;
    let clear: i64 = stack
        .count("SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL AND NOT ssl")
        .await;
    assert_eq!(clear, 0, "every connection to Postgres is encrypted");

    let project = stack.api.project_id.to_string();
    for arguments in [vec!["key", "list", "--project", &project], vec!["migrate"]] {
        let mut leadctl = Command::new(binary("leadctl"));
        leadctl.args(arguments).env("NATS_URL", stack.nats.url()).env("DATABASE_URL", stack.postgres.url());
        let output = leadctl.envs(files.iter().map(|(name, value)| (name, value))).output().expect("leadctl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test]
async fn what_cannot_be_verified_is_refused_and_says_why() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ca, stranger) = (Ca::new(dir.path(), "ca"), Ca::new(dir.path(), "stranger"));
    let tls = ca.certify(dir.path(), "127.0.0.1");
    let (nats, postgres) = servers(&tls).await;
    let (good, wrong) = (text(&tls.ca), text(&stranger.file));
    let (cert, key) = (text(&tls.certificate), text(&tls.key));

    // A CA that did not certify the server; no certificate where the server wants one.
    let cases = [
        (vec![("NATS_CA", wrong.as_str()), ("NATS_CERT", &cert), ("NATS_KEY", &key)], "UnknownIssuer"),
        (vec![("NATS_CA", good.as_str())], "ertificate"),
    ];
    for (extra, expected) in cases {
        let (mut gateway, _) = service("gateway", &nats, &postgres, &extra);
        let line = gateway.wait_for_log("cannot connect to NATS", SOON).await;
        assert!(line.contains(expected), "{line}");
    }

    // The same for Postgres: by its CA, and by its name.
    let other = postgres_with(PostgresOptions::throwaway()).await;
    let wrong_ca = postgres.url().replace(&good, &wrong);
    let no_tls = format!("{}?sslmode=verify-full&sslrootcert={good}", other.url());
    let plaintext = postgres.url().replace("sslmode=verify-full", "sslmode=disable");
    let by_name = postgres.url().replace("127.0.0.1", "localhost");
    for (url, expected) in [
        (wrong_ca.as_str(), "UnknownIssuer"),
        (&by_name, "not valid for name"),
        (&no_tls, "does not support TLS"),
        (&plaintext, "no encryption"),
    ] {
        let refused = PgConnection::connect(url).await.expect_err("refused").to_string();
        let output = Command::new(binary("leadctl")).arg("migrate").env("DATABASE_URL", url).output().expect("leadctl");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for said in [&refused, &said] {
            assert!(said.contains(expected), "{said} instead of {expected}");
        }
    }
    let extra = [("DATABASE_URL", wrong_ca.as_str()), ("NATS_CA", &good), ("NATS_CERT", &cert), ("NATS_KEY", &key)];
    let (mut lead_state, _) = service("lead-state", &nats, &postgres, &extra);
    let line = lead_state.wait_for_log("cannot connect to Postgres", SOON).await;
    assert!(line.contains("UnknownIssuer"), "{line}");

    // NATS takes nothing in clear.
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", nats.port())).await.expect("a connection");
    let mut lines = BufReader::new(stream);
    let mut answer = String::new();
    lines.read_line(&mut answer).await.expect("INFO");
    assert!(answer.contains("\"tls_required\":true"), "{answer}");
    lines.get_mut().write_all(b"CONNECT {}\r\nPING\r\n").await.expect("a write");
    answer.clear();
    while matches!(lines.read_line(&mut answer).await, Ok(read) if read > 0) {}
    assert!(!answer.contains("PONG"), "{answer}");
}

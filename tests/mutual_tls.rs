//! Callbacks with client certificates, at an endpoint that demands a certificate. Each callback presents its own
//! certificate on separate connections, and no response shows the private key.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::Method;
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{Ca, Identity, Stack, TEST_TIMEOUT, assert_ok, assert_refused, process_id, written};

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}

/// A request as the endpoint received it.
#[derive(Debug, Clone)]
struct Received {
    path: String,
    connection: usize,
    client: CertificateDer<'static>,
}

/// An HTTPS server that demands a certificate of one authority and answers 200.
struct Endpoint {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Endpoint {
    fn start(ca: &Ca) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(der(&ca.pem)).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let own = ca.certify("127.0.0.1", 2040);
        let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).expect("a key");
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(verifier.expect("a verifier"))
            .with_single_cert(vec![der(&own.certificate)], key);
        let config = Arc::new(config.expect("a configuration"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let requests = received.clone();
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (config, requests) = (config.clone(), requests.clone());
                std::thread::spawn(move || {
                    let stream = stream.expect("a connection");
                    let raw = stream.try_clone().expect("a socket");
                    let _ = serve(stream, number, config, &requests);
                    // Closing a socket with unread bytes would reset the connection, and the client might lose the
                    // alert.
                    let _ = raw.shutdown(Shutdown::Write);
                    let _ = raw.set_read_timeout(Some(TEST_TIMEOUT));
                    let _ = std::io::copy(&mut &raw, &mut std::io::sink());
                });
            }
        });
        Self { address, received }
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    fn requests_to(&self, path: &str) -> Vec<Received> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.iter().filter(|request| request.path == path).cloned().collect()
    }
}

/// Answers the requests of a connection until its end.
fn serve(
    stream: TcpStream,
    connection: usize,
    config: Arc<ServerConfig>,
    requests: &Mutex<Vec<Received>>,
) -> std::io::Result<()> {
    let tls = ServerConnection::new(config).expect("a connection");
    let mut stream = BufReader::new(StreamOwned::new(tls, stream));
    loop {
        let (mut head, mut length) = (Vec::new(), 0);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
            head.push(line);
        }
        stream.read_exact(&mut vec![0; length])?;
        let client = stream.get_ref().conn.peer_certificates().expect("a certificate")[0].clone().into_owned();
        let path = head[0].split(' ').nth(1).expect("a path").to_owned();
        requests.lock().unwrap_or_else(PoisonError::into_inner).push(Received { path, connection, client });
        // The response of a token endpoint, which other requests ignore.
        let body = r#"{"access_token":"t0ken","token_type":"Bearer","expires_in":3600}"#;
        write!(stream.get_mut(), "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    }
}

/// A stack that trusts the authority of the endpoint.
async fn started(ca: &Ca, extra: &[(&str, &str)]) -> (Stack, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = written(dir.path(), "ca.pem", &ca.pem);
    let trusted = [("SSL_CERT_FILE", file.to_str().expect("a path"))];
    (Stack::start_with(&[&trusted, extra].concat()).await, dir)
}

fn callback(name: &str, url: &str, identity: &Identity) -> Value {
    json!({"name": name, "url": url,
           "clientCertificate": {"certificate": identity.certificate, "key": identity.key}})
}

#[tokio::test]
async fn each_callback_presents_its_own_certificate_on_its_own_connections() {
    let ca = Ca::new("ca");
    let endpoint = Endpoint::start(&ca);
    let (stack, _dir) = started(&ca, &[("RETRY_SCHEDULE", "0s,1h")]).await;
    let (one, other) = (ca.certify("one", 2040), ca.certify("other", 2040));
    let stranger = Ca::new("stranger").certify("stranger", 2040);
    let mut with_token = callback("other", &endpoint.url("/other"), &other);
    with_token["auth"] =
        json!({"type": "oauth2", "tokenUrl": endpoint.url("/token"), "clientId": "c", "clientSecret": "s"});
    let callbacks = json!([
        callback("one", &endpoint.url("/one"), &one),
        with_token,
        callback("stranger", &endpoint.url("/stranger"), &stranger),
        {"name": "none", "url": endpoint.url("/none")},
    ]);
    let applied = stack.process(callbacks).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;

    let mut last = String::new();
    for number in 0..20 {
        last = stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }

    eventually(TEST_TIMEOUT, "both callbacks got all", async || {
        ["/one", "/other"].iter().all(|path| endpoint.requests_to(path).len() >= 20)
    })
    .await;
    let connections = |path: &str, identity: &Identity| {
        let requests = endpoint.requests_to(path);
        assert!(requests.iter().all(|request| request.client == der(&identity.certificate)), "{path}");
        requests.iter().map(|request| request.connection).collect::<std::collections::BTreeSet<_>>()
    };
    let (of_one, of_other) = (connections("/one", &one), connections("/other", &other));
    assert!(of_one.is_disjoint(&of_other), "{of_one:?} {of_other:?}");
    assert!(of_one.len() < 20, "connections are kept: {of_one:?}");
    assert_eq!(connections("/token", &other).len(), 1, "the token endpoint gets the same certificate");
    for path in ["/stranger", "/none"] {
        assert_eq!(endpoint.requests_to(path).len(), 0, "{path}");
    }
    let errors = eventually(TEST_TIMEOUT, "the refused attempts are recorded", async || {
        let rows = sqlx::query_scalar::<_, String>(
            "SELECT DISTINCT error FROM webhooks.every_attempt WHERE error IS NOT NULL",
        );
        let errors = rows.fetch_all(&stack.pool).await.map_err(|e| e.to_string())?.join("\n");
        let expected = ["requires a client certificate: set clientCertificate", "rejected the client certificate"];
        if expected.iter().all(|text| errors.contains(text)) { Ok(errors) } else { Err(format!("{last}: {errors}")) }
    })
    .await;
    println!("{errors}");
}

#[tokio::test]
async fn a_private_key_is_checked_when_set_kept_with_its_certificate_and_shown_nowhere() {
    let ca = Ca::new("ca");
    let endpoint = Endpoint::start(&ca);
    let (stack, dir) = started(&ca, &[("RUST_LOG", "debug")]).await;
    let (valid, expired) = (ca.certify("valid", 2040), ca.certify("expired", 2020));
    let process = format!("/api/v1/processes/{}", process_id(&stack.process(json!([])).await));
    let callbacks = format!("{process}/callbacks");
    let mismatch = Identity { certificate: valid.certificate.clone(), key: expired.key.clone() };
    let refused = stack.api.post(&callbacks, &callback("crm", &endpoint.url("/crm"), &mismatch)).await;
    assert!(refused.1.to_string().contains("key is not the certificate's"), "{refused:?}");
    assert_refused(refused, 400, "invalid_process");
    let late = assert_ok(stack.api.post(&callbacks, &callback("late", &endpoint.url("/late"), &expired)).await);
    let warning = r#"callback "late": its client certificate expires at 2020-01-01T00:00:00.000Z: renew it"#;
    assert_eq!(late["warnings"], json!([warning]));
    let (certificate, key) =
        (written(dir.path(), "client.pem", &valid.certificate), written(dir.path(), "client.key", &valid.key));
    let url = endpoint.url("/crm");
    let add = [
        "callback",
        "add",
        "--process",
        "sales",
        "--name",
        "crm",
        "--url",
        &url,
        "--client-cert",
        certificate.to_str().expect("a path"),
        "--client-key",
        key.to_str().expect("a path"),
    ];
    let added = stack.leadctl_of_project(&add).await.assert_ok().assert_prints(&["warning", "callback crm added"]);

    let read = assert_ok(stack.api.get(&process).await)["data"].take();
    let put = assert_ok(stack.api.ask(Method::PUT, &process, &[], &read).await);
    let spec = stack.leadctl_of_project(&["process", "get", "sales", "--spec"]).await.assert_ok();
    let crm = read["callbacks"].as_array().expect("a list").iter().find(|callback| callback["name"] == "crm");
    let crm = crm.expect("the callback");
    let path = format!("{callbacks}/{}", crm["callbackId"].as_str().expect("an id"));
    let tested = assert_ok(stack.api.post(&format!("{path}/test"), &json!({})).await);

    assert_eq!((&put["changed"], &put["warnings"]), (&json!(false), &json!([warning])));
    assert_eq!(crm["clientCertificate"], json!({"certificate": valid.certificate}));
    assert_eq!(tested["data"]["delivered"], json!(true), "{tested}");
    let stored = sqlx::query_scalar::<_, String>("SELECT config::text FROM lead_state.processes WHERE name = 'sales'");
    let stored = stored.fetch_one(&stack.pool).await.expect("the process");
    assert!(stored.contains("sealed:v1:"), "{stored}");
    let logs = [&stack.gateway, &stack.lead_state, &stack.notifier].map(|service| service.log()).join("\n");
    let line = valid.key.lines().nth(1).expect("a line of the key");
    for text in [read.to_string(), put.to_string(), spec.stdout, added.text(), stored, logs] {
        assert!(!text.contains(line) && !text.contains("PRIVATE KEY"), "the key is shown");
    }
    let mut other = crm.clone();
    other["clientCertificate"]["certificate"] = json!(expired.certificate);
    assert_refused(stack.api.ask(Method::PUT, &path, &[], &other).await, 400, "invalid_process");
}

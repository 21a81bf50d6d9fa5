//! Sends one request to a callback and reads its response.
//!
//! The endpoint accepts a delivery if the head of a 2xx response arrives before the callback's timeout. The body of the
//! response is read only while it is short and arrives at once: to reuse the connection, and to show the response of a
//! failed attempt. An endpoint that drips or floods its response delays no attempt and fills no memory.

use std::{cmp::Reverse, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use contract::{
    ObjectId,
    process::{Callback, Oauth2Client},
};
use http::{Extensions, Request, Response, StatusCode, Uri, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper_util::client::legacy::Error;
use rustls::ClientConfig;
use service_kit::{clock, tls};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    dns::Dns,
    failure::{rejection, request_error},
    guard::Guard,
    pool::{ConnectionPool, MAX_BODY, MAX_OPEN_PER_ATTEMPT},
    request::{PreparedCallback, RequestError, server},
    resolver::{DESTINATION, Destination, Resolver},
    response_limit::{ConnectionReads, OpenConnections},
    token::{Token, TokenCache, TokenSource},
    token_request::{Grant, parse_grant, token_request},
};
use crate::core::{
    delivery::PendingDelivery,
    outcome::{Attempt, AttemptOutcome},
};

/// How long a body may take after the head. A longer timeout reuses the connections of slow bodies; a shorter one frees
/// the permit sooner.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// How much of a failed attempt's body is kept.
const MAX_KEPT_BODY: usize = 1024;
#[derive(Debug)]
pub(crate) struct CallbackClient {
    /// The connections of callbacks without a client certificate.
    shared: ConnectionPool,
    resolver: Resolver,
    tls: ClientConfig,
    /// The connections of all pools.
    open: OpenConnections,
    tokens: TokenCache,
}

impl CallbackClient {
    /// A client that reaches what the guard allows and trusts the system's CA certificates. It follows no redirects,
    /// which lead to URLs that the guard did not check, and uses no proxy, which would resolve names without the guard.
    pub(crate) fn new(guard: Guard, dns: Arc<Dns>, max_in_flight: u32) -> anyhow::Result<Self> {
        let open = OpenConnections::new(max_in_flight as usize * MAX_OPEN_PER_ATTEMPT);
        Ok(Self::with_resolver(Resolver::new(guard, dns), tls::client()?, open))
    }

    fn with_resolver(resolver: Resolver, tls: ClientConfig, open: OpenConnections) -> Self {
        let shared = ConnectionPool::new(resolver.clone(), tls.clone(), open.clone());
        Self { shared, resolver, tls, open, tokens: TokenCache::default() }
    }

    /// The connections of a callback: its own if it has a client certificate, otherwise shared ones.
    fn pool<'a>(&'a self, callback: &'a PreparedCallback) -> Result<&'a ConnectionPool, RequestError> {
        let Some(certificate) = &callback.callback.client_certificate else { return Ok(&self.shared) };
        let create = || {
            let (resolver, tls, open) = (self.resolver.clone(), self.tls.clone(), self.open.clone());
            ConnectionPool::with_certificate(resolver, tls, open, certificate)
        };
        let pool = callback.own_pool.get_or_init(create).as_ref();
        pool.map_err(|e| RequestError::NotSent(format!("the client certificate: {e}")))
    }

    /// Sends a request. If the endpoint closed an idle connection just as the request was written to it, sends the
    /// request once more, on a fresh connection. An endpoint that did read the first one recognizes the second by its
    /// `webhook-id`.
    async fn request(
        &self,
        pool: &ConnectionPool,
        project_id: ObjectId,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, RequestError> {
        let (host, port) = server(request.uri()).unwrap_or_default();
        // The resolver checks the addresses of names only.
        if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            self.resolver.guard().check_address(address, port)?;
        }
        let sent = async {
            match pool.client().request(request.clone()).await {
                Err(e) if closed_on_reuse(&e) => pool.fresh.request(request).await,
                response => response,
            }
        };
        let sent = DESTINATION.scope(Destination { project_id, port }, sent).await;
        sent.map_err(|e| request_error(&e))
    }

    /// Makes one attempt.
    pub(crate) async fn send(
        &self,
        callback: &PreparedCallback,
        delivery: &PendingDelivery,
        traceparent: Option<&str>,
    ) -> Attempt {
        let (started_at, started) = (clock::now(), Instant::now());
        let timeout_seconds = callback.callback.timeout_seconds;
        let deadline = started + Duration::from_secs(timeout_seconds.into());
        let project_id = delivery.project_id;
        let mut used: Option<UsedToken> = None;
        let response = async {
            let pool = self.pool(callback)?;
            used = self.token(callback, pool, project_id, deadline).await?;
            // A receiver compares the time of the signature with its clock, and getting the token may have taken long.
            let signed_at = if used.is_some() { clock::now() } else { started_at };
            let authorization = used.as_ref().map(|(_, token)| token.authorization());
            let request = callback.request(delivery, traceparent, signed_at, authorization)?;
            let response = timeout_at(deadline, self.request(pool, project_id, request)).await;
            response.unwrap_or(Err(RequestError::TimedOut(timeout_seconds)))
        };
        let response = response.await;
        let duration = started.elapsed();
        match response {
            Ok(response) => {
                if let Some((source, token)) = &used
                    && response.status() == StatusCode::UNAUTHORIZED
                {
                    source.reject(token);
                }
                let outcome = outcome(&response, callback.uri().unwrap_or(&Uri::default()));
                let token = used.as_ref().map(|(_, token)| token.text());
                let secrets = secrets(&callback.callback, token);
                // Reads past the kept part by the length of the longest secret, so that a secret that begins there is
                // recognized.
                let longest = secrets.first().map_or(0, |secret| secret.len());
                let response = printable(&read_body(response.into_body(), MAX_KEPT_BODY + longest).await, &secrets);
                Attempt { started_at, duration, outcome, response }
            }
            Err(e) => {
                let outcome = AttemptOutcome::NoResponse { error: e.to_string() };
                Attempt { started_at, duration, outcome, response: None }
            }
        }
    }
}

/// The token that a request carries, and its source.
type UsedToken = (Arc<TokenSource>, Arc<Token>);

impl CallbackClient {
    /// An access token for a request to a callback that needs one, from memory or from the callback's token endpoint.
    /// Getting one is part of the attempt: it ends at the attempt's deadline, and counts for the limits and the circuit
    /// breaker of this callback only.
    async fn token(
        &self,
        callback: &PreparedCallback,
        pool: &ConnectionPool,
        project_id: ObjectId,
        deadline: Instant,
    ) -> Result<Option<UsedToken>, RequestError> {
        let Some((client, endpoint)) = callback.token_endpoint() else { return Ok(None) };
        let source = self.tokens.source(callback.callback.callback_id, client);
        let get = async |deadline: Instant| {
            let granted = timeout_at(deadline, self.grant(pool, source.client(), endpoint, project_id)).await;
            granted.unwrap_or_else(|_| Err("the token endpoint did not answer in time".into()))
        };
        let token = source.token(deadline, get).await.map_err(RequestError::NoToken)?;
        Ok(Some((source, token)))
    }

    /// Requests a token.
    async fn grant(
        &self,
        pool: &ConnectionPool,
        client: &Oauth2Client,
        endpoint: &Uri,
        project_id: ObjectId,
    ) -> Result<Grant, String> {
        let request = token_request(client, endpoint).map_err(|e| e.to_string())?;
        let response = self.request(pool, project_id, request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|e| format!("the response of the token endpoint cannot be read: {e}"))?;
        parse_grant(client, status, &body.to_bytes())
    }
}

fn outcome(response: &Response<Incoming>, callback: &Uri) -> AttemptOutcome {
    let status = response.status();
    if status.is_success() {
        return AttemptOutcome::Accepted { status: status.as_u16() };
    }
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    AttemptOutcome::Rejected {
        status: status.as_u16(),
        error: rejection(status, response.headers(), callback),
        retry_after: retry_after.map(ToOwned::to_owned),
    }
}

/// Whether a request failed because its connection had been kept and the endpoint closed it.
fn closed_on_reuse(error: &Error) -> bool {
    let mut extras = Extensions::new();
    if let Some(connection) = error.connect_info() {
        connection.get_extras(&mut extras);
    }
    extras.get::<ConnectionReads>().is_some_and(ConnectionReads::closed_on_reuse)
}

/// The beginning of a body, as far as it arrives at once, without the zero bytes, which Postgres does not store in
/// texts.
async fn read_body(mut body: Incoming, max_kept: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    if body.is_end_stream() {
        return kept;
    }
    let mut length = 0;
    let read = async {
        while length < MAX_BODY
            && let Some(Ok(frame)) = body.frame().await
        {
            let chunk = frame.into_data().unwrap_or_default();
            length += chunk.len();
            kept.extend(chunk.iter().filter(|byte| **byte != 0).take(max_kept - kept.len()));
        }
    };
    // A body that is too slow is not an error: the head decided the outcome.
    let _ = timeout(BODY_TIMEOUT, read).await;
    kept
}

/// The secrets of a callback and of a request to it, the longest first: a shorter secret may be the start of a longer
/// one.
fn secrets<'a>(callback: &'a Callback, token: Option<&'a str>) -> Vec<&'a str> {
    let secrets = callback.secrets().map(|secret| secret.expose()).chain(token);
    let mut secrets: Vec<_> = secrets.filter(|secret| !secret.is_empty()).collect();
    secrets.sort_unstable_by_key(|secret| Reverse(secret.len()));
    secrets
}

/// The first [`MAX_KEPT_BODY`] bytes as text, without these secrets, which an endpoint may echo. None if empty.
fn printable(bytes: &[u8], secrets: &[&str]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let (mut shown, mut rest) = (String::new(), &*text);
    while text.len() - rest.len() < MAX_KEPT_BODY
        && let Some(c) = rest.chars().next()
    {
        if let Some(secret) = secrets.iter().find(|secret| rest.starts_with(**secret)) {
            shown.push_str("***");
            rest = &rest[secret.len()..];
        } else {
            shown.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    (!shown.is_empty()).then_some(shown)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use contract::event_kind::DeliveryKind;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket, TcpStream},
    };
    use tokio_util::task::AbortOnDropHandle;

    use super::{
        super::{pool::MAX_READ, signature::signature},
        *,
    };

    pub(crate) const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    pub(crate) fn callback(url: &str) -> Callback {
        serde_json::from_str(&format!(
            r#"{{"callbackId":"010101010101010101010101","name":"crm","url":{url:?},"secrets":["{SECRET}"],
            "auth":{{"type":"bearer","token":"t-1"}},"timeoutSeconds":1}}"#
        ))
        .unwrap()
    }

    pub(crate) fn delivery() -> PendingDelivery {
        PendingDelivery {
            update_id: ObjectId::from_bytes([2; 12]),
            callback_id: ObjectId::from_bytes([1; 12]),
            kind: DeliveryKind::Update,
            project_id: ObjectId::from_bytes([3; 12]),
            process_id: None,
            body: r#"{"success":true}"#.into(),
            traceparent: None,
            order: None,
        }
    }

    pub(crate) fn guard(allow: &[&str]) -> Guard {
        let allow_networks = allow.iter().map(|network| network.parse().unwrap()).collect();
        Guard { allow_networks, allow_http: true, ..Guard::default() }
    }

    fn dns() -> Arc<Dns> {
        Arc::new(Dns::new(Vec::new()).unwrap())
    }

    /// Sends to a URL with only loopback addresses allowed.
    async fn send(url: &str) -> Attempt {
        let guard = guard(&["127.0.0.0/8"]);
        let client = CallbackClient::new(guard.clone(), dns(), 100).unwrap();
        client.send(&PreparedCallback::new(callback(url), &guard), &delivery(), Some(TRACE)).await
    }

    /// An endpoint that responds to one request with these parts, pausing between them. Returns the request.
    async fn endpoint(parts: Vec<Vec<u8>>) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?key=k-1", listener.local_addr().unwrap());
        let received = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 8192];
            let mut length = 0;
            while !request[..length].ends_with(b"}") {
                length += stream.read(&mut request[length..]).await.unwrap();
            }
            for part in parts {
                if stream.write_all(&part).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // Until the client closes.
            let _ = stream.read(&mut [0; 1]).await;
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        (url, received)
    }

    #[tokio::test]
    async fn a_request_carries_signature_trace_and_authentication() {
        let (url, received) = endpoint(vec![b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()]).await;
        let attempt = send(&url).await;
        assert_eq!((attempt.outcome, attempt.response), (AttemptOutcome::Accepted { status: 204 }, None));
        let received = received.await.unwrap();
        let (head, body) = received.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, r#"{"success":true}"#);
        let timestamp = attempt.started_at.unix_seconds();
        let signature = signature(&[SECRET.into()], &"02".repeat(12), timestamp, body.as_bytes()).unwrap();
        let mut lines = head.split("\r\n");
        assert_eq!(lines.next(), Some("POST /hook?key=k-1 HTTP/1.1"));
        let lines = lines.map(str::to_ascii_lowercase).collect::<Vec<_>>();
        for expected in [
            "content-type: application/json",
            "content-length: 16",
            "authorization: bearer t-1",
            &format!("user-agent: leadrelay/{}", env!("CARGO_PKG_VERSION")),
            "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "webhook-id: 020202020202020202020202",
            &format!("webhook-timestamp: {timestamp}"),
            &format!("webhook-signature: {}", signature.to_ascii_lowercase()),
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected} is not in {head}");
        }
    }

    #[tokio::test]
    async fn the_response_of_a_failed_attempt_is_kept_printable_and_short() {
        let mut answer =
            b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 3000\r\n\r\nno t-1\0\xff".to_vec();
        answer.extend([b'x'; 2992]);
        let (url, _received) = endpoint(vec![answer]).await;
        let attempt = send(&url).await;
        let expected = AttemptOutcome::Rejected {
            status: 503,
            error: "the endpoint answered 503 Service Unavailable".into(),
            retry_after: Some("7".into()),
        };
        assert_eq!(attempt.outcome, expected);
        let response = attempt.response.unwrap();
        assert!(response.starts_with("no ***\u{fffd}xxx"), "{response}");
        assert!(response.len() <= MAX_KEPT_BODY + 2);
    }

    #[tokio::test]
    async fn a_secret_across_the_end_of_the_kept_response_is_removed() {
        for start in [MAX_KEPT_BODY - SECRET.len(), MAX_KEPT_BODY - SECRET.len() + 1, MAX_KEPT_BODY - 1] {
            let body = ["x".repeat(start), SECRET.into(), "y".repeat(100)].concat();
            let head = format!("HTTP/1.1 503 Service Unavailable\r\ncontent-length: {}\r\n\r\n", body.len());
            let (url, _received) = endpoint(vec![[head, body].concat().into_bytes()]).await;

            let response = send(&url).await.response.unwrap();

            assert_eq!(response, ["x".repeat(start), "***".into()].concat());
        }
    }

    #[test]
    fn a_response_that_repeats_secrets_shows_no_part_of_one() {
        let secrets = ["secret-1", "secret"];
        let longest = secrets[0].len();

        for offset in 0..longest {
            let body = ["x".repeat(offset), "secret-1secret".repeat(200)].concat();

            let shown = printable(&body.as_bytes()[..MAX_KEPT_BODY + longest], &secrets).unwrap();

            assert_eq!(shown.trim_start_matches('x').replace("***", ""), "", "{shown}");
        }
    }

    #[tokio::test]
    async fn a_redirect_is_not_followed() {
        let answer = b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec();
        let (url, _received) = endpoint(vec![answer]).await;
        let attempt = send(&url).await;
        let error = "the endpoint answered 302 Found: redirects are not followed, and this one points to \
             http://127.0.0.1:1/";
        assert_eq!(attempt.outcome.error(), Some(error));
    }

    #[tokio::test]
    async fn a_response_that_drips_or_floods_delays_nothing() {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        let mut drip = vec![head.clone()];
        // Each takes 20 s to send.
        drip.extend(vec![b"1\r\nx\r\n".to_vec(); 1000]);
        let mut flood = vec![[head, format!("{:x}\r\n", 64 << 20).into_bytes()].concat()];
        flood.extend(vec![vec![b'x'; 1 << 16]; 1000]);
        for parts in [drip, flood] {
            let (url, _received) = endpoint(parts).await;
            let started = Instant::now();
            let attempt = send(&url).await;
            assert_eq!(attempt.outcome, AttemptOutcome::Accepted { status: 200 });
            assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
        }
    }

    /// Answers the first request of a connection. Reads the second, sends `rest` and closes. Counts the requests.
    async fn closing_endpoint(rest: &'static [u8]) -> (String, Arc<AtomicUsize>, AbortOnDropHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                for response in [b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".as_slice(), rest] {
                    let mut request = Vec::new();
                    while !request.ends_with(b"}") && stream.read_buf(&mut request).await.is_ok_and(|read| read > 0) {}
                    if request.is_empty() {
                        break;
                    }
                    counted.fetch_add(1, Ordering::Relaxed);
                    stream.write_all(response).await.unwrap();
                }
            }
        });
        (url, requests, AbortOnDropHandle::new(serving))
    }

    #[tokio::test]
    async fn a_kept_connection_that_was_closed_is_replaced_within_the_attempt() {
        let guard = guard(&["127.0.0.0/8"]);
        let client = CallbackClient::new(guard.clone(), dns(), 100).unwrap();
        let (url, requests, _serving) = closing_endpoint(b"").await;
        let target = PreparedCallback::new(callback(&url), &guard);

        for _ in 0..20 {
            let attempt = client.send(&target, &delivery(), Some(TRACE)).await;
            assert_eq!(attempt.outcome, AttemptOutcome::Accepted { status: 200 });
        }

        let requests = requests.load(Ordering::Relaxed);
        assert!(requests > 20, "connections were reused");
    }

    #[tokio::test]
    async fn no_connection_is_kept_while_too_many_are_open() {
        let guard = guard(&["127.0.0.0/8"]);
        let client = CallbackClient::new(guard.clone(), dns(), 0).unwrap();
        let (url, requests, _serving) = closing_endpoint(b"").await;
        let target = PreparedCallback::new(callback(&url), &guard);

        for _ in 0..20 {
            let attempt = client.send(&target, &delivery(), Some(TRACE)).await;
            assert_eq!(attempt.outcome, AttemptOutcome::Accepted { status: 200 });
        }

        assert_eq!(requests.load(Ordering::Relaxed), 20, "no request was repeated");
    }

    #[tokio::test]
    async fn a_response_that_breaks_off_is_a_failure() {
        let guard = guard(&["127.0.0.0/8"]);
        let client = CallbackClient::new(guard.clone(), dns(), 100).unwrap();
        let (url, requests, _serving) = closing_endpoint(b"HTTP/1.1 2").await;
        let target = PreparedCallback::new(callback(&url), &guard);

        let first = client.send(&target, &delivery(), Some(TRACE)).await;
        let second = client.send(&target, &delivery(), Some(TRACE)).await;

        assert_eq!((first.outcome.status(), second.outcome.status()), (Some(200), None));
        assert_eq!(requests.load(Ordering::Relaxed), 2, "no request is sent twice once its response has begun");
    }

    #[tokio::test]
    async fn a_2xx_status_counts_with_malformed_headers() {
        let many = (0..150).map(|n| format!("x-header-{n}: value\r\n")).collect::<String>();
        for lines in [
            many.as_str(),
            "no colon in this line\r\n",
            "spaces in the name: x\r\n",
            "space-before-colon : x\r\n",
            "folded: a\r\n b\r\n",
            ": no name\r\n",
            "caf\u{e9}: x\r\n",
            "x: caf\u{e9}\r\n",
            "control: a\u{1}b\r\n",
            "bare-line-feed: x\n",
        ] {
            let response = format!("HTTP/1.1 200 OK\r\n{lines}content-length: 0\r\n\r\n");
            let (url, _received) = endpoint(vec![response.into_bytes()]).await;
            let attempt = send(&url).await;
            assert_eq!(attempt.outcome, AttemptOutcome::Accepted { status: 200 }, "{lines}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(MAX_READ));
        let (url, _received) = endpoint(vec![endless.into_bytes()]).await;
        let attempt = send(&url).await;
        assert!(attempt.outcome.error().unwrap().contains("head is too large"), "{:?}", attempt.outcome);
    }

    #[tokio::test]
    async fn a_self_signed_certificate_is_named() {
        // A CA's certificate, as `openssl req -x509` makes it.
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}/hook?key=k-1", listener.local_addr().unwrap());
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let _ = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await;
        }));

        let attempt = send(&url).await;

        let error = "no response: the endpoint's certificate is a self-signed certificate: install one of a publicly \
             trusted authority";
        assert_eq!(attempt.outcome.error(), Some(error));
        drop(serving);
    }

    #[tokio::test]
    async fn endless_interim_responses_end_the_attempt() {
        let interim = b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n";
        let (url, _received) = endpoint(vec![interim.repeat((16 << 20) / interim.len())]).await;
        let attempt = send(&url).await;
        let error = attempt.outcome.error().unwrap();
        assert!(error.ends_with("the response is longer than 131072 bytes"), "{error}");

        let few = [&interim.repeat(100)[..], b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"].concat();
        let (url, _received) = endpoint(vec![few]).await;
        let attempt = send(&url).await;
        assert_eq!(attempt.outcome, AttemptOutcome::Accepted { status: 200 });
    }

    #[tokio::test]
    async fn errors_of_unreachable_endpoints_do_not_contain_the_url() {
        let (url, _received) = endpoint(vec![b"HTTP/1.1 200 ".to_vec()]).await;
        let attempt = send(&url).await;
        assert_eq!(attempt.outcome, AttemptOutcome::NoResponse { error: "no response within 1 s".into() });

        let attempt = send("http://127.0.0.1:1/?key=k-1").await;
        let error = attempt.outcome.error().unwrap();
        assert!(error.contains("refused") && !error.contains("k-1"), "{error}");
    }

    /// Hosts in the spellings that a URL may use, by kind. None of them may be connected to.
    const REFUSED: &[(&str, &[&str])] = &[
        ("this machine", &["127.0.0.1", "127.255.255.254", "[::1]", "0.0.0.0", "0.1.2.3", "[::]"]),
        ("private networks", &["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.1.1"]),
        ("link-local", &["169.254.0.1", "169.254.255.255", "[fe80::1]", "[febf::1]"]),
        ("carrier-grade NAT", &["100.64.0.1", "100.127.255.255"]),
        ("multicast and broadcast", &["224.0.0.1", "239.255.255.255", "255.255.255.255", "240.0.0.1", "[ff02::1]"]),
        ("metadata: AWS, GCP, Azure and others", &["169.254.169.254", "169.254.170.2", "[fd00:ec2::254]"]),
        ("metadata: Alibaba, Azure's wire server, Oracle", &["100.100.100.200", "168.63.129.16", "192.0.0.192"]),
        ("IPv6 private networks", &["[fc00::1]", "[fdff::1]", "[fec0::1]"]),
        ("IPv4 mapped into IPv6", &["[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::ffff:8.8.8.8]"]),
        ("IPv4-compatible and -translated IPv6", &["[::127.0.0.1]", "[::7f00:1]", "[::ffff:0:127.0.0.1]"]),
        ("NAT64", &["[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::10.0.0.1]"]),
        ("6to4 and Teredo", &["[2002:7f00:1::1]", "[2002:a9fe:a9fe::]", "[2001::1]", "192.88.99.1"]),
        ("documentation", &["192.0.2.1", "198.51.100.7", "203.0.113.7", "[2001:db8::1]", "[3fff::1]"]),
        ("benchmarks", &["198.18.0.1", "198.19.255.255", "[2001:2::1]"]),
        ("protocols", &["192.0.0.1", "192.31.196.1", "192.52.193.1", "192.175.48.1", "[2620:4f:8000::1]", "[5f00::1]"]),
        ("unassigned", &["[100::1]", "[4000::1]", "[1::1]", "[e000::1]"]),
        ("decimal", &["2130706433", "3232235777", "2852039166", "0", "4294967295"]),
        ("octal", &["0177.0.0.1", "017700000001", "0300.0250.1.1", "00000177.0.0.1", "0251.0376.0251.0376"]),
        ("hexadecimal", &["0x7f.0.0.1", "0x7f000001", "0X7F.1", "0xa9.0xfe.0xa9.0xfe", "0xA9FEA9FE"]),
        ("short forms", &["127.1", "127.0.1", "10.1", "192.168.257", "169.254.43518"]),
        ("mixed", &["0x7f.1", "0177.1", "127.0.0x1", "169.0376.43518", "0x7f.00.0x0.01"]),
        ("a trailing dot", &["127.0.0.1.", "2130706433.", "0x7f.1."]),
        ("other digits and dots", &["①②⑦.0.0.1", "１２７.０.０.１", "127。0。0。1", "①⑥⑨.②⑤④.①⑥⑨.②⑤④"]),
        ("percent-encoded", &["%31%32%37.0.0.1", "127%2e0%2e0%2e1", "%30%78%37%66.1"]),
        ("users before the host", &["user:secret@127.0.0.1", "crm.example@127.0.0.1", "crm.example:443@10.0.0.1"]),
        ("a host behind a backslash", &["127.0.0.1\\@crm.example", "127.0.0.1\\.crm.example"]),
        (
            "long IPv6",
            &["[0:0:0:0:0:0:0:1]", "[0000:0000:0000:0000:0000:0000:0000:0001]", "[0:0:0:0:0:ffff:127.0.0.1]"],
        ),
        (
            "zones and invalid addresses",
            &["[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1", "256.0.0.1", "1.2.3.4.5", "0x100000000"],
        ),
        ("names of this machine", &["localhost", "LOCALHOST", "localhost.", "loopback.example", "mapped.example"]),
        ("names of metadata services", &["metadata.google.internal", "metadata.google.internal.", "wire.example"]),
        ("names with several addresses, all internal", &["several.example"]),
        ("names without an address", &["unknown.example"]),
    ];

    /// The addresses of the names in the table.
    fn look_up(name: &str) -> Vec<IpAddr> {
        let addresses: &[&str] = match name.trim_end_matches('.') {
            "localhost" => &["127.0.0.1", "::1"],
            "loopback.example" => &["127.0.0.2"],
            "mapped.example" => &["::ffff:127.0.0.1"],
            "metadata.google.internal" => &["169.254.169.254"],
            "wire.example" => &["168.63.129.16"],
            "several.example" => &["10.0.0.1", "fd00::1", "192.168.0.1"],
            _ => &[],
        };
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    /// A client with its own name lookup.
    fn client_with_lookup(
        allow: &[&str],
        lookup: impl Fn(String) -> Vec<IpAddr> + Send + Sync + 'static,
    ) -> CallbackClient {
        let lookup = move |_, name| std::future::ready(Ok(lookup(name)));
        let open = OpenConnections::new(100);
        CallbackClient::with_resolver(Resolver::with_lookup(guard(allow), lookup), tls::client().unwrap(), open)
    }

    #[tokio::test]
    async fn an_attempt_never_connects_to_an_internal_address() {
        let client = client_with_lookup(&[], |name| look_up(&name));
        for (what, hosts) in REFUSED {
            for host in *hosts {
                for url in [format!("http://{host}/hook"), format!("https://{host}:8443/hook?key=k-1")] {
                    // A backslash ends the host: the rest is the path.
                    let target = PreparedCallback::new(callback(&url), &guard(&[]));
                    let attempt = client.send(&target, &delivery(), Some(TRACE)).await;
                    let error = attempt.outcome.error().unwrap_or_default();
                    assert!(
                        error.starts_with("refused: "),
                        "{what}: {host}: {error:?}, {:?}",
                        attempt.outcome.status()
                    );
                    assert!(!error.contains("k-1"), "{error}");
                }
            }
        }
    }

    #[tokio::test]
    async fn dns_rebinding_reaches_no_internal_address() {
        // 127.0.0.2 stands for an address that is allowed, 127.0.0.1 for one that is not; the port is the same.
        let internal = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = internal.local_addr().unwrap().port();
        let allowed = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
        let lookups = Arc::new(AtomicUsize::new(0));
        let counted = lookups.clone();
        let client = client_with_lookup(&["127.0.0.2/32"], move |_| {
            let allowed = counted.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
            vec![IpAddr::from(if allowed { [127, 0, 0, 2] } else { [127, 0, 0, 1] })]
        });
        let answering = tokio::spawn(async move {
            loop {
                let (mut stream, _) = allowed.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
            }
        });
        let url = format!("http://rebinding.example:{port}/");
        let target = PreparedCallback::new(callback(&url), &guard(&["127.0.0.2/32"]));
        for number in 0..10 {
            let attempt = client.send(&target, &delivery(), Some(TRACE)).await;
            let error = attempt.outcome.error().unwrap_or_default();
            match number % 2 {
                0 => assert_eq!(attempt.outcome.status(), Some(200), "{error}"),
                _ => assert_eq!(error, "refused: the address 127.0.0.1 is not allowed: loopback"),
            }
        }
        assert_eq!(lookups.load(Ordering::Relaxed), 10, "one lookup per connection, and its result is used");
        assert!(timeout(Duration::ZERO, internal.accept()).await.is_err(), "no connection to the internal address");
        answering.abort();
    }

    /// A listener that accepts no more connections: Linux drops the packets of new ones while the queue is full. Also
    /// returns the connections in its queue.
    async fn silent_listener(address: &str) -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(address.parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(connection) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
            queue.push(connection.unwrap());
        }
        (listener, queue)
    }

    #[tokio::test]
    async fn the_second_address_of_a_name_is_used_when_the_first_is_silent() {
        let (silent, _queue) = silent_listener("127.0.0.2:0").await;
        let port = silent.local_addr().unwrap().port();
        let working = TcpListener::bind(("127.0.0.3", port)).await.unwrap();
        let _answering = AbortOnDropHandle::new(tokio::spawn(async move {
            let (mut stream, _) = working.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
            let _ = stream.read(&mut [0; 1]).await;
        }));
        let client = client_with_lookup(&["127.0.0.0/8"], |name| match &*name {
            "both.example" => vec![[127, 0, 0, 2].into(), [127, 0, 0, 3].into()],
            _ => vec![[127, 0, 0, 2].into()],
        });
        let send = async |name: &str| {
            let mut callback = callback(&format!("http://{name}:{port}/"));
            callback.timeout_seconds = 10;
            let target = PreparedCallback::new(callback, &guard(&["127.0.0.0/8"]));
            client.send(&target, &delivery(), Some(TRACE)).await.outcome
        };

        let (both, silent_only) = tokio::join!(send("both.example"), send("silent.example"));

        assert_eq!(both, AttemptOutcome::Accepted { status: 204 });
        assert_eq!(silent_only.error(), Some("no response: the endpoint did not accept a connection in time"));
    }

    #[tokio::test]
    async fn names_from_the_system_resolver_are_checked() {
        let target = PreparedCallback::new(callback("http://localhost:1/"), &guard(&[]));
        let attempt =
            CallbackClient::new(guard(&[]), dns(), 100).unwrap().send(&target, &delivery(), Some(TRACE)).await;
        let error = attempt.outcome.error().unwrap();
        assert!(error.starts_with("refused: the address ") && error.ends_with(" is not allowed: loopback"), "{error}");
    }
}

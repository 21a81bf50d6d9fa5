//! 7 Deliver, 8 Retry: one POST to a callback.
//!
//! The endpoint took it when the head of its answer says 2xx before the callback's deadline. The answer's body is read
//! only so far as it is short and comes at once: to keep the connection, and to show what a failure said. An endpoint
//! that drips or floods its answer holds nothing up and fills nothing.

use std::{sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use contract::{
    Timestamp,
    process::{Callback, CallbackAuth},
};
use http::{
    Request, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use percent_encoding::percent_decode_str;
use service_kit::{clock, nats::error_chain, tls};
use tokio::time::{Instant, timeout, timeout_at};
use zeroize::Zeroizing;

use crate::{
    core::delivery::{Attempt, Delivery},
    http::guard::{Guard, Refused, Resolver, system_lookup},
    http::response_limit::Bounded,
    http::signature::signature,
};

/// How much of an answer's body is read before the connection is given up. More keeps connections to talkative
/// endpoints, less saves reading what nobody wants.
const MAX_BODY: usize = 64 * 1024;
/// How long an answer's body may take once its head is there. Longer lets slow bodies keep their connection, shorter
/// frees the slot sooner.
const BODY_PATIENCE: Duration = Duration::from_secs(1);
/// How much of a failure's body is kept to be shown.
const MAX_SHOWN: usize = 1024;
/// How long an idle connection is kept. Longer saves handshakes, but meets more connections that the endpoint closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Idle connections kept per host: as many as one callback may use at once by default, so that a lull between two batches of
/// events does not close what the next one opens again.
const MAX_IDLE_PER_HOST: usize = 256;
/// How much of an answer is read at once, and its longest head. More lets an endless answer keep a processor from everything
/// else for longer, less refuses heads that others accept.
const MAX_READ: usize = 32 * 1024;
/// After how much of an answer reading ends: a head, its body as far as it is looked at, and room for interim heads before.
const MAX_ANSWER: usize = MAX_BODY + 2 * MAX_READ;
/// How a delivery introduces itself.
const USER: &str = concat!("Leadrelay/", env!("CARGO_PKG_VERSION"));

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
enum Failure {
    #[error("refused: {0}")]
    Refused(#[from] Refused),
    #[error("not sent: {0}")]
    NotSent(String),
    #[error("no answer within {0} s")]
    TimedOut(u32),
    #[error("no answer: {0}")]
    NoAnswer(String),
}

/// A callback with its secrets in clear, and what of a request is the same for all its deliveries.
#[derive(Debug)]
pub(crate) struct Prepared {
    callback: Callback,
    /// Where to, and the headers that authenticate; or why it is not called.
    address: Result<(Uri, HeaderMap), Failure>,
}

impl Prepared {
    /// Prepares deliveries to a callback, as far as the guard allows.
    pub(crate) fn new(callback: Callback, guard: &Guard) -> Self {
        let address = address(&callback, guard);
        Self { callback, address }
    }

    /// The server that is called, and its port.
    pub(crate) fn server(&self) -> Option<(&str, u16)> {
        let (uri, _) = self.address.as_ref().ok()?;
        let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
        Some((uri.host()?, uri.port_u16().unwrap_or(default)))
    }
}

/// Where a callback is called, and the headers that authenticate there.
fn address(callback: &Callback, guard: &Guard) -> Result<(Uri, HeaderMap), Failure> {
    let mut url = guard.check_url(&callback.url)?;
    let secret = |value: &str| {
        let mut value = HeaderValue::from_str(value)
            .map_err(|_| Failure::NotSent("the callback's auth is not a header value".into()))?;
        value.set_sensitive(true);
        Ok::<_, Failure>(value)
    };
    let mut headers = HeaderMap::new();
    match &callback.auth {
        Some(CallbackAuth::Bearer { token }) => {
            let value = Zeroizing::new(format!("Bearer {}", token.expose()));
            headers.insert(AUTHORIZATION, secret(&value)?);
        }
        Some(CallbackAuth::Header { name, value }) => {
            let name = HeaderName::try_from(name)
                .map_err(|_| Failure::NotSent("the callback's auth is not a header name".into()))?;
            headers.insert(name, secret(value.expose())?);
        }
        None => {}
    }
    if !url.username().is_empty() || url.password().is_some() {
        let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let both = [decoded(url.username()), b":".to_vec(), decoded(url.password().unwrap_or_default())].concat();
        if !headers.contains_key(AUTHORIZATION) {
            headers.insert(AUTHORIZATION, secret(&format!("Basic {}", BASE64_STANDARD.encode(both)))?);
        }
        // Such a URL has a host, so it can be without them.
        let _ = (url.set_username(""), url.set_password(None));
    }
    // A fragment is the client's own; what else the parser made of the text is what is called.
    url.set_fragment(None);
    let uri = url.as_str().parse().map_err(|_| Failure::NotSent("the URL cannot be called".into()))?;
    Ok((uri, headers))
}

/// The HTTP client for callbacks.
#[derive(Debug)]
pub(crate) struct Poster {
    client: Client<Bounded<HttpsConnector<HttpConnector<Resolver>>>, Full<Bytes>>,
}

impl Poster {
    /// A client that reaches what the guard allows, and trusts the system's CA certificates. It follows no redirect: that
    /// leads where nobody checked; and knows no proxy, which would resolve names behind the guard's back.
    pub(crate) fn new(guard: Guard) -> anyhow::Result<Self> {
        Self::resolving(Resolver::new(guard, system_lookup))
    }

    fn resolving(resolver: Resolver) -> anyhow::Result<Self> {
        let mut http = HttpConnector::new_with_resolver(resolver);
        // Which schemes are allowed is the guard's business.
        http.enforce_http(false);
        http.set_nodelay(true);
        let https = HttpsConnectorBuilder::new().with_tls_config(tls::client()?).https_or_http().enable_http1();
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
            .http1_max_buf_size(MAX_READ)
            .build(Bounded { connector: https.wrap_connector(http), most: MAX_ANSWER });
        Ok(Self { client })
    }

    /// Makes one attempt, of this trace.
    pub(crate) async fn post(&self, to: &Prepared, delivery: &Delivery, traceparent: Option<&str>) -> Attempt {
        let callback = &to.callback;
        let started_at = clock::now();
        let begun = Instant::now();
        let deadline = begun + Duration::from_secs(callback.timeout_seconds.into());
        let answer = async {
            let request = request(to, delivery, traceparent, started_at)?;
            match timeout_at(deadline, self.client.request(request)).await {
                Ok(Ok(response)) => Ok(response),
                Ok(Err(e)) => Err(no_answer(&e)),
                Err(_) => Err(Failure::TimedOut(callback.timeout_seconds)),
            }
        };
        let answer = answer.await;
        let duration = begun.elapsed();
        let attempt = Attempt { started_at, duration, status: None, error: None, response: None, retry_after: None };
        match answer {
            Ok(response) => {
                let status = response.status();
                let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
                let retry_after = retry_after.map(ToOwned::to_owned);
                let response = shown(&read(response.into_body()).await, callback);
                let attempt = Attempt { status: Some(status.as_u16()), response, ..attempt };
                if status.is_success() {
                    attempt
                } else {
                    let error = Some(format!("the endpoint answered {status}"));
                    Attempt { error, retry_after, ..attempt }
                }
            }
            Err(failure) => Attempt { error: Some(failure.to_string()), ..attempt },
        }
    }
}

/// The request of a delivery, signed with every secret that is valid now.
fn request(
    to: &Prepared,
    delivery: &Delivery,
    traceparent: Option<&str>,
    now: Timestamp,
) -> Result<Request<Full<Bytes>>, Failure> {
    let (uri, auth) = to.address.as_ref().map_err(Clone::clone)?;
    let not_sent = |e: &dyn std::fmt::Display| Failure::NotSent(e.to_string());
    let id = delivery.update_id.to_string();
    let (secrets, timestamp) = (to.callback.signing_secrets(now), now.unix_seconds());
    let signature = signature(secrets, &id, timestamp, delivery.body.as_bytes()).map_err(|e| not_sent(&e))?;
    let text = |text: &str| HeaderValue::from_str(text).map_err(|e| not_sent(&e));
    let mut headers = HeaderMap::with_capacity(16);
    headers.insert(USER_AGENT, HeaderValue::from_static(USER));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-id", text(&id)?);
    headers.insert("webhook-timestamp", timestamp.into());
    headers.insert("webhook-signature", text(&signature)?);
    if let Some(traceparent) = traceparent {
        headers.insert(contract::headers::TRACEPARENT, text(traceparent)?);
    }
    headers.extend(auth.iter().map(|(name, value)| (name.clone(), value.clone())));
    let body = Bytes::from_owner(Arc::<[u8]>::from(delivery.body.clone()));
    let mut request = Request::post(uri.clone()).body(Full::new(body)).map_err(|e| not_sent(&e))?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// Says what went wrong.
fn no_answer(error: &hyper_util::client::legacy::Error) -> Failure {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(refused) = inner.downcast_ref::<Refused>() {
            return Failure::Refused(refused.clone());
        }
        cause = inner.source();
    }
    Failure::NoAnswer(error_chain(error))
}

/// The beginning of an answer's body, as far as it comes at once.
async fn read(mut body: Incoming) -> Vec<u8> {
    let mut shown = Vec::new();
    if body.is_end_stream() {
        return shown;
    }
    let mut length = 0;
    let read = async {
        while length < MAX_BODY
            && let Some(Ok(frame)) = body.frame().await
        {
            let chunk = frame.into_data().unwrap_or_default();
            length += chunk.len();
            shown.extend_from_slice(&chunk[..chunk.len().min(MAX_SHOWN - shown.len())]);
        }
    };
    // Running out of time is no failure: what counts was in the head.
    let _ = timeout(BODY_PATIENCE, read).await;
    shown
}

/// Bytes as text that Postgres can hold, without the callback's secrets, should an endpoint echo them; none when there are
/// none.
fn shown(bytes: &[u8], callback: &Callback) -> Option<String> {
    let mut text = String::from_utf8_lossy(bytes).replace('\0', "");
    for secret in callback.secrets() {
        text = text.replace(secret.expose(), "***");
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use contract::ObjectId;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn callback(url: &str) -> Callback {
        serde_json::from_str(&format!(
            r#"{{"callbackId":"010101010101010101010101","name":"crm","url":{url:?},"secrets":["{SECRET}"],
            "auth":{{"type":"bearer","token":"t-1"}},"timeoutSeconds":1}}"#
        ))
        .unwrap()
    }

    fn delivery() -> Delivery {
        Delivery {
            update_id: ObjectId::from_bytes([2; 12]),
            callback_id: ObjectId::from_bytes([1; 12]),
            project_id: ObjectId::from_bytes([3; 12]),
            process_id: None,
            body: r#"{"success":true}"#.into(),
            traceparent: None,
            order: None,
        }
    }

    fn guard(allow: &[&str]) -> Guard {
        Guard { allow_networks: allow.iter().map(|network| network.parse().unwrap()).collect(), allow_http: true }
    }

    /// Posts to a URL as far as this machine's own addresses are concerned.
    async fn post(url: &str) -> Attempt {
        let guard = guard(&["127.0.0.0/8"]);
        Poster::new(guard.clone()).unwrap().post(&Prepared::new(callback(url), &guard), &delivery(), Some(TRACE)).await
    }

    /// Answers one request with these bytes, waiting between them; returns what was asked.
    async fn endpoint(parts: Vec<Vec<u8>>) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?key=k-1", listener.local_addr().unwrap());
        let asked = tokio::spawn(async move {
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
            // Until the client gives up.
            let _ = stream.read(&mut [0; 1]).await;
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        (url, asked)
    }

    #[tokio::test]
    async fn a_webhook_on_the_wire() {
        let (url, asked) = endpoint(vec![b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()]).await;
        let attempt = post(&url).await;
        assert_eq!((attempt.status, &attempt.error, &attempt.response), (Some(204), &None, &None));
        let asked = asked.await.unwrap();
        let (head, body) = asked.split_once("\r\n\r\n").unwrap();
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

    #[test]
    fn a_secret_that_is_retiring_signs_until_its_time() {
        let old = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let mut callback = callback("http://127.0.0.1:1/");
        let until = Timestamp::from_millis(1_768_193_760_000);
        callback.retiring_secrets = vec![contract::process::RetiringSecret { secret: old.into(), until }];
        let to = Prepared::new(callback, &guard(&["127.0.0.0/8"]));
        let signatures = |millis| {
            let now = Timestamp::from_millis(millis);
            let request = request(&to, &delivery(), Some(TRACE), now).unwrap();
            let header = request.headers()["webhook-signature"].to_str().unwrap().to_owned();
            let by = |secrets: &[&str]| {
                let secrets = secrets.iter().map(|secret| (*secret).into()).collect::<Vec<contract::secret::Secret>>();
                signature(&secrets, &"02".repeat(12), now.unix_seconds(), br#"{"success":true}"#).unwrap()
            };
            (header, by(&[SECRET, old]), by(&[SECRET]))
        };
        let (header, both, _) = signatures(1_768_193_759_999);
        assert_eq!(header, both);
        let (header, _, new) = signatures(1_768_193_760_000);
        assert_eq!(header, new);
    }

    #[tokio::test]
    async fn what_a_failure_said_is_kept_as_far_as_it_can_be_shown() {
        let mut answer =
            b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 3000\r\n\r\nno t-1\0\xff".to_vec();
        answer.extend([b'x'; 2992]);
        let (url, _asked) = endpoint(vec![answer]).await;
        let attempt = post(&url).await;
        assert_eq!(attempt.status, Some(503));
        assert_eq!(attempt.error.unwrap(), "the endpoint answered 503 Service Unavailable");
        assert_eq!(attempt.retry_after.unwrap(), "7");
        let response = attempt.response.unwrap();
        assert!(response.starts_with("no ***\u{fffd}xxx"), "{response}");
        assert!(response.len() <= MAX_SHOWN + 2);
    }

    #[tokio::test]
    async fn a_redirect_is_a_failure() {
        let answer = b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec();
        let (url, _asked) = endpoint(vec![answer]).await;
        let attempt = post(&url).await;
        assert_eq!(attempt.error.unwrap(), "the endpoint answered 302 Found");
    }

    #[tokio::test]
    async fn an_answer_that_drips_or_floods_holds_nothing_up() {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        let mut drip = vec![head.clone()];
        drip.extend(vec![b"1\r\nx\r\n".to_vec(); 1000]);
        let mut flood = vec![[head, format!("{:x}\r\n", 100 << 20).into_bytes()].concat()];
        flood.extend(vec![vec![b'x'; 1 << 20]; 100]);
        for parts in [drip, flood] {
            let (url, _asked) = endpoint(parts).await;
            let begun = Instant::now();
            let attempt = post(&url).await;
            assert_eq!((attempt.status, attempt.error), (Some(200), None));
            assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
        }
    }

    #[tokio::test]
    async fn interim_answers_without_end_end_the_attempt() {
        let interim = b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n";
        let (url, _asked) = endpoint(vec![interim.repeat((16 << 20) / interim.len())]).await;
        let attempt = post(&url).await;
        let error = attempt.error.unwrap();
        assert!(error.ends_with("the answer has no end within 131072 bytes"), "{error}");

        let few = [&interim.repeat(100)[..], b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"].concat();
        let (url, _asked) = endpoint(vec![few]).await;
        let attempt = post(&url).await;
        assert_eq!((attempt.status, attempt.error), (Some(200), None));
    }

    #[tokio::test]
    async fn no_answer_and_no_endpoint_are_failures_that_do_not_tell_the_url() {
        let (url, _asked) = endpoint(vec![b"HTTP/1.1 200 ".to_vec()]).await;
        let attempt = post(&url).await;
        assert_eq!((attempt.status, attempt.error.as_deref()), (None, Some("no answer within 1 s")));

        let attempt = post("http://127.0.0.1:1/?key=k-1").await;
        let error = attempt.error.unwrap();
        assert!(error.contains("refused") && !error.contains("k-1"), "{error}");
    }

    /// Hosts as they may stand in a URL, by what they are; none of them may ever be connected to.
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
        ("not given out", &["[100::1]", "[4000::1]", "[1::1]", "[e000::1]"]),
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
            "zones and what is no address",
            &["[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1", "256.0.0.1", "1.2.3.4.5", "0x100000000"],
        ),
        ("names of this machine", &["localhost", "LOCALHOST", "localhost.", "loopback.example", "mapped.example"]),
        ("names of metadata services", &["metadata.google.internal", "metadata.google.internal.", "wire.example"]),
        ("names with several addresses, all internal", &["several.example"]),
        ("names without an address", &["nobody.example"]),
    ];

    /// The addresses of the names in the table.
    fn look_up(name: &str) -> Vec<std::net::SocketAddr> {
        let addresses: &[&str] = match name.trim_end_matches('.') {
            "localhost" => &["127.0.0.1", "::1"],
            "loopback.example" => &["127.0.0.2"],
            "mapped.example" => &["::ffff:127.0.0.1"],
            "metadata.google.internal" => &["169.254.169.254"],
            "wire.example" => &["168.63.129.16"],
            "several.example" => &["10.0.0.1", "fd00::1", "192.168.0.1"],
            _ => &[],
        };
        addresses.iter().map(|address| (address.parse::<std::net::IpAddr>().unwrap(), 0).into()).collect()
    }

    /// One that reaches what this guard allows, where `lookup` says that names are.
    fn poster_looking_up(
        allow: &[&str],
        lookup: impl Fn(String) -> Vec<std::net::SocketAddr> + Send + Sync + 'static,
    ) -> Poster {
        let lookup = move |name| std::future::ready(Ok(lookup(name)));
        Poster::resolving(Resolver::new(guard(allow), lookup)).unwrap()
    }

    #[tokio::test]
    async fn an_attempt_never_connects_to_an_internal_address() {
        let poster = poster_looking_up(&[], |name| look_up(&name));
        for (what, hosts) in REFUSED {
            for host in *hosts {
                for url in [format!("http://{host}/hook"), format!("https://{host}:8443/hook?key=k-1")] {
                    // A backslash ends the host: what stands behind is the path.
                    let to = Prepared::new(callback(&url), &guard(&[]));
                    let attempt = poster.post(&to, &delivery(), Some(TRACE)).await;
                    let error = attempt.error.unwrap_or_default();
                    assert!(error.starts_with("refused: "), "{what}: {host}: {error:?}, {:?}", attempt.status);
                    assert!(!error.contains("k-1"), "{error}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_name_that_changes_its_address_gains_nothing() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        // 127.0.0.2 stands for an address that is allowed, 127.0.0.1 for one that is not; the port is the same.
        let internal = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = internal.local_addr().unwrap().port();
        let allowed = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
        let lookups = Arc::new(AtomicUsize::new(0));
        let counted = lookups.clone();
        let poster = poster_looking_up(&["127.0.0.2/32"], move |_| {
            let allowed = counted.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
            vec![(if allowed { [127, 0, 0, 2] } else { [127, 0, 0, 1] }, 0).into()]
        });
        let answering = tokio::spawn(async move {
            loop {
                let (mut stream, _) = allowed.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
            }
        });
        let url = format!("http://rebinding.example:{port}/");
        let to = Prepared::new(callback(&url), &guard(&["127.0.0.2/32"]));
        for number in 0..10 {
            let attempt = poster.post(&to, &delivery(), Some(TRACE)).await;
            let error = attempt.error.unwrap_or_default();
            match number % 2 {
                0 => assert_eq!(attempt.status, Some(200), "{error}"),
                _ => assert_eq!(error, "refused: the address 127.0.0.1 is not allowed: loopback"),
            }
        }
        assert_eq!(lookups.load(Ordering::Relaxed), 10, "what was looked up is what was connected to");
        assert!(timeout(Duration::ZERO, internal.accept()).await.is_err(), "nobody came");
        answering.abort();
    }

    #[tokio::test]
    async fn the_system_s_names_are_checked_too() {
        let to = Prepared::new(callback("http://localhost:1/"), &guard(&[]));
        let error = Poster::new(guard(&[])).unwrap().post(&to, &delivery(), Some(TRACE)).await.error.unwrap();
        assert!(error.starts_with("refused: the address ") && error.ends_with(" is not allowed: loopback"), "{error}");
    }
}

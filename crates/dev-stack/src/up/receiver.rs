//! The demo's webhook receiver: accepts every POST, and shows the requests as a page (`GET /`) and as JSON
//! (`GET /received`).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use contract::{JsonObject, secret::Secret};
use maud::{Markup, html};
use serde::Serialize;
use serde_json::json;
use service_kit::clock;
use tokio::{sync::watch, time::timeout};
use webhook_notifier::signature;

/// Limits of the request log: the oldest requests are dropped first.
const MAX_REQUESTS: usize = 1000;
const MAX_BYTES: usize = 64 << 20;
/// Requests shown on the page.
const SHOWN: usize = 100;
/// The largest accepted body; events on NATS are smaller.
const BODY_LIMIT: usize = 8 << 20;

const PAGE: &str = include_str!("receiver.html");

/// A received request.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReceivedRequest {
    /// Path and query.
    pub(super) path: String,
    /// By lower-case name.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
    pub(super) received_at: String,
    /// Whether the signature is valid for the path's callback; `None` if the path belongs to no callback.
    #[serde(skip)]
    pub(super) verified: Option<bool>,
}

#[derive(Debug, Default)]
struct RequestLog {
    requests: VecDeque<Arc<ReceivedRequest>>,
    bytes: usize,
}

/// The receiver: its router and its readers share the request log.
#[derive(Debug, Clone)]
pub(super) struct Receiver {
    log: Arc<watch::Sender<RequestLog>>,
    secrets: Arc<BTreeMap<String, Secret>>,
}

impl Receiver {
    /// Creates a receiver that verifies signatures; `secrets` is keyed by path.
    pub(super) fn new(secrets: BTreeMap<String, Secret>) -> Self {
        Self { log: Arc::default(), secrets: Arc::new(secrets) }
    }

    pub(super) fn router(&self) -> Router {
        Router::new()
            .route("/received", get(list).post(receive))
            .route("/", get(page).post(receive))
            .fallback(receive)
            .layer(DefaultBodyLimit::max(BODY_LIMIT))
            .with_state(self.clone())
    }

    /// Waits for a request that matches.
    pub(super) async fn wait_for(
        &self,
        deadline: Duration,
        matches: impl Fn(&ReceivedRequest) -> bool,
    ) -> anyhow::Result<Arc<ReceivedRequest>> {
        let mut log = self.log.subscribe();
        let found = |log: &RequestLog| log.requests.iter().find(|request| matches(request)).cloned();
        let waiting = async {
            let log = log.wait_for(|log| found(log).is_some()).await.context("the receiver stopped")?;
            found(&log).context("the request was dropped from the log")
        };
        timeout(deadline, waiting).await.with_context(|| format!("no such request within {deadline:?}"))?
    }

    fn push(&self, request: ReceivedRequest) {
        self.log.send_modify(|log| {
            log.bytes += request.body.len();
            log.requests.push_back(Arc::new(request));
            while log.requests.len() > MAX_REQUESTS || (log.bytes > MAX_BYTES && log.requests.len() > 1) {
                if let Some(oldest) = log.requests.pop_front() {
                    log.bytes -= oldest.body.len();
                }
            }
        });
    }

    /// Checks the signature (Standard Webhooks) with the secret of the path.
    fn verify(&self, path: &str, headers: &HeaderMap, body: &[u8]) -> Option<bool> {
        let secret = self.secrets.get(path)?;
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let verify = || {
            let timestamp = text("webhook-timestamp")?.parse().ok()?;
            let expected = signature([secret], text("webhook-id")?, timestamp, body).ok()?;
            Some(text("webhook-signature")?.split(' ').any(|candidate| candidate == expected))
        };
        Some(verify().unwrap_or(false))
    }
}

async fn receive(
    State(receiver): State<Receiver>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    if method != Method::POST {
        return StatusCode::NOT_FOUND;
    }
    let mut named = BTreeMap::<String, String>::new();
    for (name, value) in &headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        named.entry(name.to_string()).and_modify(|all| all.extend([", ", &value])).or_insert_with(|| value.to_string());
    }
    receiver.push(ReceivedRequest {
        verified: receiver.verify(uri.path(), &headers, &body),
        path: uri.to_string(),
        headers: named,
        body: String::from_utf8_lossy(&body).into_owned(),
        received_at: clock::now().to_iso(),
    });
    StatusCode::OK
}

async fn list(State(receiver): State<Receiver>) -> Response {
    let received: Vec<_> = receiver.log.borrow().requests.iter().cloned().collect();
    let received: Vec<&ReceivedRequest> = received.iter().map(AsRef::as_ref).collect();
    match serde_json::to_string(&received) {
        Ok(json) => {
            ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], json).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

async fn page(State(receiver): State<Receiver>) -> Response {
    // The page loads nothing from other hosts; received content is escaped.
    const POLICY: &str =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    let received: Vec<_> = receiver.log.borrow().requests.iter().rev().take(SHOWN).cloned().collect();
    let headers: [(HeaderName, &str); 2] =
        [(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-store")];
    (headers, Html(PAGE.replace("<!--received-->", &rows(&received).0))).into_response()
}

fn rows(received: &[Arc<ReceivedRequest>]) -> Markup {
    html! {
        @if received.is_empty() { p.none { "Nothing received yet." } }
        @for request in received {
            @let (class, outcome) = match success(&request.body) {
                Some(true) => ("good", "succeeded"),
                Some(false) => ("bad", "failed"),
                None => ("", "received"),
            };
            article class=(class) {
                header {
                    b { (request.path) }
                    span class=(class) { (outcome) }
                    @match request.verified {
                        Some(true) => span.good { "signature verified" },
                        Some(false) => span.bad { "signature wrong" },
                        None => {},
                    }
                    time { (request.received_at) }
                }
                pre { (pretty(&request.body)) }
                details {
                    summary { (request.headers.len()) " headers" }
                    dl { @for (name, value) in &request.headers { dt { (name) } dd { (value) } } }
                }
            }
        }
    }
}

/// Prints an object with a line per member. Values are kept as text, so numbers keep their digits.
fn pretty(body: &str) -> String {
    let Ok(object) = JsonObject::from_text(body.to_owned()) else { return body.to_owned() };
    let members = object.members();
    let lines = members.iter().map(|(name, value)| format!("  {}: {}", json!(name), value.get()));
    format!("{{\n{}\n}}", lines.collect::<Vec<_>>().join(",\n"))
}

fn success(body: &str) -> Option<bool> {
    serde_json::from_str::<serde_json::Value>(body).ok()?.get("success")?.as_bool()
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    fn received(path: &str, body: &str) -> ReceivedRequest {
        ReceivedRequest {
            path: path.into(),
            headers: BTreeMap::from([("x-<i>".into(), "\"'&".into())]),
            body: body.into(),
            received_at: Timestamp::from_millis(0).to_iso(),
            verified: None,
        }
    }

    #[test]
    fn received_content_is_escaped_on_the_page() {
        let html = rows(&[Arc::new(received("/<b>", "<script>alert(1)</script>"))]).0;
        assert!(!html.contains("<script>") && !html.contains("/<b>") && !html.contains("x-<i>"), "{html}");
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{html}");
    }

    #[test]
    fn values_keep_their_digits() {
        let body = r#"{"b":{"n":100000000000000000000000000001.50},"a":[1, 2]}"#;
        let expected = "{\n  \"b\": {\"n\":100000000000000000000000000001.50},\n  \"a\": [1, 2]\n}";
        assert_eq!(pretty(body), expected);
        assert_eq!(pretty("plain"), "plain");
    }

    #[tokio::test]
    async fn the_oldest_requests_are_dropped_and_logged_ones_are_found_at_once() {
        let receiver = Receiver::new(BTreeMap::new());
        for n in 0..=MAX_REQUESTS {
            receiver.push(received("/", &n.to_string()));
        }
        assert_eq!(receiver.log.borrow().requests.len(), MAX_REQUESTS);
        assert_eq!(receiver.log.borrow().requests[0].body, "1");
        let short = Duration::from_millis(50);
        assert!(receiver.wait_for(short, |request| request.body == "0").await.is_err());
        assert!(receiver.wait_for(short, |request| request.body == "7").await.is_ok());
    }

    #[test]
    fn signatures_are_verified_on_paths_with_a_secret() {
        let secret = contract::process::new_signing_secret([7; 32]);
        let receiver = Receiver::new(BTreeMap::from([("/crm".into(), secret.clone())]));
        let mut headers = HeaderMap::new();
        assert_eq!(receiver.verify("/crm", &headers, b"{}"), Some(false));
        let right = signature(&[secret], "id", 5, b"{}").unwrap();
        for (name, value) in [("webhook-id", "id"), ("webhook-timestamp", "5"), ("webhook-signature", right.as_str())] {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        }
        assert_eq!(receiver.verify("/crm", &headers, b"{}"), Some(true));
        assert_eq!(receiver.verify("/crm", &headers, b"{ }"), Some(false));
        assert_eq!(receiver.verify("/other", &headers, b"{}"), None);
    }
}

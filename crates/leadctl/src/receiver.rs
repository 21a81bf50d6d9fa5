//! The demo's receiver: takes every POST, and shows what arrived to people (`GET /`) and to programs (`GET /received`).

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write,
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
use serde::Serialize;
use serde_json::json;
use service_kit::clock;
use tokio::{sync::watch, time::timeout};
use webhook_notifier::signature;

/// How much is kept: the oldest go first.
const MOST: usize = 1000;
const MOST_BYTES: usize = 64 << 20;
/// How many of them the page shows.
const SHOWN: usize = 100;
/// The longest body; NATS carries no longer event than this.
const BODY_LIMIT: usize = 8 << 20;

const PAGE: &str = include_str!("receiver.html");

/// A request that arrived.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Received {
    /// The path, with its query.
    pub(crate) path: String,
    /// The headers, by their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    /// The body as it came.
    pub(crate) body: String,
    /// When, ISO 8601.
    pub(crate) received_at: String,
    /// Whether its signature is that of its callback; not known where the path is no callback's.
    #[serde(skip)]
    pub(crate) verified: Option<bool>,
}

#[derive(Debug, Default)]
struct Shelf {
    received: VecDeque<Arc<Received>>,
    bytes: usize,
}

/// What arrived, shared with the server that takes it.
#[derive(Debug, Clone)]
pub(crate) struct Receiver {
    shelf: Arc<watch::Sender<Shelf>>,
    secrets: Arc<BTreeMap<String, Secret>>,
}

impl Receiver {
    /// A receiver that knows the signing secrets of these paths.
    pub(crate) fn new(secrets: BTreeMap<String, Secret>) -> Self {
        Self { shelf: Arc::default(), secrets: Arc::new(secrets) }
    }

    /// Its routes.
    pub(crate) fn router(&self) -> Router {
        Router::new()
            .route("/received", get(list).post(take))
            .route("/", get(page).post(take))
            .fallback(take)
            .layer(DefaultBodyLimit::max(BODY_LIMIT))
            .with_state(self.clone())
    }

    /// Waits for a request that fits.
    pub(crate) async fn wait_for(
        &self,
        deadline: Duration,
        fits: impl Fn(&Received) -> bool,
    ) -> anyhow::Result<Arc<Received>> {
        let mut shelf = self.shelf.subscribe();
        let found = |shelf: &Shelf| shelf.received.iter().find(|received| fits(received)).cloned();
        let waiting = async {
            let shelf = shelf.wait_for(|shelf| found(shelf).is_some()).await.context("the receiver is gone")?;
            found(&shelf).context("it came and went")
        };
        timeout(deadline, waiting).await.with_context(|| format!("it did not arrive within {deadline:?}"))?
    }

    fn keep(&self, received: Received) {
        self.shelf.send_modify(|shelf| {
            shelf.bytes += received.body.len();
            shelf.received.push_back(Arc::new(received));
            while shelf.received.len() > MOST || (shelf.bytes > MOST_BYTES && shelf.received.len() > 1) {
                if let Some(oldest) = shelf.received.pop_front() {
                    shelf.bytes -= oldest.body.len();
                }
            }
        });
    }

    /// Whether this is signed with the secret of its path, by Standard Webhooks.
    fn verify(&self, path: &str, headers: &HeaderMap, body: &[u8]) -> Option<bool> {
        let secret = self.secrets.get(path)?;
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let verify = || {
            let timestamp = text("webhook-timestamp")?.parse().ok()?;
            let expected = signature([secret], text("webhook-id")?, timestamp, body).ok()?;
            Some(text("webhook-signature")?.split(' ').any(|one| one == expected))
        };
        Some(verify().unwrap_or(false))
    }
}

async fn take(
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
    receiver.keep(Received {
        verified: receiver.verify(uri.path(), &headers, &body),
        path: uri.to_string(),
        headers: named,
        body: String::from_utf8_lossy(&body).into_owned(),
        received_at: clock::now().to_iso(),
    });
    StatusCode::OK
}

async fn list(State(receiver): State<Receiver>) -> Response {
    let received: Vec<_> = receiver.shelf.borrow().received.iter().cloned().collect();
    let received: Vec<&Received> = received.iter().map(AsRef::as_ref).collect();
    match serde_json::to_string(&received) {
        Ok(json) => {
            ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], json).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

async fn page(State(receiver): State<Receiver>) -> Response {
    // The page needs nothing from elsewhere, and nothing that arrived becomes a part of it but as text.
    const POLICY: &str =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    let received: Vec<_> = receiver.shelf.borrow().received.iter().rev().take(SHOWN).cloned().collect();
    let headers: [(HeaderName, &str); 2] =
        [(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-store")];
    (headers, Html(PAGE.replace("<!--received-->", &rows(&received)))).into_response()
}

/// What arrived, newest first, as HTML.
fn rows(received: &[Arc<Received>]) -> String {
    if received.is_empty() {
        return "<p class=\"none\">Nothing has arrived yet.</p>".into();
    }
    let mut html = String::new();
    for one in received {
        // Writing to a string cannot fail.
        let _ = write_row(&mut html, one);
    }
    html
}

fn write_row(html: &mut String, one: &Received) -> std::fmt::Result {
    let (class, outcome) = match success(&one.body) {
        Some(true) => ("good", "succeeded"),
        Some(false) => ("bad", "failed"),
        None => ("", "received"),
    };
    let signed = match one.verified {
        Some(true) => "<span class=\"good\">signature verified</span>",
        Some(false) => "<span class=\"bad\">signature wrong</span>",
        None => "",
    };
    write!(
        html,
        "<article class=\"{class}\"><header><b>{}</b><span class=\"{class}\">{outcome}</span>{signed}<time>{}</time>\
         </header><pre>{}</pre><details><summary>{} headers</summary><dl>",
        escape(&one.path),
        escape(&one.received_at),
        escape(&laid_out(&one.body)),
        one.headers.len(),
    )?;
    for (name, value) in &one.headers {
        write!(html, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value))?;
    }
    html.push_str("</dl></details></article>");
    Ok(())
}

/// An object with a line per member; its values stay as they came, to the last digit.
fn laid_out(body: &str) -> String {
    let Ok(object) = JsonObject::from_text(body.to_owned()) else { return body.to_owned() };
    let members = object.members();
    let lines = members.iter().map(|(name, value)| format!("  {}: {}", json!(name), value.get()));
    format!("{{\n{}\n}}", lines.collect::<Vec<_>>().join(",\n"))
}

fn success(body: &str) -> Option<bool> {
    serde_json::from_str::<serde_json::Value>(body).ok()?.get("success")?.as_bool()
}

/// Text that is nothing but text in HTML.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut safe, c| {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
        safe
    })
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    fn received(path: &str, body: &str) -> Received {
        Received {
            path: path.into(),
            headers: BTreeMap::from([("x-<i>".into(), "\"'&".into())]),
            body: body.into(),
            received_at: Timestamp::from_millis(0).to_iso(),
            verified: None,
        }
    }

    #[test]
    fn what_arrives_is_text_on_the_page() {
        let html = rows(&[Arc::new(received("/<b>", "<script>alert(1)</script>"))]);
        assert!(!html.contains("<script>") && !html.contains("/<b>") && !html.contains("x-<i>"), "{html}");
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{html}");
    }

    #[test]
    fn values_stay_as_they_came() {
        let body = r#"{"b":{"n":100000000000000000000000000001.50},"a":[1, 2]}"#;
        let expected = "{\n  \"b\": {\"n\":100000000000000000000000000001.50},\n  \"a\": [1, 2]\n}";
        assert_eq!(laid_out(body), expected);
        assert_eq!(laid_out("plain"), "plain");
    }

    #[tokio::test]
    async fn the_oldest_go_first_and_what_is_there_is_found_at_once() {
        let receiver = Receiver::new(BTreeMap::new());
        for n in 0..=MOST {
            receiver.keep(received("/", &n.to_string()));
        }
        assert_eq!(receiver.shelf.borrow().received.len(), MOST);
        assert_eq!(receiver.shelf.borrow().received[0].body, "1");
        let short = Duration::from_millis(50);
        assert!(receiver.wait_for(short, |one| one.body == "0").await.is_err());
        assert!(receiver.wait_for(short, |one| one.body == "7").await.is_ok());
    }

    #[test]
    fn signatures_are_checked_where_the_secret_is_known() {
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

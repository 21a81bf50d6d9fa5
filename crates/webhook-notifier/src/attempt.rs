//! 7 Deliver, 8 Retry: one POST to a callback.
//!
//! The endpoint took it when the head of its answer says 2xx before the callback's deadline. The answer's body is read
//! only so far as it is short and comes at once: to keep the connection, and to show what a failure said. An endpoint
//! that drips or floods its answer holds nothing up and fills nothing.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use contract::process::{Callback, CallbackAuth};
use reqwest::{
    Client, Request, Response,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
    redirect,
};
use rustls::{ClientConfig, RootCertStore};
use service_kit::{clock, nats::chain};
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    delivery::{Attempt, Delivery},
    guard::{Guard, Refused},
    sign::signature,
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
/// Idle connections kept per host.
const MAX_IDLE_PER_HOST: usize = 32;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
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

/// The HTTP client for callbacks.
#[derive(Debug, Clone)]
pub(crate) struct Poster {
    client: Client,
    guard: Guard,
}

impl Poster {
    /// A client that reaches what the guard allows, and trusts the system's CA certificates.
    pub(crate) fn new(guard: Guard) -> anyhow::Result<Self> {
        let client = Client::builder()
            .tls_backend_preconfigured(tls()?)
            .dns_resolver(guard.clone())
            .user_agent(concat!("Leadrelay/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            // A redirect leads where nobody checked; its answer is a failure.
            .redirect(redirect::Policy::none())
            // A proxy would resolve names behind the guard's back.
            .no_proxy()
            .referer(false)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
            .build()
            .context("cannot make the HTTP client")?;
        Ok(Self { client, guard })
    }

    /// Makes one attempt.
    pub(crate) async fn post(&self, callback: &Callback, delivery: &Delivery) -> Attempt {
        let started_at = clock::now();
        let begun = Instant::now();
        let deadline = begun + Duration::from_secs(callback.timeout_seconds.into());
        let answer = async {
            let request = self.request(callback, delivery, started_at.unix_seconds())?;
            match timeout_at(deadline, self.client.execute(request)).await {
                Ok(Ok(response)) => Ok(response),
                Ok(Err(e)) => Err(no_answer(e)),
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
                let body = shown(&read(response).await);
                let attempt = Attempt { status: Some(status.as_u16()), ..attempt };
                if status.is_success() {
                    attempt
                } else {
                    let error = Some(format!("the endpoint answered {status}"));
                    Attempt { error, response: body, retry_after, ..attempt }
                }
            }
            Err(failure) => Attempt { error: Some(failure.to_string()), ..attempt },
        }
    }

    fn request(&self, callback: &Callback, delivery: &Delivery, timestamp: u32) -> Result<Request, Failure> {
        let url = self.guard.check_url(&callback.url)?;
        let headers = headers(callback, delivery, timestamp).map_err(Failure::NotSent)?;
        let body = Bytes::from_owner(Arc::<[u8]>::from(delivery.body.clone()));
        self.client.post(url).headers(headers).body(body).build().map_err(no_answer)
    }
}

/// The headers of a webhook.
fn headers(callback: &Callback, delivery: &Delivery, timestamp: u32) -> Result<HeaderMap, String> {
    let id = delivery.update_id.to_string();
    let signature =
        signature(&callback.secrets, &id, timestamp, delivery.body.as_bytes()).map_err(|e| e.to_string())?;
    let text = |text: &str| HeaderValue::from_str(text).map_err(|e| e.to_string());
    let secret = |value: &str| {
        let mut value = HeaderValue::from_str(value).map_err(|_| "the callback's auth is not a header value")?;
        value.set_sensitive(true);
        Ok::<_, String>(value)
    };
    let mut headers = HeaderMap::new();
    match &callback.auth {
        Some(CallbackAuth::Bearer { token }) => {
            headers.insert(AUTHORIZATION, secret(&format!("Bearer {token}"))?);
        }
        Some(CallbackAuth::Header { name, value }) => {
            let name = HeaderName::try_from(name).map_err(|_| "the callback's auth is not a header name")?;
            headers.insert(name, secret(value)?);
        }
        None => {}
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-id", text(&id)?);
    headers.insert("webhook-timestamp", timestamp.into());
    headers.insert("webhook-signature", text(&signature)?);
    if let Some(traceparent) = &delivery.traceparent {
        headers.insert(contract::headers::TRACEPARENT, text(traceparent)?);
    }
    Ok(headers)
}

/// rustls with ring, and the system's CA certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
fn tls() -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for e in &found.errors {
        tracing::debug!("CA certificates: {e}");
    }
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        tracing::warn!("no CA certificates found: https callbacks will fail until there are some");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("cannot set TLS up")?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Says what went wrong, without the URL: it may hold a secret.
fn no_answer(error: reqwest::Error) -> Failure {
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        if let Some(refused) = inner.downcast_ref::<Refused>() {
            return Failure::Refused(refused.clone());
        }
        cause = inner.source();
    }
    // The outermost layer only says that a request failed.
    let error = error.without_url();
    Failure::NoAnswer(match std::error::Error::source(&error) {
        Some(source) => chain(source),
        None => error.to_string(),
    })
}

/// The beginning of an answer's body, as far as it comes at once.
async fn read(mut response: Response) -> Vec<u8> {
    let mut shown = Vec::new();
    let mut length = 0;
    let read = async {
        while length < MAX_BODY
            && let Ok(Some(chunk)) = response.chunk().await
        {
            length += chunk.len();
            shown.extend_from_slice(&chunk[..chunk.len().min(MAX_SHOWN - shown.len())]);
        }
    };
    // Running out of time is no failure: what counts was in the head.
    let _ = timeout(BODY_PATIENCE, read).await;
    shown
}

/// Bytes as text that Postgres can hold; none when there are none.
fn shown(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes).replace('\0', "");
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
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        }
    }

    fn poster() -> Poster {
        Poster::new(Guard { allow_networks: vec!["127.0.0.0/8".parse().unwrap()], allow_http: true }).unwrap()
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
        let poster = poster();
        let attempt = poster.post(&callback(&url), &delivery()).await;
        assert_eq!((attempt.status, &attempt.error, &attempt.response), (Some(204), &None, &None));
        drop(poster);
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

    #[tokio::test]
    async fn what_a_failure_said_is_kept_as_far_as_it_can_be_shown() {
        let mut answer =
            b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 3000\r\n\r\nno\0\xff".to_vec();
        answer.extend([b'x'; 2996]);
        let (url, _asked) = endpoint(vec![answer]).await;
        let attempt = poster().post(&callback(&url), &delivery()).await;
        assert_eq!(attempt.status, Some(503));
        assert_eq!(attempt.error.unwrap(), "the endpoint answered 503 Service Unavailable");
        assert_eq!(attempt.retry_after.unwrap(), "7");
        let response = attempt.response.unwrap();
        assert!(response.starts_with("no\u{fffd}xxx"), "{response}");
        assert!(response.len() <= MAX_SHOWN + 2);
    }

    #[tokio::test]
    async fn a_redirect_is_a_failure() {
        let answer = b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec();
        let (url, _asked) = endpoint(vec![answer]).await;
        let attempt = poster().post(&callback(&url), &delivery()).await;
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
            let attempt = poster().post(&callback(&url), &delivery()).await;
            assert_eq!((attempt.status, attempt.error), (Some(200), None));
            assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
        }
    }

    #[tokio::test]
    async fn no_answer_and_no_endpoint_are_failures_that_do_not_tell_the_url() {
        let (url, _asked) = endpoint(vec![b"HTTP/1.1 200 ".to_vec()]).await;
        let attempt = poster().post(&callback(&url), &delivery()).await;
        assert_eq!((attempt.status, attempt.error.as_deref()), (None, Some("no answer within 1 s")));

        let attempt = poster().post(&callback("http://127.0.0.1:1/?key=k-1"), &delivery()).await;
        let error = attempt.error.unwrap();
        assert!(error.contains("refused") && !error.contains("k-1"), "{error}");
    }

    #[tokio::test]
    async fn an_internal_address_is_refused_by_number_and_by_name() {
        let poster = Poster::new(Guard { allow_networks: vec![], allow_http: true }).unwrap();
        for url in ["http://127.0.0.1:1/", "http://localhost:1/"] {
            let error = poster.post(&callback(url), &delivery()).await.error.unwrap();
            assert!(
                error.starts_with("refused: the address ") && error.ends_with(" is not allowed: loopback"),
                "{error}"
            );
        }
    }
}

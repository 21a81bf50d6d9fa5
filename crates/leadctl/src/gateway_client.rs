//! The gateway as its clients see it: HTTP with an API key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use contract::rpc::RpcError;
use reqwest::{Method, RequestBuilder, Response, StatusCode, header::RETRY_AFTER};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// How long an answer may take: more than the gateway gives itself.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long nothing may come of an answer that is a stream: more than the gateway is silent.
const SILENCE: Duration = Duration::from_secs(30);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// A client of the gateway.
#[derive(Clone)]
pub(crate) struct Gateway {
    http: reqwest::Client,
    url: String,
    key: String,
}

/// What the gateway answered.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// When to ask again, where the gateway says that.
    pub(crate) retry_after: Option<Duration>,
    pub(crate) body: String,
}

/// The body of an error.
#[derive(Deserialize)]
struct Refusal {
    error: String,
    code: String,
}

impl Gateway {
    /// A client of the gateway at `url`, under this key.
    pub(crate) fn new(url: &str, key: &str) -> anyhow::Result<Self> {
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls()?)
            .user_agent(concat!("leadctl/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE);
        // A proxy does not know what is on this machine.
        if ["://127.", "://localhost", "://[::1]"].iter().any(|local| url.contains(local)) {
            builder = builder.no_proxy();
        }
        let http = builder.build().context("cannot make the HTTP client")?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned(), key: key.to_owned() })
    }

    /// `GET` on a path with its query.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(self.request(Method::GET, path).timeout(TIMEOUT)).await
    }

    /// `POST` of a JSON body.
    pub(crate) async fn post<B: Serialize>(&self, path: &str, body: &B) -> anyhow::Result<Answer> {
        self.post_with(path, body, &BTreeMap::new(), Duration::ZERO).await
    }

    /// The same with headers, where the answer may take so much longer.
    pub(crate) async fn post_with<B: Serialize>(
        &self,
        path: &str,
        body: &B,
        headers: &BTreeMap<&str, String>,
        longer: Duration,
    ) -> anyhow::Result<Answer> {
        let body = serde_json::to_string(body).context("cannot write the request as JSON")?;
        let mut request = self.request(Method::POST, path).timeout(TIMEOUT + longer);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        self.send(request.header("content-type", "application/json").body(body)).await
    }

    /// `POST` of updates, a line each. What is sent again under the same key is the same.
    pub(crate) async fn bulk(&self, key: &str, body: Bytes) -> anyhow::Result<Answer> {
        let request = self.request(Method::POST, "/api/v1/leads/update/bulk");
        let request = request.header("content-type", "application/x-ndjson");
        self.send(request.header("idempotency-key", format!("\"{key}\"")).body(body)).await
    }

    /// The project's events behind this one, as they come.
    pub(crate) async fn events(&self, behind: Option<&str>) -> anyhow::Result<Response> {
        let mut request = self.request(Method::GET, "/api/v1/events");
        if let Some(id) = behind {
            request = request.header("last-event-id", id);
        }
        request.send().await.with_context(|| self.away())
    }

    /// Reads an answer to its end.
    pub(crate) async fn read(&self, response: Response) -> anyhow::Result<Answer> {
        let status = response.status();
        let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.text().await.with_context(|| self.away())?;
        Ok(Answer { status, retry_after: seconds.map(Duration::from_secs), body })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Answer> {
        self.read(request.send().await.with_context(|| self.away())?).await
    }

    fn away(&self) -> String {
        format!("the gateway does not answer on {}", self.url)
    }
}

impl Answer {
    /// The body of a success.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        if !self.status.is_success() {
            return Err(self.refusal());
        }
        serde_json::from_str(&self.body).with_context(|| format!("the gateway's answer is odd: {}", self.body))
    }

    /// What the gateway said against it.
    pub(crate) fn refusal(&self) -> anyhow::Error {
        let status = self.status.as_u16();
        match serde_json::from_str(&self.body) {
            Ok(Refusal { error, code }) => {
                anyhow!(RpcError::new(status, &code, error)).context(format!("the gateway answered {status} {code}"))
            }
            Err(_) => anyhow!("the gateway answered {status}: {}", self.body),
        }
    }

    /// The `code` of an error.
    pub(crate) fn code(&self) -> Option<String> {
        serde_json::from_str(&self.body).ok().map(|Refusal { code, .. }| code)
    }
}

/// rustls with ring, and the system's CA certificates.
pub(crate) fn tls() -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("cannot set TLS up")?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

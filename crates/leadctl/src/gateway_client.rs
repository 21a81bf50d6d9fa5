//! The gateway as its clients see it: HTTP with an API key.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use contract::rpc::RpcError;
use reqwest::{Method, StatusCode};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// How long an answer may take: more than the gateway gives itself.
const TIMEOUT: Duration = Duration::from_secs(20);

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
            .timeout(TIMEOUT);
        // A proxy does not know what is on this machine.
        if ["://127.", "://localhost", "://[::1]"].iter().any(|local| url.contains(local)) {
            builder = builder.no_proxy();
        }
        let http = builder.build().context("cannot make the HTTP client")?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned(), key: key.to_owned() })
    }

    /// `GET` on a path with its query.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send(Method::GET, path, None).await
    }

    /// `POST` of a JSON body.
    pub(crate) async fn post<B: Serialize>(&self, path: &str, body: &B) -> anyhow::Result<Answer> {
        let body = serde_json::to_string(body).context("cannot write the request as JSON")?;
        self.send(Method::POST, path, Some(body)).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<String>) -> anyhow::Result<Answer> {
        let url = format!("{}{path}", self.url);
        let mut request = self.http.request(method, &url).bearer_auth(&self.key);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let answer = async {
            let response = request.send().await?;
            let status = response.status();
            Ok::<_, reqwest::Error>(Answer { status, body: response.text().await? })
        };
        answer.await.with_context(|| format!("the gateway does not answer on {}", self.url))
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

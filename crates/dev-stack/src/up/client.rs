//! A plain HTTP client for the gateway of this stack.

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http::{
    Method, Request, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub(super) struct GatewayClient {
    http: Client<HttpConnector, Full<Bytes>>,
    url: String,
    key: String,
}

pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) body: String,
}

impl GatewayClient {
    pub(super) fn new(url: &str, key: &str) -> Self {
        let http = Client::builder(TokioExecutor::new()).build_http();
        Self { http, url: url.to_owned(), key: key.to_owned() }
    }

    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Response> {
        self.send(Method::GET, path, String::new()).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Response> {
        self.send(Method::POST, path, body.to_string()).await
    }

    async fn send(&self, method: Method, path: &str, body: String) -> anyhow::Result<Response> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(AUTHORIZATION, format!("Bearer {}", self.key))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .context("cannot build the request")?;
        let no_answer = || format!("the gateway on {} does not answer", self.url);
        let response = self.http.request(request).await.with_context(no_answer)?;
        let status = response.status();
        let body = response.into_body().collect().await.with_context(no_answer)?.to_bytes();
        Ok(Response { status, body: String::from_utf8_lossy(&body).into_owned() })
    }
}

impl Response {
    /// Parses the body of a success.
    pub(super) fn json<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        if !self.status.is_success() {
            return Err(self.error());
        }
        serde_json::from_str(&self.body).with_context(|| format!("unexpected answer of the gateway: {}", self.body))
    }

    pub(super) fn error(&self) -> anyhow::Error {
        anyhow!("the gateway answered {}: {}", self.status, self.body)
    }

    pub(super) fn has_code(&self, code: &str) -> bool {
        serde_json::from_str::<Value>(&self.body).is_ok_and(|body| body["code"] == code)
    }
}

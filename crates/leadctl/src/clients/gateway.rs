//! HTTP client of the gateway.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use contract::rpc::{ErrorCode, RpcError};
use http_api::ErrorResponse;
use reqwest::{Method, RequestBuilder, Response, StatusCode, header::RETRY_AFTER};
use serde::{Serialize, de::DeserializeOwned};
use service_kit::tls;

/// Longer than the gateway's own deadline.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long the event stream may be silent: longer than the gateway's heartbeat interval.
const EVENTS_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a bulk response may be silent: longer than the gateway waits for the admission of a chunk, 30 s, for its
/// rate and for the log.
const BULK_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(crate) struct GatewayClient {
    http: reqwest::Client,
    /// With [`EVENTS_TIMEOUT`]. A timeout of a client's reads also limits the wait for a response, so that other
    /// requests, which may wait for an outcome, need a client without it.
    events: reqwest::Client,
    /// With [`BULK_TIMEOUT`].
    bulk: reqwest::Client,
    url: String,
    key: String,
}

pub(crate) struct GatewayResponse {
    pub(crate) status: StatusCode,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) body: String,
}

impl GatewayClient {
    pub(crate) fn new(url: &str, key: &str) -> anyhow::Result<Self> {
        let tls = tls::client()?;
        // A proxy cannot reach this machine's loopback addresses.
        let is_local = ["://127.", "://localhost", "://[::1]"].iter().any(|local| url.contains(local));
        let client = |read_timeout: Option<Duration>| {
            let builder = reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(concat!("leadctl/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT);
            let builder = if is_local { builder.no_proxy() } else { builder };
            let builder = read_timeout.into_iter().fold(builder, reqwest::ClientBuilder::read_timeout);
            builder.build().context("cannot create the HTTP client")
        };
        Ok(Self {
            http: client(None)?,
            events: client(Some(EVENTS_TIMEOUT))?,
            bulk: client(Some(BULK_TIMEOUT))?,
            url: url.trim_end_matches('/').to_owned(),
            key: key.to_owned(),
        })
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<GatewayResponse> {
        self.send(self.request(&self.http, Method::GET, path).timeout(TIMEOUT)).await
    }

    /// `POST` of a JSON body; `longer` is added to the timeout.
    pub(crate) async fn post<B: Serialize>(
        &self,
        path: &str,
        body: &B,
        headers: &BTreeMap<&str, String>,
        longer: Duration,
    ) -> anyhow::Result<GatewayResponse> {
        let body = serde_json::to_string(body).context("cannot write the request as JSON")?;
        let request = self.request_with(Method::POST, path, headers, longer);
        self.send(request.header("content-type", "application/json").body(body)).await
    }

    /// `DELETE`; `longer` is added to the timeout.
    pub(crate) async fn delete(
        &self,
        path: &str,
        headers: &BTreeMap<&str, String>,
        longer: Duration,
    ) -> anyhow::Result<GatewayResponse> {
        self.send(self.request_with(Method::DELETE, path, headers, longer)).await
    }

    /// Sends updates as NDJSON. Repeating the request with the same idempotency key creates no further updates.
    pub(crate) async fn bulk(&self, key: &str, body: Bytes) -> anyhow::Result<GatewayResponse> {
        let request = self.request(&self.bulk, Method::POST, "/api/v1/leads/update/bulk");
        let request = request.header("content-type", "application/x-ndjson");
        self.send(request.header("idempotency-key", format!("\"{key}\"")).body(body)).await
    }

    /// Opens the event stream after the event `last_id`, or at its end.
    pub(crate) async fn events(&self, last_id: Option<&str>) -> anyhow::Result<Response> {
        let mut request = self.request(&self.events, Method::GET, "/api/v1/events");
        if let Some(id) = last_id {
            request = request.header("last-event-id", id);
        }
        request.send().await.with_context(|| self.no_answer())
    }

    pub(crate) async fn read(&self, response: Response) -> anyhow::Result<GatewayResponse> {
        let status = response.status();
        let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.text().await.with_context(|| self.no_answer())?;
        Ok(GatewayResponse { status, retry_after: seconds.map(Duration::from_secs), body })
    }

    fn request(&self, client: &reqwest::Client, method: Method, path: &str) -> RequestBuilder {
        client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    fn request_with(
        &self,
        method: Method,
        path: &str,
        headers: &BTreeMap<&str, String>,
        longer: Duration,
    ) -> RequestBuilder {
        let request = self.request(&self.http, method, path).timeout(TIMEOUT + longer);
        headers.iter().fold(request, |request, (name, value)| request.header(*name, value))
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<GatewayResponse> {
        self.read(request.send().await.with_context(|| self.no_answer())?).await
    }

    fn no_answer(&self) -> String {
        format!("the gateway at {} does not answer", self.url)
    }
}

impl GatewayResponse {
    /// Whether the same request may succeed later.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            || self.status.is_server_error()
    }

    /// Parses the body of a success.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        if !self.status.is_success() {
            return Err(self.error());
        }
        serde_json::from_str(&self.body).with_context(|| format!("unexpected answer of the gateway: {}", self.body))
    }

    pub(crate) fn error(&self) -> anyhow::Error {
        let status = self.status.as_u16();
        match serde_json::from_str(&self.body) {
            Ok(ErrorResponse { error, code, .. }) => anyhow!(RpcError::received(status, &code, error))
                .context(format!("the gateway answered {status} {code}")),
            // From a proxy in front of the gateway.
            Err(_) if matches!(status, 502..=504) => {
                let message = format!("the gateway answered {status}: {}", self.body);
                RpcError::new(ErrorCode::Unavailable, message).into()
            }
            Err(_) => anyhow!("the gateway answered {status}: {}", self.body),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time,
    };

    use super::*;

    /// Answers one request after this time, which passes at once.
    async fn answer_after(listener: TcpListener, delay: Duration) -> TcpStream {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        assert!(connection.read(&mut request).await.unwrap() > 0);
        time::pause();
        time::sleep(delay).await;
        time::resume();
        connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        connection
    }

    #[tokio::test]
    async fn a_response_may_take_longer_than_the_outcome_that_it_waits_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let gateway = GatewayClient::new(&url, "key").unwrap();
        let (wait, body, headers) = (Duration::from_secs(30), serde_json::json!({}), BTreeMap::new());

        let answer = gateway.post("/api/v1/leads/update", &body, &headers, wait);
        let (answer, _connection) = tokio::join!(answer, answer_after(listener, wait + Duration::from_secs(5)));

        assert_eq!(answer.unwrap().status, StatusCode::OK);
    }
}

//! A client of the gateway's HTTP API. Changes of leads, deliveries and configuration go through it with the visitor's
//! API key, so that the key's rate limits and checks apply.

use std::time::Duration;

use anyhow::Context;
use contract::{rpc::TEST_TIMEOUT, secret::Secret};
use http_api::ErrorResponse;
use reqwest::{Method, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use crate::fault::Fault;

/// Longer than the gateway's own deadline: a test takes as long as the callback's endpoint.
const TIMEOUT: Duration = TEST_TIMEOUT.saturating_add(Duration::from_secs(5));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of the gateway.
#[derive(Debug)]
pub(crate) struct Gateway {
    http: reqwest::Client,
    url: String,
}

/// A request to the gateway.
#[derive(Debug)]
pub(crate) struct GatewayRequest {
    method: Method,
    path: String,
    body: String,
    headers: Vec<(&'static str, String)>,
}

impl GatewayRequest {
    /// A `POST` with a JSON body.
    pub(crate) fn post(path: impl Into<String>, body: &impl Serialize) -> Result<Self, Fault> {
        let body = serde_json::to_string(body).map_err(|e| Fault::Invalid(e.to_string()))?;
        Ok(Self { body, ..Self::new(Method::POST, path) })
    }

    /// The same request with a JSON body.
    pub(crate) fn json(self, body: String) -> Self {
        Self { body, ..self }
    }

    /// A request without a body.
    pub(crate) fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), body: String::new(), headers: vec![] }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl Gateway {
    /// # Errors
    /// TLS cannot be set up.
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(service_kit::tls::client()?)
            .user_agent(concat!("leadrelay-console/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            // Proxy variables of the environment are ignored: the gateway is inside the installation.
            .no_proxy()
            .build()
            .context("cannot create the HTTP client")?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned() })
    }

    /// Sends a request with this key, and reads the response.
    pub(crate) async fn send<T: DeserializeOwned>(&self, key: &Secret, request: GatewayRequest) -> Result<T, Fault> {
        let GatewayRequest { method, path, body, headers } = request;
        let request = self.http.request(method, format!("{}{path}", self.url)).bearer_auth(key.expose());
        let request =
            if body.is_empty() { request } else { request.header("content-type", "application/json").body(body) };
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
        let unavailable = |e: reqwest::Error| {
            tracing::warn!("the gateway at {} does not answer: {e}", self.url);
            if e.is_connect() {
                return Fault::NotSent(
                    "The gateway cannot be reached: nothing was done. Try again in a moment.".into(),
                );
            }
            Fault::Unavailable(
                "The gateway does not answer. Check whether the change was made before you repeat it.".into(),
            )
        };
        let response = request.send().await.map_err(unavailable)?;
        let status = response.status();
        let body = response.text().await.map_err(unavailable)?;
        if !status.is_success() {
            return Err(fault(status, &body));
        }
        serde_json::from_str(&body).map_err(|e| {
            tracing::error!("the gateway's response to {path} cannot be read: {e}");
            Fault::Unavailable(
                "The gateway's response cannot be read: its version may differ from the console's.".into(),
            )
        })
    }
}

/// The fault of an error response.
fn fault(status: StatusCode, body: &str) -> Fault {
    let text = match serde_json::from_str(body) {
        Ok(ErrorResponse { error, code, .. }) => format!("{error} ({code})"),
        Err(_) => format!("The gateway answered {status}."),
    };
    match status.as_u16() {
        401 | 403 => Fault::Refused(text),
        404 => Fault::NotFound(text),
        429 => Fault::TooMany(text),
        500.. => Fault::Unavailable(text),
        _ => Fault::Invalid(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_gateway_that_cannot_be_reached_received_nothing() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let gateway = Gateway::new(&format!("http://{address}")).unwrap();

        let refused = gateway.send::<()>(&"lr_1".into(), GatewayRequest::new(Method::POST, "/")).await;

        assert!(matches!(refused, Err(Fault::NotSent(_))), "{refused:?}");
    }

    #[test]
    fn an_error_of_the_gateway_keeps_its_text_and_code() {
        let body = r#"{"success":false,"error":"It is pending","code":"delivery_pending","requestId":"1"}"#;
        let fault = |status| fault(StatusCode::from_u16(status).unwrap(), body);
        assert_eq!(fault(409), Fault::Invalid("It is pending (delivery_pending)".into()));
        assert_eq!([401, 404, 410, 429, 503].map(|status| fault(status).status().as_u16()), [403, 404, 400, 429, 503]);
        assert_eq!(
            super::fault(StatusCode::BAD_GATEWAY, "<html>").to_string(),
            "The gateway answered 502 Bad Gateway."
        );
    }
}

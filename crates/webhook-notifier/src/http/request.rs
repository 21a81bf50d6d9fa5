//! The request of a delivery: URL, authentication, signature and trace.

use std::sync::{Arc, OnceLock};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use contract::{
    Timestamp,
    process::{Callback, CallbackAuth, Oauth2Client},
};
use http::{
    Request, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT},
};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use super::{
    guard::{Guard, Refused},
    pool::ConnectionPool,
    signature::signature,
};
use crate::core::delivery::PendingDelivery;

pub(crate) const LEADRELAY: &str = concat!("Leadrelay/", env!("CARGO_PKG_VERSION"));

/// Why there is no response.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("refused: {0}")]
    Refused(#[from] Refused),
    #[error("not sent: {0}")]
    NotSent(String),
    #[error("no response within {0} s")]
    TimedOut(u32),
    #[error("no response: {0}")]
    NoResponse(String),
    #[error("no token: {0}")]
    NoToken(String),
}

/// A callback with its secrets in clear, and the parts that all its requests share.
#[derive(Debug)]
pub(crate) struct PreparedCallback {
    pub(crate) callback: Callback,
    /// URL and authentication; or why the callback cannot be called.
    target: Result<Target, RequestError>,
    /// Its connections, if it has a client certificate. They end with the revision of its process.
    pub(super) own_pool: OnceLock<Result<ConnectionPool, String>>,
}

#[derive(Debug)]
struct Target {
    uri: Uri,
    /// The headers of the authentication, without an access token, because it changes.
    headers: HeaderMap,
    /// Set for a callback whose authentication is an access token.
    token_endpoint: Option<Uri>,
}

impl PreparedCallback {
    pub(crate) fn new(callback: Callback, guard: &Guard) -> Self {
        let target = target(&callback, guard);
        Self { callback, target, own_pool: OnceLock::new() }
    }

    /// Host and port of the URL.
    pub(crate) fn server(&self) -> Option<(&str, u16)> {
        server(&self.target.as_ref().ok()?.uri)
    }

    pub(crate) fn uri(&self) -> Result<&Uri, RequestError> {
        self.target.as_ref().map(|target| &target.uri).map_err(Clone::clone)
    }

    /// The OAuth client and the token endpoint of the callback; `None` for other kinds of authentication.
    pub(crate) fn token_endpoint(&self) -> Option<(&Oauth2Client, &Uri)> {
        match (&self.callback.auth, &self.target) {
            (Some(CallbackAuth::Oauth2(client)), Ok(Target { token_endpoint: Some(uri), .. })) => Some((client, uri)),
            _ => None,
        }
    }

    /// The request of a delivery, signed with every secret that is valid now. `authorization` is the access token.
    pub(crate) fn request(
        &self,
        delivery: &PendingDelivery,
        traceparent: Option<&str>,
        now: Timestamp,
        authorization: Option<&HeaderValue>,
    ) -> Result<Request<Full<Bytes>>, RequestError> {
        let Target { uri, headers: auth, .. } = self.target.as_ref().map_err(Clone::clone)?;
        let not_sent = |e: &dyn std::fmt::Display| RequestError::NotSent(e.to_string());
        let id = delivery.kind.webhook_id(delivery.update_id);
        let (secrets, timestamp) = (self.callback.signing_secrets(now), now.unix_seconds());
        let signature = signature(secrets, &id, timestamp, delivery.body.as_bytes()).map_err(|e| not_sent(&e))?;
        let value = |text: &str| HeaderValue::from_str(text).map_err(|e| not_sent(&e));
        let mut headers = HeaderMap::with_capacity(16);
        headers.insert(USER_AGENT, HeaderValue::from_static(LEADRELAY));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("webhook-id", value(&id)?);
        headers.insert("webhook-timestamp", timestamp.into());
        headers.insert("webhook-signature", value(&signature)?);
        if let Some(traceparent) = traceparent {
            headers.insert(contract::headers::TRACEPARENT, value(traceparent)?);
        }
        headers.extend(auth.iter().map(|(name, value)| (name.clone(), value.clone())));
        headers.extend(authorization.map(|value| (AUTHORIZATION, value.clone())));
        let body = Bytes::from_owner(Arc::<[u8]>::from(delivery.body.clone()));
        let mut request = Request::post(uri.clone()).body(Full::new(body)).map_err(|e| not_sent(&e))?;
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// Host and port of a URL.
pub(crate) fn server(uri: &Uri) -> Option<(&str, u16)> {
    let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
    Some((uri.host()?, uri.port_u16().unwrap_or(default)))
}

/// A header value that logs do not show.
pub(crate) fn secret_value(text: &str) -> Result<HeaderValue, RequestError> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| RequestError::NotSent("the callback's auth is not a valid header value".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The headers of a callback's authentication, without an access token.
fn auth_headers(callback: &Callback) -> Result<HeaderMap, RequestError> {
    let mut headers = HeaderMap::new();
    let mut insert = |name: &str, value: &str| {
        let name = HeaderName::try_from(name)
            .map_err(|_| RequestError::NotSent("the callback's auth is not a valid header name".into()))?;
        headers.insert(name, secret_value(value)?);
        Ok::<_, RequestError>(())
    };
    for header in &callback.headers {
        insert(&header.name, header.value.expose())?;
    }
    match &callback.auth {
        Some(CallbackAuth::Bearer { token }) => {
            insert(AUTHORIZATION.as_str(), &Zeroizing::new(format!("Bearer {}", token.expose())))?;
        }
        Some(CallbackAuth::Header { name, value }) => insert(name, value.expose())?,
        Some(CallbackAuth::Oauth2(_)) | None => {}
    }
    Ok(headers)
}

fn target(callback: &Callback, guard: &Guard) -> Result<Target, RequestError> {
    let mut url = guard.check_url(&callback.url)?;
    let mut headers = auth_headers(callback)?;
    let token_endpoint = match &callback.auth {
        Some(CallbackAuth::Oauth2(client)) => Some(token_endpoint(client, guard)?),
        _ => None,
    };
    if !url.username().is_empty() || url.password().is_some() {
        let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let both = [decoded(url.username()), b":".to_vec(), decoded(url.password().unwrap_or_default())].concat();
        if !headers.contains_key(AUTHORIZATION) && token_endpoint.is_none() {
            headers.insert(AUTHORIZATION, secret_value(&format!("Basic {}", BASE64_STANDARD.encode(both)))?);
        }
        // Fails only for URLs without a host; this one has a user.
        let _ = (url.set_username(""), url.set_password(None));
    }
    // A fragment is not part of a request.
    url.set_fragment(None);
    let uri =
        url.as_str().parse().map_err(|_| RequestError::NotSent("the URL is not a valid request target".into()))?;
    Ok(Target { uri, headers, token_endpoint })
}

fn token_endpoint(client: &Oauth2Client, guard: &Guard) -> Result<Uri, RequestError> {
    let refused = |e: Refused| RequestError::NoToken(RequestError::Refused(e).to_string());
    let mut url = guard.check_url(&client.token_url).map_err(refused)?;
    url.set_fragment(None);
    url.as_str().parse().map_err(|_| RequestError::NoToken("the URL is not a valid request target".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::client::tests::{SECRET, TRACE, callback, delivery, guard};

    #[test]
    fn a_retiring_secret_signs_until_its_end() {
        let old = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let mut callback = callback("http://127.0.0.1:1/");
        let until = Timestamp::from_millis(1_768_193_760_000);
        callback.retiring_secrets = vec![contract::process::RetiringSecret { secret: old.into(), until }];
        let prepared = PreparedCallback::new(callback, &guard(&["127.0.0.0/8"]));
        let signatures = |millis| {
            let now = Timestamp::from_millis(millis);
            let request = prepared.request(&delivery(), Some(TRACE), now, None).unwrap();
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
}

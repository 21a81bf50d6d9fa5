//! Configuration: the authentication of a callback, from its spec and the stored callback that it replaces. Pure.
//!
//! An absent secret keeps the stored one only if it is still sent to the same origin in the same way. Otherwise an API
//! key that may change URLs could redirect the secret to another endpoint.

use std::time::Duration;

use contract::{
    Timestamp,
    process::{AuthHeader, Callback, CallbackAuth, CallbackSpec, ClientCertificate, Process, have_same_origin},
    rpc::{ErrorCode, RpcError},
    text::quoted,
    warning::Warning,
};

/// How long before the expiry of a certificate the warning begins.
const EXPIRY_NOTICE: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// The `auth` of a callback. An access token goes to the callback's URL, so the client secret of OAuth 2.0 is bound to
/// the origins of both URLs.
pub(super) fn auth_from_spec(spec: &CallbackSpec, before: Option<&Callback>) -> Result<Option<CallbackAuth>, RpcError> {
    let Some(auth) = spec.auth.as_ref().filter(|auth| auth.secret().is_empty()) else { return Ok(spec.auth.clone()) };
    let kept = same_origin(spec, before).and_then(|before| before.auth.as_ref()).filter(|before| before.is_like(auth));
    let kept = kept.ok_or_else(|| missing(spec, "auth"))?.secret();
    if kept.is_sealed() {
        return Err(locked(spec, "auth"));
    }
    let mut auth = auth.clone();
    *auth.secret_mut() = kept.clone();
    Ok(Some(auth))
}

/// The `headers` of a callback.
pub(super) fn headers_from_spec(spec: &CallbackSpec, before: Option<&Callback>) -> Result<Vec<AuthHeader>, RpcError> {
    let before = same_origin(spec, before);
    let header = |header: &AuthHeader| {
        if !header.value.is_empty() {
            return Ok(header.clone());
        }
        let mut stored = before.iter().flat_map(|before| &before.headers);
        match stored.find(|stored| stored.name.eq_ignore_ascii_case(&header.name)) {
            None => Err(missing(spec, &format!("headers: {}", header.name))),
            Some(kept) if kept.value.is_sealed() => Err(locked(spec, "headers")),
            Some(kept) => Ok(AuthHeader { value: kept.value.clone(), ..header.clone() }),
        }
    };
    spec.headers.iter().map(header).collect()
}

/// The client certificate of a callback. A key is kept for the same certificate.
pub(super) fn certificate_from_spec(
    spec: &CallbackSpec,
    before: Option<&Callback>,
) -> Result<Option<ClientCertificate>, RpcError> {
    let given = spec.client_certificate.as_ref();
    let Some(certificate) = given.filter(|given| given.key.is_empty()) else { return Ok(given.cloned()) };
    let kept = same_origin(spec, before).and_then(|before| before.client_certificate.as_ref());
    match kept.filter(|kept| kept.certificate == certificate.certificate) {
        None => Err(missing(spec, "clientCertificate")),
        Some(kept) if kept.key.is_sealed() => Err(locked(spec, "clientCertificate")),
        Some(kept) => Ok(Some(kept.clone())),
    }
}

/// Warnings about client certificates that have expired, or will soon.
pub(super) fn certificate_warnings(process: &Process, now: Timestamp) -> Vec<String> {
    let expiry = |callback: &Callback| {
        let expires_at = callback.client_certificate.as_ref()?.expires_at()?;
        let warning = || Warning::CERTIFICATE_EXPIRES.with(&[&quoted(&callback.name), &expires_at.to_iso()]);
        (expires_at < now.plus(EXPIRY_NOTICE)).then(warning)
    };
    process.callbacks.iter().filter_map(expiry).collect()
}

/// The stored callback, if its secrets are still sent to the same origin.
fn same_origin<'a>(spec: &CallbackSpec, before: Option<&'a Callback>) -> Option<&'a Callback> {
    before.filter(|before| have_same_origin(&before.url, &spec.url))
}

fn missing(spec: &CallbackSpec, member: &str) -> RpcError {
    let message = format!(
        "callback {:?}: {member}: its secret is missing; it can be absent only if the callback has one that is sent to \
         the same scheme, host and port in the same way",
        spec.name
    );
    RpcError::new(ErrorCode::InvalidProcess, message)
}

fn locked(spec: &CallbackSpec, member: &str) -> RpcError {
    let message = format!("the secret in {member} of callback {:?} cannot be opened: send it again", spec.name);
    RpcError::new(ErrorCode::SecretsLocked, message)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(url: &str, auth: &Value, headers: &Value) -> CallbackSpec {
        serde_json::from_value(json!({"name": "a", "url": url, "auth": auth, "headers": headers})).unwrap()
    }

    fn stored() -> Callback {
        serde_json::from_value(
            json!({"callbackId": "050505050505050505050505", "name": "a", "url": "https://a.example/x",
            "auth": {"type": "oauth2", "tokenUrl": "https://id.example/token", "clientId": "c", "clientSecret": "s",
                     "scope": "before"},
            "headers": [{"name": "X-Key", "value": "v"}, {"name": "X-Other", "value": "o"}]}),
        )
        .unwrap()
    }

    #[test]
    fn absent_header_values_are_kept_by_name_for_the_same_origin() {
        let headers =
            |url: &str, headers: Value| headers_from_spec(&spec(url, &json!(null), &headers), Some(&stored()));
        let kept = headers("https://a.example/y", json!([{"name": "x-key"}, {"name": "X-New", "value": "n"}])).unwrap();
        let kept: Vec<_> = kept.iter().map(|header| (header.name.as_str(), header.value.expose())).collect();
        assert_eq!(kept, [("x-key", "v"), ("X-New", "n")]);
        assert_eq!(headers("https://a.example/y", json!([])).unwrap(), []);
        for (url, name) in [("https://b.example", "X-Key"), ("https://a.example", "X-Unknown")] {
            let e = headers(url, json!([{ "name": name }])).unwrap_err();
            assert!(e.status == 400 && e.message.contains(&format!("headers: {name}: its secret is missing")), "{e}");
        }
    }

    #[test]
    fn an_absent_client_secret_is_kept_for_the_same_client_and_both_origins() {
        let auth = |url: &str, token_url: &str, client_id: &str| {
            let auth = json!({"type": "oauth2", "tokenUrl": token_url, "clientId": client_id, "scope": "after"});
            auth_from_spec(&spec(url, &auth, &json!([])), Some(&stored()))
        };
        let Some(CallbackAuth::Oauth2(kept)) = auth("https://a.example/y", "https://id.example/v2", "c").unwrap()
        else {
            panic!("another authentication");
        };
        assert_eq!((kept.client_secret.expose(), kept.scope.as_deref()), ("s", Some("after")));
        for (url, token_url, client_id) in [
            ("https://b.example", "https://id.example/token", "c"),
            ("https://a.example", "https://evil.example/token", "c"),
            ("https://a.example", "http://id.example/token", "c"),
            ("https://a.example", "https://id.example/token", "other"),
        ] {
            let e = auth(url, token_url, client_id).unwrap_err();
            assert!(e.status == 400 && e.message.contains("auth: its secret is missing"), "{e}");
        }
    }
}

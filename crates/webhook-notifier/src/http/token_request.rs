//! The request of an access token, and its response (RFC 6749, sections 2.3.1, 4.4 and 5).

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use contract::{
    process::{ClientAuthentication, Oauth2Client},
    secret::Secret,
};
use http::{
    Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT},
};
use http_body_util::Full;
use serde::Deserialize;
use url::form_urlencoded::{Serializer, byte_serialize};
use zeroize::Zeroizing;

use super::request::{LEADRELAY, RequestError, secret_value};

/// The lifetime of a token if the server does not state it. A longer one sends more expired tokens; a shorter one
/// requests more tokens.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Maximum time that a token is used. A longer time keeps using the token of a removed client.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest token, in bytes. Longer ones cost memory for each callback, and few servers accept such headers.
const MAX_TOKEN: usize = 16 * 1024;
/// How much of an error text of the server is shown, in characters.
const MAX_SHOWN: usize = 200;

/// An access token as a server granted it.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) token: Secret,
    pub(crate) lifetime: Duration,
}

/// The credentials of a client for HTTP Basic: id and secret are form-encoded first.
fn basic_credentials(client: &Oauth2Client) -> Zeroizing<String> {
    let encoded = |text: &str| Zeroizing::new(byte_serialize(text.as_bytes()).collect::<String>());
    let (id, secret) = (encoded(&client.client_id), encoded(client.client_secret.expose()));
    Zeroizing::new(BASE64_STANDARD.encode(format!("{}:{}", *id, *secret)))
}

pub(crate) fn token_request(client: &Oauth2Client, endpoint: &Uri) -> Result<Request<Full<Bytes>>, RequestError> {
    let mut form = Serializer::new(String::new());
    form.append_pair("grant_type", "client_credentials");
    for (name, value) in [("scope", &client.scope), ("audience", &client.audience)] {
        if let Some(value) = value {
            form.append_pair(name, value);
        }
    }
    let is_basic = client.client_authentication == ClientAuthentication::ClientSecretBasic;
    if !is_basic {
        form.append_pair("client_id", &client.client_id);
        form.append_pair("client_secret", client.client_secret.expose());
    }
    let mut request = Request::post(endpoint.clone())
        .body(Full::new(Bytes::from(form.finish())))
        .map_err(|e| RequestError::NotSent(e.to_string()))?;
    let headers = request.headers_mut();
    headers.insert(USER_AGENT, HeaderValue::from_static(LEADRELAY));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    if is_basic {
        let value = Zeroizing::new(format!("Basic {}", *basic_credentials(client)));
        headers.insert(AUTHORIZATION, secret_value(&value)?);
    }
    Ok(request)
}

/// The members of a response that the client uses.
#[derive(Deserialize)]
struct TokenResponse {
    access_token: Secret,
    token_type: String,
    expires_in: Option<Seconds>,
}

/// Some servers send the number as a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(f64),
    Text(String),
}

#[derive(Deserialize, Default)]
struct ErrorResponse {
    error: Option<String>,
    error_description: Option<String>,
}

/// The token in a response.
///
/// # Errors
/// Why there is none, with the server's error code.
pub(crate) fn parse_grant(client: &Oauth2Client, status: StatusCode, body: &[u8]) -> Result<Grant, String> {
    if !status.is_success() {
        let answered = format!("the token endpoint answered {status}");
        let ErrorResponse { error, error_description } = serde_json::from_slice(body).unwrap_or_default();
        let Some(code) = error else { return Err(answered) };
        let description = error_description.map(|text| format!(" ({})", shown(&text, client))).unwrap_or_default();
        return Err(format!("{answered}: {}{description}", shown(&code, client)));
    }
    // The error of the parser could quote the token.
    let response: TokenResponse = serde_json::from_slice(body).map_err(
        |_| "the response of the token endpoint is not JSON with access_token and token_type, as RFC 6749 requires",
    )?;
    let TokenResponse { access_token: token, token_type, expires_in } = response;
    if !token_type.eq_ignore_ascii_case("bearer") {
        let token_type = shown(&token_type, client);
        return Err(format!(
            "the token endpoint granted a token of type {token_type}, and only bearer tokens can be sent"
        ));
    }
    let text = token.expose();
    if !(1..=MAX_TOKEN).contains(&text.len()) || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "the token endpoint granted a token that is not 1 to {MAX_TOKEN} visible ASCII characters"
        ));
    }
    let seconds = match expires_in {
        None => DEFAULT_LIFETIME.as_secs_f64(),
        Some(Seconds::Number(seconds)) => seconds,
        Some(Seconds::Text(text)) => text.parse().unwrap_or_default(),
    };
    let lifetime = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(MAX_LIFETIME).min(MAX_LIFETIME);
    Ok(Grant { token, lifetime })
}

/// The beginning of a text of the server, without control characters and without the client's secret, which the server
/// may echo.
fn shown(text: &str, client: &Oauth2Client) -> String {
    let secret = client.client_secret.expose();
    let encoded = Zeroizing::new(byte_serialize(secret.as_bytes()).collect::<String>());
    let basic = basic_credentials(client);
    let mut text = text.to_owned();
    for secret in [basic.as_str(), secret, encoded.as_str()].into_iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "***");
    }
    text.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn client(rest: &str) -> Oauth2Client {
        let text =
            format!(r#"{{"tokenUrl":"https://id.example/token","clientId":"a b","clientSecret":"s:+/é"{rest}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    async fn request(client: &Oauth2Client) -> (Option<String>, String) {
        let request = token_request(client, &client.token_url.parse().unwrap()).unwrap();
        assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/token"));
        assert_eq!(request.headers()[CONTENT_TYPE], "application/x-www-form-urlencoded");
        let authorization = request.headers().get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
        assert!(!format!("{request:?}").contains("YSti"), "{request:?}");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        (authorization, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_client_authenticates_with_basic_or_in_the_body() {
        let (authorization, body) = request(&client(r#","scope":"x y","audience":"crm""#)).await;
        let credentials = BASE64_STANDARD.encode("a+b:s%3A%2B%2F%C3%A9");
        assert_eq!(authorization, Some(format!("Basic {credentials}")));
        assert_eq!(body, "grant_type=client_credentials&scope=x+y&audience=crm");

        let (authorization, body) = request(&client(r#","clientAuthentication":"client_secret_post""#)).await;
        assert_eq!(authorization, None);
        assert_eq!(body, "grant_type=client_credentials&client_id=a+b&client_secret=s%3A%2B%2F%C3%A9");
    }

    #[test]
    fn a_granted_token_has_a_bounded_lifetime() {
        for (rest, lifetime) in [
            (r#","expires_in":3600"#, 3600),
            (r#","expires_in":"60""#, 60),
            ("", 300),
            (r#","expires_in":null"#, 300),
            (r#","expires_in":0"#, 0),
            (r#","expires_in":-5"#, 0),
            (r#","expires_in":"soon""#, 0),
            (r#","expires_in":1e300,"scope":"x""#, 86_400),
        ] {
            let body = format!(r#"{{"access_token":"t","token_type":"BEARER"{rest}}}"#);
            let grant = parse_grant(&client(""), StatusCode::OK, body.as_bytes()).unwrap();
            assert_eq!((grant.token.expose(), grant.lifetime), ("t", Duration::from_secs(lifetime)), "{rest}");
        }
    }

    #[test]
    fn a_response_without_a_token_says_why_and_shows_no_secret() {
        let long = format!(r#"{{"access_token":"{}","token_type":"bearer"}}"#, "x".repeat(MAX_TOKEN + 1));
        let echo = r#"{"error":"invalid_client","error_description":"no s:+/é, no s%3A%2B%2F%C3%A9, no YStiOnMlM0ElMkIlMkYlQzMlQTk=\n!"}"#;
        for (status, body, expected) in [
            (401, echo, "the token endpoint answered 401 Unauthorized: invalid_client (no ***, no ***, no ***!)"),
            (400, r#"{"error":"invalid_scope"}"#, "the token endpoint answered 400 Bad Request: invalid_scope"),
            (503, "<html>", "the token endpoint answered 503 Service Unavailable"),
            (302, "", "the token endpoint answered 302 Found"),
            (
                200,
                r#"{"access_token":"s3cret","token_type":7}"#,
                "the response of the token endpoint is not JSON with access_token and token_type, as RFC 6749 requires",
            ),
            (
                200,
                r#"{"access_token":"t","token_type":"mac"}"#,
                "the token endpoint granted a token of type mac, and only bearer tokens can be sent",
            ),
            (
                200,
                r#"{"access_token":"a\r\nb","token_type":"bearer"}"#,
                "the token endpoint granted a token that is not 1 to 16384 visible ASCII characters",
            ),
            (200, &long, "the token endpoint granted a token that is not 1 to 16384 visible ASCII characters"),
        ] {
            let refused = parse_grant(&client(""), StatusCode::from_u16(status).unwrap(), body.as_bytes());
            assert_eq!(refused.unwrap_err(), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_responses_never_panic(body: Vec<u8>, expires_in: f64, token in ".*") {
            let _ = parse_grant(&client(""), StatusCode::OK, &body);
            let text = serde_json::json!({"access_token": token, "token_type": "bearer", "expires_in": expires_in});
            let _ = parse_grant(&client(""), StatusCode::OK, text.to_string().as_bytes());
        }
    }
}

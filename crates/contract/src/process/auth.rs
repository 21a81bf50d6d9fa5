//! How a callback authenticates to its endpoint, in addition to the signature: a token, headers, OAuth 2.0.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use url::Url;

use super::{MAX_AUTH_BYTES, MAX_AUTH_HEADERS, MAX_NAME_CHARS, MAX_OAUTH2_BYTES, UrlFault, header_fault, parse_url};
use crate::{secret::Secret, text::quoted};

/// How to authenticate to an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum CallbackAuth {
    /// `Authorization: Bearer {token}`.
    Bearer {
        /// The token. Empty where secrets are not shown; leave it empty in a specification to keep the current one.
        #[serde(default, skip_serializing_if = "Secret::is_empty")]
        token: Secret,
    },
    /// Another header.
    Header {
        /// Its name.
        name: String,
        /// Its value. Empty where secrets are not shown; leave it empty in a specification to keep the current one.
        #[serde(default, skip_serializing_if = "Secret::is_empty")]
        value: Secret,
    },
    /// `Authorization: Bearer` and an access token of an OAuth 2.0 authorization server, by client credentials
    /// (RFC 6749, section 4.4).
    Oauth2(Oauth2Client),
}

impl CallbackAuth {
    /// Its secret.
    pub fn secret(&self) -> &Secret {
        match self {
            Self::Bearer { token } => token,
            Self::Header { value, .. } => value,
            Self::Oauth2(client) => &client.client_secret,
        }
    }

    /// Its secret, for changing it.
    pub fn secret_mut(&mut self) -> &mut Secret {
        match self {
            Self::Bearer { token } => token,
            Self::Header { value, .. } => value,
            Self::Oauth2(client) => &mut client.client_secret,
        }
    }

    /// Whether the secrets of both are sent in the same way: in the same header, or for the same client to the same
    /// authorization server.
    pub fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bearer { .. }, Self::Bearer { .. }) => true,
            (Self::Header { name, .. }, Self::Header { name: other, .. }) => name.eq_ignore_ascii_case(other),
            (Self::Oauth2(client), Self::Oauth2(other)) => {
                client.client_id == other.client_id && have_same_origin(&client.token_url, &other.token_url)
            }
            _ => false,
        }
    }

    /// The header that the authentication sets.
    fn header(&self) -> &str {
        match self {
            Self::Bearer { .. } | Self::Oauth2(_) => "authorization",
            Self::Header { name, .. } => name,
        }
    }
}

/// A client of an OAuth 2.0 authorization server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(rename_all = "camelCase")]
pub struct Oauth2Client {
    /// The token endpoint.
    #[cfg_attr(feature = "schema", schemars(length(max = super::MAX_URL_BYTES)))]
    pub token_url: String,
    /// The client's id.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_NAME_CHARS)))]
    pub client_id: String,
    /// The client's secret. Empty where secrets are not shown; leave it empty in a specification to keep the current
    /// one.
    #[serde(default, skip_serializing_if = "Secret::is_empty")]
    pub client_secret: Secret,
    /// The scopes to request, separated by spaces; absent means the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_OAUTH2_BYTES)))]
    pub scope: Option<String>,
    /// The `audience` to request, for servers that need one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_OAUTH2_BYTES)))]
    pub audience: Option<String>,
    /// How the client authenticates to the token endpoint.
    #[serde(default, skip_serializing_if = "ClientAuthentication::is_basic")]
    pub client_authentication: ClientAuthentication,
}

/// How a client authenticates to a token endpoint (RFC 6749, section 2.3.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ClientAuthentication {
    /// With HTTP Basic.
    #[default]
    ClientSecretBasic,
    /// With `client_id` and `client_secret` in the body.
    ClientSecretPost,
}

impl ClientAuthentication {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    fn is_basic(&self) -> bool {
        *self == Self::ClientSecretBasic
    }
}

/// A header with a secret value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(rename_all = "camelCase")]
pub struct AuthHeader {
    /// Its name.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_NAME_CHARS)))]
    pub name: String,
    /// Its value. Empty where secrets are not shown; leave it empty in a specification to keep the current one.
    #[serde(default, skip_serializing_if = "Secret::is_empty")]
    pub value: Secret,
}

/// Whether two URLs have the same scheme, host and port.
pub fn have_same_origin(one: &str, other: &str) -> bool {
    matches!((Url::parse(one), Url::parse(other)), (Ok(one), Ok(other)) if one.origin() == other.origin())
}

/// The faults of a callback's `auth` and `headers`, one sentence each.
pub(super) fn faults(auth: Option<&CallbackAuth>, headers: &[AuthHeader]) -> Vec<String> {
    let mut faults = Vec::new();
    match auth {
        None => {}
        Some(CallbackAuth::Bearer { token }) => check_secret("auth.token", token, &mut faults),
        Some(CallbackAuth::Header { name, value }) => {
            check_header_name("auth.name", name, &mut faults);
            check_secret("auth.value", value, &mut faults);
        }
        Some(CallbackAuth::Oauth2(client)) => client.check(&mut faults),
    }
    if headers.len() > MAX_AUTH_HEADERS {
        faults.push(format!("headers: {} are given, and at most {MAX_AUTH_HEADERS} are allowed", headers.len()));
        return faults;
    }
    // Servers that speak CGI read `_` as `-`.
    let normalized = |name: &str| name.to_ascii_lowercase().replace('_', "-");
    let mut names: HashSet<_> = auth.iter().map(|auth| normalized(auth.header())).collect();
    for header in headers {
        check_header_name("headers: a name", &header.name, &mut faults);
        check_secret("headers: a value", &header.value, &mut faults);
        if !names.insert(normalized(&header.name)) {
            faults.push(format!("headers: {} is set twice, in auth or headers", quoted(&header.name)));
        }
    }
    faults
}

impl Oauth2Client {
    fn check(&self, faults: &mut Vec<String>) {
        match parse_url(&self.token_url) {
            Ok(_) => {}
            // The URL contains a secret.
            Err(UrlFault::UserInfo) => faults.push("auth.tokenUrl contains a user or password".into()),
            Err(e) => faults.push(format!("auth.tokenUrl {} {e}", quoted(&self.token_url))),
        }
        if !(1..=MAX_NAME_CHARS).contains(&self.client_id.len()) || !is_visible(&self.client_id) {
            faults.push(format!("auth.clientId must be 1 to {MAX_NAME_CHARS} visible ASCII characters"));
        }
        check_secret("auth.clientSecret", &self.client_secret, faults);
        for (member, value) in [("auth.scope", &self.scope), ("auth.audience", &self.audience)] {
            let is_valid = |value: &String| (1..=MAX_OAUTH2_BYTES).contains(&value.len()) && is_visible(value);
            if !value.as_ref().is_none_or(is_valid) {
                faults.push(format!("{member} must be 1 to {MAX_OAUTH2_BYTES} visible ASCII characters"));
            }
        }
    }
}

fn is_visible(text: &str) -> bool {
    text.bytes().all(|b| (0x20..0x7f).contains(&b))
}

fn check_header_name(member: &str, name: &str, faults: &mut Vec<String>) {
    if name.chars().nth(MAX_NAME_CHARS).is_some() {
        faults.push(format!("{member} has more than {MAX_NAME_CHARS} characters"));
    } else if let Some(why) = header_fault(name) {
        let member = member.trim_end_matches(": a name");
        let separator = if member == "headers" { ": " } else { " " };
        faults.push(format!("{member}{separator}{} {why}", quoted(name)));
    }
}

fn check_secret(member: &str, secret: &Secret, faults: &mut Vec<String>) {
    if secret.is_sealed() {
        let why = "this one is sealed and opens only in the callback it was copied from";
        let member = member.split(['.', ':']).next().unwrap_or_default();
        faults.push(format!("{member}: the secret must be in clear; {why}"));
    }
    let text = secret.expose();
    if text.len() > MAX_AUTH_BYTES {
        faults.push(format!("{member} has {} bytes, and at most {MAX_AUTH_BYTES} are allowed", text.len()));
    } else if !is_visible(text) {
        faults.push(format!("{member} must be visible ASCII characters"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn faults_of(auth: Value, headers: Value) -> String {
        let auth: Option<CallbackAuth> = serde_json::from_value(auth).unwrap();
        let headers: Vec<AuthHeader> = serde_json::from_value(headers).unwrap();
        faults(auth.as_ref(), &headers).join("; ")
    }

    fn oauth2(change: impl FnOnce(&mut Value)) -> Value {
        let mut auth = json!({"type": "oauth2", "tokenUrl": "https://id.example/token", "clientId": "c",
            "clientSecret": "s"});
        change(&mut auth);
        auth
    }

    #[test]
    fn an_oauth2_client_has_this_wire_form() {
        let text = r#"{"type":"oauth2","tokenUrl":"https://id.example/token","clientId":"c","clientSecret":"s","scope":"a b","audience":"crm","clientAuthentication":"client_secret_post"}"#;
        let auth: CallbackAuth = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&auth).unwrap(), text);
        assert!(!format!("{auth:?}").contains(r#""s""#));
        let basic = oauth2(|_| ());
        let parsed: CallbackAuth = serde_json::from_value(basic.clone()).unwrap();
        assert_eq!(serde_json::to_value(parsed).unwrap(), basic);
    }

    #[test]
    fn faults_of_headers_and_oauth2_are_listed() {
        let header = |name: &str| json!({"name": name, "value": "v"});
        let bearer = json!({"type": "bearer", "token": "t"});
        let eleven: Vec<_> = (0..11).map(|n| header(&format!("X-{n}"))).collect();
        for (auth, headers, expected) in [
            (json!(null), json!(eleven[..10]), ""),
            (json!(null), json!(eleven), "headers: 11 are given, and at most 10 are allowed"),
            (bearer.clone(), json!([header("X-Key"), header("X-Key-2")]), ""),
            (bearer, json!([header("authorization")]), r#"headers: "authorization" is set twice, in auth or headers"#),
            (
                json!(null),
                json!([header("X-Key"), header("x_key")]),
                r#"headers: "x_key" is set twice, in auth or headers"#,
            ),
            (json!(null), json!([header("Host")]), r#"headers: "Host" is a header that webhooks set themselves"#),
            (
                json!(null),
                json!([header("Proxy-Authorization")]),
                r#"headers: "Proxy-Authorization" belongs to the connection, not to the request"#,
            ),
            (
                json!(null),
                json!([{"name": "X-Key", "value": "x".repeat(4097)}]),
                "headers: a value has 4097 bytes, and at most 4096 are allowed",
            ),
            (
                json!(null),
                json!([{"name": "X-Key", "value": "sealed:v1:00000000:AA"}]),
                "headers: the secret must be in clear; this one is sealed and opens only in the callback it was copied from",
            ),
            (oauth2(|_| ()), json!([header("X-Key")]), ""),
            (
                oauth2(|auth| auth["tokenUrl"] = json!("https://u:secret@id.example")),
                json!([]),
                "auth.tokenUrl contains a user or password",
            ),
            (
                oauth2(|auth| auth["tokenUrl"] = json!("id.example")),
                json!([]),
                r#"auth.tokenUrl "id.example" is not an http or https URL"#,
            ),
            (
                oauth2(|auth| auth["clientId"] = json!("")),
                json!([]),
                "auth.clientId must be 1 to 255 visible ASCII characters",
            ),
            (
                oauth2(|auth| auth["scope"] = json!("x".repeat(1025))),
                json!([]),
                "auth.scope must be 1 to 1024 visible ASCII characters",
            ),
            (
                oauth2(|auth| auth["clientSecret"] = json!("a\nb")),
                json!([]),
                "auth.clientSecret must be visible ASCII characters",
            ),
        ] {
            assert_eq!(faults_of(auth, headers), expected);
        }
    }

    #[test]
    fn a_client_secret_belongs_to_its_client_and_server() {
        let auth = |value: Value| serde_json::from_value::<CallbackAuth>(value).unwrap();
        let before = auth(oauth2(|_| ()));
        assert!(before.is_like(&auth(oauth2(|auth| auth["scope"] = json!("other")))));
        assert!(before.is_like(&auth(oauth2(|auth| auth["tokenUrl"] = json!("https://id.example/v2/token")))));
        assert!(!before.is_like(&auth(oauth2(|auth| auth["tokenUrl"] = json!("https://evil.example/token")))));
        assert!(!before.is_like(&auth(oauth2(|auth| auth["clientId"] = json!("other")))));
        assert!(!before.is_like(&auth(json!({"type": "bearer"}))));
    }
}

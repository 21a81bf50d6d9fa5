//! Strict forms of the parts that specifications and stored processes share. In a specification an unknown field is a
//! mistake; in a stored process a newer version wrote it.

use serde::{Deserialize, Deserializer};

use super::{
    AuthHeader, CallbackAuth, ClientAuthentication, ClientCertificate, FilterCondition, Oauth2Client, State, StateKind,
};
use crate::secret::Secret;

#[derive(Deserialize)]
#[serde(remote = "State", rename_all = "camelCase", deny_unknown_fields)]
struct StateFields {
    name: String,
    #[serde(default)]
    kind: StateKind,
    #[serde(default)]
    takes_disposition: Option<bool>,
}

#[derive(Deserialize)]
#[serde(remote = "CallbackAuth", tag = "type", rename_all = "camelCase", deny_unknown_fields)]
enum AuthFields {
    Bearer {
        #[serde(default)]
        token: Secret,
    },
    Header {
        name: String,
        #[serde(default)]
        value: Secret,
    },
    Oauth2(#[serde(deserialize_with = "Oauth2Fields::deserialize")] Oauth2Client),
}

#[derive(Deserialize)]
#[serde(remote = "Oauth2Client", rename_all = "camelCase", deny_unknown_fields)]
struct Oauth2Fields {
    token_url: String,
    client_id: String,
    #[serde(default)]
    client_secret: Secret,
    #[serde(default)]
    scope: Option<String>,
    #[serde(default)]
    audience: Option<String>,
    #[serde(default)]
    client_authentication: ClientAuthentication,
}

#[derive(Deserialize)]
#[serde(remote = "AuthHeader", rename_all = "camelCase", deny_unknown_fields)]
struct HeaderFields {
    name: String,
    #[serde(default)]
    value: Secret,
}

#[derive(Deserialize)]
#[serde(remote = "ClientCertificate", rename_all = "camelCase", deny_unknown_fields)]
struct CertificateFields {
    certificate: String,
    #[serde(default)]
    key: Secret,
}

#[derive(Deserialize)]
#[serde(remote = "FilterCondition", rename_all = "camelCase", deny_unknown_fields)]
struct ConditionFields {
    field: String,
    #[serde(default)]
    equals: Option<String>,
    #[serde(default, rename = "in")]
    one_of: Option<Vec<String>>,
    #[serde(default)]
    exists: Option<bool>,
}

/// Declares the function that reads a member: a list of one of these types, or an optional value.
macro_rules! member {
    ($name:ident: Vec<$part:ty>, $fields:literal) => {
        pub(super) fn $name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<$part>, D::Error> {
            #[derive(Deserialize)]
            struct Part(#[serde(deserialize_with = $fields)] $part);
            Ok(Vec::<Part>::deserialize(deserializer)?.into_iter().map(|Part(part)| part).collect())
        }
    };
    ($name:ident: Option<$part:ty>, $fields:literal) => {
        pub(super) fn $name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<$part>, D::Error> {
            #[derive(Deserialize)]
            struct Part(#[serde(deserialize_with = $fields)] $part);
            Ok(Option::<Part>::deserialize(deserializer)?.map(|Part(part)| part))
        }
    };
}

member!(states: Vec<State>, "StateFields::deserialize");
member!(auth: Option<CallbackAuth>, "AuthFields::deserialize");
member!(headers: Vec<AuthHeader>, "HeaderFields::deserialize");
member!(client_certificate: Option<ClientCertificate>, "CertificateFields::deserialize");
member!(filter: Vec<FilterCondition>, "ConditionFields::deserialize");

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Callback, CallbackSpec, ProcessSpec, State};

    #[test]
    fn unknown_fields_are_refused_in_a_specification_and_ignored_in_the_store() {
        for (member, value, unknown) in [
            ("auth", json!({"type": "bearer", "token": "t", "value": "t"}), "value"),
            ("auth", json!({"type": "header", "name": "X-Key", "values": "v"}), "values"),
            ("auth", json!({"type": "oauth2", "tokenUrl": "u", "clientId": "c", "scopes": "s"}), "scopes"),
            ("headers", json!([{"name": "X-Key", "values": "v"}]), "values"),
            ("clientCertificate", json!({"certificate": "c", "keys": "k"}), "keys"),
            ("filter", json!([{"field": "toState", "equals": "lost", "ignoreCase": true}]), "ignoreCase"),
        ] {
            let spec = json!({"name": "crm", "url": "https://crm.example", member: value.clone()});
            let error = serde_json::from_value::<CallbackSpec>(spec).unwrap_err().to_string();
            assert!(error.starts_with(&format!("unknown field `{unknown}`")), "{error}");
            let stored: Value = json!({"callbackId": "030303030303030303030303", "name": "crm", "url": "https://crm.example",
                "secrets": [], "enabled": true, "timeoutSeconds": 15, "maxInFlight": 64, member: value});
            serde_json::from_value::<Callback>(stored).unwrap();
        }
        let state = json!({"name": "lost", "type": "terminal"});
        let spec = json!({"projectId": "010101010101010101010101", "name": "sales", "states": [state.clone()]});
        let error = serde_json::from_value::<ProcessSpec>(spec).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `type`"), "{error}");
        serde_json::from_value::<State>(state).unwrap();
    }
}

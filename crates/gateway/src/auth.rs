//! 1 Accept: authentication and authorization of requests.

use std::{sync::Arc, time::Duration};

use axum::http::{HeaderMap, header::AUTHORIZATION};
use contract::{
    Timestamp,
    key::{ApiKey, Scope},
};
use secrets::api_key;
use service_kit::{clock, kv::BucketCache};
use tokio::time::{Interval, MissedTickBehavior};

use crate::{error::ApiError, key_uses::KeyUses};

/// How often the key of a long response is checked. Longer serves a revoked key longer; shorter costs lookups.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The API key of a request, if it is valid at this time and has the scope.
pub(crate) fn authorize(
    keys: &BucketCache<ApiKey>,
    headers: &HeaderMap,
    scope: Scope,
    now: Timestamp,
) -> Result<Arc<ApiKey>, ApiError> {
    let key = valid_key(keys, &api_key::hash(bearer(headers).ok_or(ApiError::MissingKey)?), now)?;
    if !key.scopes.contains(&scope) {
        return Err(ApiError::MissingScope(scope));
    }
    Ok(key)
}

/// The key with this digest. Keys are looked up by digest, so that the duration reveals nothing about existing keys.
fn valid_key(keys: &BucketCache<ApiKey>, digest: &str, now: Timestamp) -> Result<Arc<ApiKey>, ApiError> {
    let unknown = || if keys.is_complete() { ApiError::InvalidKey("is unknown") } else { ApiError::Starting };
    let key = keys.get(digest).ok_or_else(unknown)?;
    if !key.is_valid(now) {
        let fault = if key.revoked_at.is_some() { "was revoked" } else { "has expired" };
        return Err(ApiError::InvalidKey(fault));
    }
    Ok(key)
}

/// Checks the API key of a long response at a fixed interval, independently of what the response does meanwhile.
#[derive(Debug)]
pub(crate) struct KeyCheck {
    digest: String,
    interval: Interval,
}

impl KeyCheck {
    /// The key of an authorized request.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut interval = tokio::time::interval(CHECK_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { digest: bearer(headers).map(api_key::hash).unwrap_or_default(), interval }
    }

    /// Whether the key is valid now. If so, records a use: a long response uses its key.
    pub(crate) fn check(&self, keys: &BucketCache<ApiKey>, uses: &KeyUses) -> Result<(), ApiError> {
        let now = clock::now();
        let key = valid_key(keys, &self.digest, now)?;
        uses.record(key.key_id, now);
        Ok(())
    }

    /// Completes when the key is no longer valid. Cancel-safe: the interval continues with the next call.
    pub(crate) async fn ended(&mut self, keys: &BucketCache<ApiKey>, uses: &KeyUses) -> ApiError {
        loop {
            self.interval.tick().await;
            if let Err(error) = self.check(keys, uses) {
                return error;
            }
        }
    }
}

/// The token of `Authorization: Bearer`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, secret) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let secret = secret.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !secret.is_empty()).then_some(secret)
}

#[cfg(test)]
pub(crate) mod tests {
    use contract::ObjectId;

    use super::*;

    pub(crate) const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);

    pub(crate) fn key() -> ApiKey {
        ApiKey {
            key_id: ObjectId::from_bytes([0xaa; 12]),
            project_id: PROJECT,
            name: "crm".into(),
            scopes: Scope::ALL.into(),
            created_at: Timestamp::from_millis(0),
            expires_at: None,
            revoked_at: None,
            last_used_at: None,
        }
    }

    fn ask(keys: &BucketCache<ApiKey>, authorization: Option<&str>, scope: Scope) -> Result<ObjectId, String> {
        let mut headers = HeaderMap::new();
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        }
        authorize(keys, &headers, scope, Timestamp::from_millis(100))
            .map(|key| key.key_id)
            .map_err(|e| format!("{} {}: {e}", e.status().as_u16(), e.code()))
    }

    #[test]
    fn only_valid_keys_with_the_scope_are_authorized() {
        let keys: BucketCache<ApiKey> = [
            ("good", key()),
            ("late", ApiKey { expires_at: Some(Timestamp::from_millis(100)), ..key() }),
            ("gone", ApiKey { revoked_at: Some(Timestamp::from_millis(1)), ..key() }),
            ("reader", ApiKey { scopes: [Scope::LeadsRead].into(), ..key() }),
        ]
        .into_iter()
        .map(|(secret, key)| (api_key::hash(secret), key))
        .collect();
        for header in ["Bearer good", "bearer good", "BEARER  good"] {
            assert_eq!(ask(&keys, Some(header), Scope::LeadsWrite), Ok(key().key_id), "{header}");
        }
        assert!(ask(&keys, Some("Bearer reader"), Scope::LeadsRead).is_ok());
        let refused = [
            None,
            Some(""),
            Some("Bearer"),
            Some("Bearer "),
            Some("Basic good"),
            Some("Bearer bad"),
            Some("Bearer late"),
            Some("Bearer gone"),
            Some("Bearer reader"),
        ]
        .map(|header| format!("{header:?} -> {}", ask(&keys, header, Scope::LeadsWrite).unwrap_err()));
        insta::assert_snapshot!(refused.join("\n"), @r#"
        None -> 401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        Some("") -> 401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        Some("Bearer") -> 401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        Some("Bearer ") -> 401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        Some("Basic good") -> 401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        Some("Bearer bad") -> 401 invalid_api_key: The API key is unknown
        Some("Bearer late") -> 401 invalid_api_key: The API key has expired
        Some("Bearer gone") -> 401 invalid_api_key: The API key was revoked
        Some("Bearer reader") -> 403 missing_scope: The API key lacks the scope leads:write
        "#);
        assert!(
            ask(&BucketCache::default(), Some("Bearer good"), Scope::LeadsRead)
                .unwrap_err()
                .starts_with("503 starting")
        );
    }
}

//! 1 Accept: `POST /api/v1/keys/{keyId}/revoke`.
//!
//! There is no endpoint that creates keys: with one, the holder of a revoked or expired key could still use keys that
//! it created before.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::RevokeKey};
use http_api::DataResponse;

use crate::{
    app::App,
    request::path::KeyPath,
    response::{self, HandlerResult},
};

pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, KeyPath(key_id): KeyPath) -> HandlerResult {
    let revoked = app.request(&RevokeKey { key_id, project_id: Some(key.project_id) }).await?;
    response::ok(&DataResponse::new(http_api::ApiKey::from(revoked)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("API keys", "revokeKey", "Revoke an API key")
        .description(
            "The gateways refuse the key within a second, and its event streams and sessions end. It cannot be made valid again. A \
             key can revoke itself.",
        )
        .returns::<DataResponse<http_api::ApiKey>>()
        .errors(&[404])
}

//! API keys.

use contract::{
    key::ApiKey,
    rpc::{CreateKey, ErrorCode, ListKeys, Page, RevokeKey, RpcError, clamp},
    streams::KEY_USES,
};
use futures::{StreamExt, TryStreamExt};
use service_kit::clock;

use super::{Api, cursors, project_not_found, validate_name};
use crate::{
    config::projection::not_projected,
    store::{
        self,
        api_keys::{self, KeyInsert},
    },
};

/// How many last uses are read at once.
const READS: usize = 32;

impl Api {
    pub(super) async fn create_key(self, key: CreateKey) -> Result<ApiKey, RpcError> {
        validate_name(&key.name)?;
        if key.sha256.len() != 64 || !key.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(RpcError::new(ErrorCode::InvalidHash, "sha256 must be 64 lower-case hex digits"));
        }
        if key.scopes.is_empty() {
            return Err(RpcError::new(ErrorCode::NoScopes, "a key needs at least one scope"));
        }
        let CreateKey { project_id, name, sha256, scopes, expires_at } = key;
        let created_at = clock::now();
        let key_id = clock::new_id();
        let key =
            ApiKey { key_id, project_id, name, scopes, created_at, expires_at, revoked_at: None, last_used_at: None };
        match api_keys::insert(&mut store::acquire(&self.pool).await?, &key, &sha256).await? {
            KeyInsert::Inserted => {}
            KeyInsert::NoProject => return Err(project_not_found()),
            KeyInsert::Exists => {
                return Err(RpcError::new(ErrorCode::KeyExists, "there is a key with this sha256 already"));
            }
        }
        self.projector.project_key(&sha256).await.map_err(|e| not_projected("the key", &e))?;
        Ok(key)
    }

    pub(super) async fn revoke_key(self, revoke: RevokeKey) -> Result<ApiKey, RpcError> {
        let not_found = || RpcError::new(ErrorCode::KeyNotFound, "API key not found");
        let RevokeKey { key_id, project_id } = revoke;
        let mut connection = store::acquire(&self.pool).await?;
        let revoked = api_keys::revoke(&mut connection, key_id, project_id, clock::now()).await?;
        let sha256 = revoked.ok_or_else(not_found)?;
        // Projecting the key takes its own connection, and waits for NATS.
        drop(connection);
        self.projector.project_key(&sha256).await.map_err(|e| not_projected("the revocation", &e))?;
        let (key, _) = api_keys::find(&self.pool, &sha256).await?.ok_or_else(not_found)?;
        Ok(key)
    }

    pub(super) async fn list_keys(self, query: ListKeys) -> Result<Page<ApiKey>, RpcError> {
        let limit = clamp(query.limit);
        let after = query.cursor.as_ref().map(cursors::parse_key).transpose()?;
        let keys = api_keys::list(&self.pool, query.project_id, query.key_id, after, limit).await?;
        let mut page = Page::cut(keys, limit, |key| cursors::key(key.key_id), None);
        // One read for each key of the page.
        match self.with_last_uses(page.items.clone()).await {
            Ok(keys) => page.items = keys,
            Err(e) => tracing::warn!("the last uses of API keys cannot be read: {e:#}"),
        }
        Ok(page)
    }

    async fn with_last_uses(&self, keys: Vec<ApiKey>) -> anyhow::Result<Vec<ApiKey>> {
        let store = self.js.get_key_value(KEY_USES).await?;
        let keys = futures::stream::iter(keys).map(move |mut key| {
            let store = store.clone();
            async move {
                let value = store.get(key.key_id.to_string()).await?;
                key.last_used_at = value.map(|value| serde_json::from_slice(&value)).transpose()?;
                anyhow::Ok(key)
            }
        });
        keys.buffered(READS).try_collect().await
    }
}

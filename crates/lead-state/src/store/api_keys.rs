//! API keys. Postgres is the source of truth; the bucket `api_keys` is its projection.

use std::collections::BTreeSet;

use contract::{
    ObjectId, Timestamp,
    key::{ApiKey, Scope},
};
use service_kit::postgres::{Pool, Session};

use super::{
    StoreError,
    row::{Hex, Row, time},
};

/// The result of inserting a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyInsert {
    Inserted,
    /// The project does not exist.
    NoProject,
    /// Some project has a key with this hash.
    Exists,
}

pub(crate) async fn insert(connection: &mut Session, key: &ApiKey, sha256: &str) -> Result<KeyInsert, StoreError> {
    let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.as_str()).collect();
    let inserted = sqlx::query!(
        r#"INSERT INTO lead_state.api_keys
               (key_id, project_id, name, sha256, scopes, created_at, expires_at, revision)
           SELECT $1, project_id, $3, $4, $5, $6, $7, nextval('lead_state.config_revision')
           FROM lead_state.projects WHERE project_id = $2"#,
        key.key_id.as_bytes(),
        key.project_id.as_bytes(),
        key.name,
        sha256,
        &scopes as _,
        time(key.created_at),
        key.expires_at.map(time)
    )
    .execute(connection)
    .await;
    match inserted {
        Ok(inserted) if inserted.rows_affected() == 1 => Ok(KeyInsert::Inserted),
        Ok(_) => Ok(KeyInsert::NoProject),
        Err(sqlx::Error::Database(e)) if e.constraint() == Some("api_keys_sha256_key") => Ok(KeyInsert::Exists),
        Err(e) => Err(e.into()),
    }
}

/// Revokes a key, unless it is revoked already. Returns its hash; None if the key does not exist, or is not of
/// `project_id`.
pub(crate) async fn revoke(
    connection: &mut Session,
    key_id: ObjectId,
    project_id: Option<ObjectId>,
    now: Timestamp,
) -> Result<Option<String>, StoreError> {
    let sha256 = sqlx::query_scalar!(
        r#"UPDATE lead_state.api_keys
           SET revoked_at = COALESCE(revoked_at, $2), revision = nextval('lead_state.config_revision')
           WHERE key_id = $1 AND ($3::bytea IS NULL OR project_id = $3) RETURNING sha256"#,
        key_id.as_bytes(),
        time(now),
        project_id.as_ref().map(|id| id.as_bytes()) as _
    )
    .fetch_optional(connection)
    .await?;
    Ok(sha256)
}

/// A project's keys after `after`, oldest first: one more than `limit`, if there are more. Only `key_id` if it is
/// given.
pub(crate) async fn list(
    pool: &Pool,
    project_id: ObjectId,
    key_id: Option<ObjectId>,
    after: Option<ObjectId>,
    limit: u32,
) -> Result<Vec<ApiKey>, StoreError> {
    let rows = sqlx::query_as!(
        KeyRow,
        r#"SELECT key_id, project_id, name, scopes, created_at, expires_at, revoked_at, revision
           FROM lead_state.api_keys
           WHERE project_id = $1 AND ($2::bytea IS NULL OR key_id = $2) AND ($3::bytea IS NULL OR key_id > $3)
           ORDER BY key_id LIMIT $4"#,
        project_id.as_bytes(),
        key_id.as_ref().map(|id| id.as_bytes()) as _,
        after.as_ref().map(|id| id.as_bytes()) as _,
        i64::from(limit) + 1
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok(row.into_key()?.0)).collect()
}

/// The key with this hash, and its revision.
pub(crate) async fn find(pool: &Pool, sha256: &str) -> Result<Option<(ApiKey, i64)>, StoreError> {
    let row = sqlx::query_as!(
        KeyRow,
        r#"SELECT key_id, project_id, name, scopes, created_at, expires_at, revoked_at, revision
           FROM lead_state.api_keys WHERE sha256 = $1"#,
        sha256
    )
    .fetch_optional(pool)
    .await?;
    row.map(KeyRow::into_key).transpose()
}

struct KeyRow {
    key_id: Vec<u8>,
    project_id: Vec<u8>,
    name: String,
    scopes: Vec<String>,
    created_at: time::OffsetDateTime,
    expires_at: Option<time::OffsetDateTime>,
    revoked_at: Option<time::OffsetDateTime>,
    revision: i64,
}

impl KeyRow {
    fn into_key(self) -> Result<(ApiKey, i64), StoreError> {
        let stored = Row::new("api_keys", Hex(&self.key_id));
        let scopes = self.scopes.iter().map(|scope| scope.parse::<Scope>()).collect::<Result<BTreeSet<_>, _>>();
        let key = ApiKey {
            key_id: stored.id("key_id", &self.key_id)?,
            project_id: stored.id("project_id", &self.project_id)?,
            name: self.name,
            scopes: scopes.map_err(|e| stored.corrupt("scopes", e))?,
            created_at: self.created_at.into(),
            expires_at: self.expires_at.map(Into::into),
            revoked_at: self.revoked_at.map(Into::into),
            last_used_at: None,
        };
        Ok((key, self.revision))
    }
}

/// The hashes of all keys, or only of those whose latest revision is not projected.
pub(crate) async fn list_to_project(pool: &Pool, all: bool) -> Result<Vec<String>, StoreError> {
    let hashes = sqlx::query_scalar!(
        "SELECT sha256 FROM lead_state.api_keys WHERE $1 OR projected_revision < revision ORDER BY revision",
        all
    )
    .fetch_all(pool)
    .await?;
    Ok(hashes)
}

/// Records that a revision of a key is in the bucket.
pub(crate) async fn set_projected(connection: &mut Session, sha256: &str, revision: i64) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE lead_state.api_keys SET projected_revision = $2 WHERE sha256 = $1 AND projected_revision < $2",
        sha256,
        revision
    )
    .execute(connection)
    .await?;
    Ok(())
}

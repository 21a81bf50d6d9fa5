//! Configuration: projects, processes, API keys. Postgres is the truth; buckets are its projection.

use std::collections::BTreeSet;

use contract::{
    ObjectId, Timestamp,
    json::redacted_error,
    key::{ApiKey, Scope},
    process::Process,
    rpc,
};
use sqlx::{PgConnection, PgExecutor, PgPool};

use super::{StoreError, id, time};

/// Adds a project; none if the name is taken.
pub(crate) async fn insert_project(
    pool: &PgPool,
    project_id: ObjectId,
    name: &str,
    now: Timestamp,
) -> Result<Option<rpc::Project>, StoreError> {
    let inserted = sqlx::query!(
        "INSERT INTO lead_state.projects (project_id, name, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        project_id.as_bytes(),
        name,
        time(now)
    )
    .execute(pool)
    .await?;
    Ok((inserted.rows_affected() == 1).then(|| rpc::Project { project_id, name: name.into(), created_at: now }))
}

/// Locks a project's configuration until the transaction ends; false if there is no such project.
pub(crate) async fn lock_project(connection: &mut PgConnection, project_id: ObjectId) -> Result<bool, StoreError> {
    let row = sqlx::query!(
        "SELECT 1 AS one FROM lead_state.projects WHERE project_id = $1 FOR UPDATE",
        project_id.as_bytes()
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.is_some())
}

/// The process of this name.
pub(crate) async fn process(
    connection: &mut PgConnection,
    project_id: ObjectId,
    name: &str,
) -> Result<Option<Process>, StoreError> {
    let config = sqlx::query_scalar!(
        r#"SELECT config::text AS "config!" FROM lead_state.processes WHERE project_id = $1 AND name = $2"#,
        project_id.as_bytes(),
        name
    )
    .fetch_optional(connection)
    .await?;
    config.map(|config| read_process(&config, project_id, &name)).transpose()
}

fn read_process(config: &str, project_id: ObjectId, name: &dyn std::fmt::Debug) -> Result<Process, StoreError> {
    // Without the text that is wrong: it may be a secret.
    let corrupt = |e| StoreError::Corrupt {
        table: "processes",
        fault: format!("config of {name:?} in {project_id}: {}", redacted_error(&e)),
    };
    serde_json::from_str(config).map_err(corrupt)
}

/// The process of this id.
pub(crate) async fn process_of_id(
    executor: impl PgExecutor<'_>,
    project_id: ObjectId,
    process_id: ObjectId,
) -> Result<Option<Process>, StoreError> {
    let config = sqlx::query_scalar!(
        r#"SELECT config::text AS "config!" FROM lead_state.processes WHERE process_id = $2 AND project_id = $1"#,
        project_id.as_bytes(),
        process_id.as_bytes()
    )
    .fetch_optional(executor)
    .await?;
    config.map(|config| read_process(&config, project_id, &process_id)).transpose()
}

/// Most bytes of configuration that are read for a page, the last process's aside: more than what fits into a page, so
/// that whoever cuts it always sees that there is more.
const MAX_BYTES: i64 = 1 << 20;

/// A project's processes behind this name, in the order of their names: at most `limit`, and one more to show that there
/// are more.
pub(crate) async fn processes(
    pool: &PgPool,
    project_id: ObjectId,
    after: &str,
    limit: u32,
) -> Result<Vec<Process>, StoreError> {
    let rows = sqlx::query!(
        r#"WITH wanted AS MATERIALIZED (
               SELECT name, config::text AS config FROM lead_state.processes
               WHERE project_id = $1 AND name > $2 ORDER BY name LIMIT $3
           ), weighed AS (
               SELECT *, sum(octet_length(config)) OVER (ORDER BY name) - octet_length(config) AS before FROM wanted
           )
           SELECT name AS "name!", config AS "config!" FROM weighed WHERE before <= $4 ORDER BY name"#,
        project_id.as_bytes(),
        after,
        i64::from(limit) + 1,
        MAX_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| read_process(&row.config, project_id, &row.name)).collect()
}

/// Gives a process another name, which must be free.
pub(crate) async fn rename_process(
    connection: &mut PgConnection,
    process_id: ObjectId,
    name: &str,
) -> Result<(), StoreError> {
    sqlx::query!("UPDATE lead_state.processes SET name = $2 WHERE process_id = $1", process_id.as_bytes(), name)
        .execute(connection)
        .await?;
    Ok(())
}

/// The next revision of configuration.
pub(crate) async fn next_revision(connection: &mut PgConnection) -> Result<i64, StoreError> {
    let revision = sqlx::query_scalar!(r#"SELECT nextval('lead_state.config_revision') AS "revision!""#)
        .fetch_one(connection)
        .await?;
    Ok(revision)
}

/// Which of these states leads of the process are in.
pub(crate) async fn occupied_states(
    connection: &mut PgConnection,
    process_id: ObjectId,
    states: &[String],
) -> Result<Vec<String>, StoreError> {
    let occupied = sqlx::query_scalar!(
        r#"SELECT s.state AS "state!" FROM unnest($2::text[]) AS s (state)
           WHERE EXISTS (SELECT 1 FROM lead_state.leads l WHERE l.process_id = $1 AND l.state = s.state)"#,
        process_id.as_bytes(),
        states
    )
    .fetch_all(connection)
    .await?;
    Ok(occupied)
}

/// Writes a process as it now is.
pub(crate) async fn put_process(connection: &mut PgConnection, process: &Process) -> Result<(), StoreError> {
    #[allow(clippy::expect_used, reason = "a process always serializes")]
    let config = serde_json::to_string(process).expect("a process serializes");
    sqlx::query!(
        r#"INSERT INTO lead_state.processes (project_id, name, process_id, config, revision)
           VALUES ($1, $2, $3, $4::text::json, $5)
           ON CONFLICT (project_id, name) DO UPDATE SET config = excluded.config, revision = excluded.revision"#,
        process.project_id.as_bytes(),
        process.name,
        process.process_id.as_ref().map(ObjectId::as_bytes) as _,
        config,
        process.revision
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// What became of a key that was to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyInsert {
    Inserted,
    /// There is no such project.
    NoProject,
    /// There is a key with this hash already, of whatever project.
    Exists,
}

/// Adds an API key.
pub(crate) async fn insert_key(pool: &PgPool, key: &ApiKey, sha256: &str) -> Result<KeyInsert, StoreError> {
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
    .execute(pool)
    .await;
    match inserted {
        Ok(inserted) if inserted.rows_affected() == 1 => Ok(KeyInsert::Inserted),
        Ok(_) => Ok(KeyInsert::NoProject),
        Err(sqlx::Error::Database(e)) if e.constraint() == Some("api_keys_sha256_key") => Ok(KeyInsert::Exists),
        Err(e) => Err(e.into()),
    }
}

/// Revokes a key, if it is not revoked yet; its hash, if there is such a key.
pub(crate) async fn revoke_key(pool: &PgPool, key_id: ObjectId, now: Timestamp) -> Result<Option<String>, StoreError> {
    let sha256 = sqlx::query_scalar!(
        r#"UPDATE lead_state.api_keys
           SET revoked_at = COALESCE(revoked_at, $2), revision = nextval('lead_state.config_revision')
           WHERE key_id = $1 RETURNING sha256"#,
        key_id.as_bytes(),
        time(now)
    )
    .fetch_optional(pool)
    .await?;
    Ok(sha256)
}

/// A project's keys, oldest first.
pub(crate) async fn keys(pool: &PgPool, project_id: ObjectId) -> Result<Vec<ApiKey>, StoreError> {
    let rows = sqlx::query_as!(
        KeyRow,
        r#"SELECT key_id, project_id, name, scopes, created_at, expires_at, revoked_at, revision
           FROM lead_state.api_keys WHERE project_id = $1 ORDER BY key_id"#,
        project_id.as_bytes()
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok(row.read()?.0)).collect()
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
    fn read(self) -> Result<(ApiKey, i64), StoreError> {
        let key_id = id("api_keys", "key_id", &self.key_id)?;
        let scopes = self.scopes.iter().map(|scope| scope.parse::<Scope>()).collect::<Result<BTreeSet<_>, _>>();
        let key = ApiKey {
            key_id,
            project_id: id("api_keys", "project_id", &self.project_id)?,
            name: self.name,
            scopes: scopes
                .map_err(|e| StoreError::Corrupt { table: "api_keys", fault: format!("scopes of {key_id}: {e}") })?,
            created_at: self.created_at.into(),
            expires_at: self.expires_at.map(Into::into),
            revoked_at: self.revoked_at.map(Into::into),
        };
        Ok((key, self.revision))
    }
}

/// The key of this hash, with its revision.
pub(crate) async fn key(pool: &PgPool, sha256: &str) -> Result<Option<(ApiKey, i64)>, StoreError> {
    let row = sqlx::query_as!(
        KeyRow,
        r#"SELECT key_id, project_id, name, scopes, created_at, expires_at, revoked_at, revision
           FROM lead_state.api_keys WHERE sha256 = $1"#,
        sha256
    )
    .fetch_optional(pool)
    .await?;
    row.map(KeyRow::read).transpose()
}

/// The process of this name, by pool.
pub(crate) async fn current_process(
    pool: &PgPool,
    project_id: ObjectId,
    name: &str,
) -> Result<Option<Process>, StoreError> {
    process(&mut *pool.acquire().await?, project_id, name).await
}

/// Processes whose projection is behind, or all.
pub(crate) async fn processes_to_project(pool: &PgPool, all: bool) -> Result<Vec<(ObjectId, String)>, StoreError> {
    let rows = sqlx::query!(
        "SELECT project_id, name FROM lead_state.processes WHERE $1 OR projected_revision < revision ORDER BY revision",
        all
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok((id("processes", "project_id", &row.project_id)?, row.name))).collect()
}

/// Hashes of keys whose projection is behind, or of all.
pub(crate) async fn keys_to_project(pool: &PgPool, all: bool) -> Result<Vec<String>, StoreError> {
    let hashes = sqlx::query_scalar!(
        "SELECT sha256 FROM lead_state.api_keys WHERE $1 OR projected_revision < revision ORDER BY revision",
        all
    )
    .fetch_all(pool)
    .await?;
    Ok(hashes)
}

/// Notes that a process has reached its bucket.
pub(crate) async fn process_projected(
    pool: &PgPool,
    project_id: ObjectId,
    name: &str,
    revision: i64,
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"UPDATE lead_state.processes SET projected_revision = $3
           WHERE project_id = $1 AND name = $2 AND projected_revision < $3"#,
        project_id.as_bytes(),
        name,
        revision
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Notes that a key has reached its bucket.
pub(crate) async fn key_projected(pool: &PgPool, sha256: &str, revision: i64) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE lead_state.api_keys SET projected_revision = $2 WHERE sha256 = $1 AND projected_revision < $2",
        sha256,
        revision
    )
    .execute(pool)
    .await?;
    Ok(())
}

//! Projects and processes. Postgres is the source of truth; the bucket `processes` is its projection.

use contract::{ObjectId, Timestamp, process::Process, rpc};
use service_kit::postgres::{Pool, Session};
use sqlx::PgExecutor;

use super::{
    StoreError,
    row::{Hex, Row, time},
};

const TABLE: &str = "processes";

/// The most bytes of configuration that are read for a page, without those of the last process. More than a page holds,
/// so that the page is cut and its cursor shows that there are more.
const MAX_PAGE_BYTES: i64 = 1 << 20;

/// Inserts a project; None if the name is taken.
pub(crate) async fn insert_project(
    connection: &mut Session,
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
    .execute(connection)
    .await?;
    Ok((inserted.rows_affected() == 1).then(|| rpc::Project { project_id, name: name.into(), created_at: now }))
}

/// Locks a project's configuration until the transaction ends. Returns false if the project does not exist.
pub(crate) async fn lock_project(connection: &mut Session, project_id: ObjectId) -> Result<bool, StoreError> {
    let row = sqlx::query!(
        "SELECT 1 AS one FROM lead_state.projects WHERE project_id = $1 FOR UPDATE",
        project_id.as_bytes()
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.is_some())
}

pub(crate) async fn find_by_name(
    executor: impl PgExecutor<'_>,
    project_id: ObjectId,
    name: &str,
) -> Result<Option<Process>, StoreError> {
    let config = sqlx::query_scalar!(
        r#"SELECT config::text AS "config!" FROM lead_state.processes WHERE project_id = $1 AND name = $2"#,
        project_id.as_bytes(),
        name
    )
    .fetch_optional(executor)
    .await?;
    config.map(|config| read_process(&config, project_id, name)).transpose()
}

pub(crate) async fn find_by_id(
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
    config.map(|config| Row::new(TABLE, &process_id).json("config", &config)).transpose()
}

fn read_process(config: &str, project_id: ObjectId, name: &str) -> Result<Process, StoreError> {
    Row::new(TABLE, &format_args!("{project_id}/{name}")).json("config", config)
}

/// A project's processes after this name, by name: `limit` of them, and one more to show that there are more.
pub(crate) async fn list(
    pool: &Pool,
    project_id: ObjectId,
    after: &str,
    limit: u32,
) -> Result<Vec<Process>, StoreError> {
    let rows = sqlx::query!(
        r#"WITH requested AS MATERIALIZED (
               SELECT name, config::text AS config FROM lead_state.processes
               WHERE project_id = $1 AND name > $2 ORDER BY name LIMIT $3
           ), sized AS (
               SELECT *, sum(octet_length(config)) OVER (ORDER BY name) - octet_length(config) AS before FROM requested
           )
           SELECT name AS "name!", config AS "config!" FROM sized WHERE before <= $4 ORDER BY name"#,
        project_id.as_bytes(),
        after,
        i64::from(limit) + 1,
        MAX_PAGE_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| read_process(&row.config, project_id, &row.name)).collect()
}

/// Changes the name of a process. The new name must be free.
pub(crate) async fn rename(connection: &mut Session, process_id: ObjectId, name: &str) -> Result<(), StoreError> {
    sqlx::query!("UPDATE lead_state.processes SET name = $2 WHERE process_id = $1", process_id.as_bytes(), name)
        .execute(connection)
        .await?;
    Ok(())
}

/// Allocates the next revision of configuration.
pub(crate) async fn next_revision(connection: &mut Session) -> Result<i64, StoreError> {
    let revision = sqlx::query_scalar!(r#"SELECT nextval('lead_state.config_revision') AS "revision!""#)
        .fetch_one(connection)
        .await?;
    Ok(revision)
}

/// The states among `states` that have leads of the process.
pub(crate) async fn occupied_states(
    connection: &mut Session,
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

/// A process with its secrets sealed, and its stored JSON.
#[derive(Debug)]
pub(crate) struct Config {
    process: Process,
    json: String,
}

impl Config {
    pub(crate) fn new(process: Process) -> Self {
        #[allow(clippy::expect_used, reason = "a process always serializes")]
        let json = serde_json::to_string(&process).expect("a process serializes");
        Self { process, json }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.json.len()
    }
}

/// Inserts or replaces a process.
pub(crate) async fn put(connection: &mut Session, config: &Config) -> Result<(), StoreError> {
    let Config { process, json } = config;
    sqlx::query!(
        r#"INSERT INTO lead_state.processes (project_id, name, process_id, config, revision)
           VALUES ($1, $2, $3, $4::text::json, $5)
           ON CONFLICT (project_id, name) DO UPDATE SET config = excluded.config, revision = excluded.revision"#,
        process.project_id.as_bytes(),
        process.name,
        process.process_id.as_ref().map(ObjectId::as_bytes) as _,
        json.as_str(),
        process.revision
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// All processes, or only those whose latest revision is not projected: project and name, oldest revision first.
pub(crate) async fn list_to_project(pool: &Pool, all: bool) -> Result<Vec<(ObjectId, String)>, StoreError> {
    let rows = sqlx::query!(
        "SELECT project_id, name FROM lead_state.processes WHERE $1 OR projected_revision < revision ORDER BY revision",
        all
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let project_id = Row::new(TABLE, Hex(&row.project_id)).id("project_id", &row.project_id)?;
            Ok((project_id, row.name))
        })
        .collect()
}

/// Records that a revision of a process is in the bucket.
pub(crate) async fn set_projected(
    connection: &mut Session,
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
    .execute(connection)
    .await?;
    Ok(())
}

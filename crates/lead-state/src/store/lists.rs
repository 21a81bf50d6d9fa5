//! Lists, a page at a time: each statement looks at a bounded number of rows, whatever there is.

use contract::{
    ObjectId, Timestamp,
    rpc::{HistoryEntry, Lead},
};
use sqlx::PgPool;

use super::{StoreError, id, object, optional_id, time};

/// Most bytes of metadata that are read for a page, the last lead's aside. More than what fits into a page, so that whoever
/// cuts it always sees that there is more.
const MAX_BYTES: i64 = 1 << 20;

/// Beyond every id. Conditions on a bound that is always there are met by index under any plan.
const BEYOND_IDS: [u8; 13] = [0xff; 13];

/// The bytes that ids must be below.
fn bound(before: Option<&ObjectId>) -> &[u8] {
    before.map_or(&BEYOND_IDS, |id| id.as_bytes())
}

/// Which leads of a project.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filter<'a> {
    pub(crate) process_id: Option<ObjectId>,
    pub(crate) state: Option<&'a str>,
    pub(crate) updated_since: Option<Timestamp>,
}

impl Filter<'_> {
    /// Whether every lead of the project is wanted.
    pub(crate) fn takes_all(&self) -> bool {
        matches!(self, Self { process_id: None, state: None, updated_since: None })
    }
}

/// The lead that is the `count`-th below `before`, newest first; none where there are fewer.
pub(crate) async fn lead_below(
    pool: &PgPool,
    project_id: ObjectId,
    before: Option<ObjectId>,
    count: u32,
) -> Result<Option<ObjectId>, StoreError> {
    let lead_id = sqlx::query_scalar!(
        r#"SELECT lead_id FROM lead_state.leads
           WHERE project_id = $1 AND lead_id < $2
           ORDER BY lead_id DESC OFFSET $3 LIMIT 1"#,
        project_id.as_bytes(),
        bound(before.as_ref()),
        i64::from(count) - 1
    )
    .fetch_optional(pool)
    .await?;
    lead_id.map(|bytes| id("leads", "lead_id", &bytes)).transpose()
}

/// A project's leads below `before` and not below `down_to`, newest first: at most `limit`, and one more to show that there
/// are more.
pub(crate) async fn leads(
    pool: &PgPool,
    project_id: ObjectId,
    filter: Filter<'_>,
    before: Option<ObjectId>,
    down_to: Option<ObjectId>,
    limit: u32,
) -> Result<Vec<Lead>, StoreError> {
    let rows = sqlx::query!(
        r#"WITH wanted AS MATERIALIZED (
               SELECT lead_id, process_id, reference_id, name, phone, email, state, disposition, metadata::text AS metadata,
                      version, created_at, updated_at
               FROM lead_state.leads
               WHERE project_id = $1 AND lead_id < $2 AND lead_id >= $3
                   AND ($4::bytea IS NULL OR process_id = $4) AND ($5::text IS NULL OR state = $5)
                   AND ($6::timestamptz IS NULL OR updated_at >= $6)
               ORDER BY lead_id DESC LIMIT $7
           ), weighed AS (
               SELECT *, sum(octet_length(metadata)) OVER (ORDER BY lead_id DESC) - octet_length(metadata) AS before
               FROM wanted
           )
           SELECT lead_id AS "lead_id!", process_id AS "process_id!", reference_id, name, phone, email,
                  state AS "state!", disposition, metadata AS "metadata!", version AS "version!",
                  created_at AS "created_at!", updated_at AS "updated_at!"
           FROM weighed WHERE before <= $8 ORDER BY lead_id DESC"#,
        project_id.as_bytes(),
        bound(before.as_ref()),
        down_to.as_ref().map_or(&[][..], |id| id.as_bytes()),
        filter.process_id.as_ref().map(|id| id.as_bytes()) as _,
        filter.state,
        filter.updated_since.map(time),
        i64::from(limit) + 1,
        MAX_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let lead_id = id("leads", "lead_id", &row.lead_id)?;
            Ok(Lead {
                lead_id,
                project_id,
                process_id: id("leads", "process_id", &row.process_id)?,
                reference_id: row.reference_id,
                name: row.name,
                phone: row.phone,
                email: row.email,
                state: row.state,
                disposition: row.disposition,
                metadata: object("leads", "metadata", lead_id, row.metadata)?,
                version: row.version,
                created_at: row.created_at.into(),
                updated_at: row.updated_at.into(),
                activities: Vec::new(),
            })
        })
        .collect()
}

/// Whether the project has this lead.
pub(crate) async fn has_lead(pool: &PgPool, project_id: ObjectId, lead_id: ObjectId) -> Result<bool, StoreError> {
    let has = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM lead_state.leads WHERE lead_id = $1 AND project_id = $2) AS "has!""#,
        lead_id.as_bytes(),
        project_id.as_bytes()
    )
    .fetch_one(pool)
    .await?;
    Ok(has)
}

/// A lead's updates before this place in the logs, the last first: at most `limit`, and one more.
pub(crate) async fn history(
    pool: &PgPool,
    project_id: ObjectId,
    lead_id: ObjectId,
    before: Option<(i32, u64)>,
    limit: u32,
) -> Result<Vec<HistoryEntry>, StoreError> {
    const TABLE: &str = "lead_updates";
    let (epoch, log_seq) = before.map_or((i32::MAX, i64::MAX), |(epoch, log_seq)| (epoch, log_seq as i64));
    let rows = sqlx::query!(
        r#"SELECT update_id, success, error, error_code, from_state, to_state, disposition, version, user_id, api_key_id,
                  warnings, log_epoch, log_sequence, logged_at, applied_at
           FROM lead_state.lead_updates
           WHERE lead_id = $1 AND project_id = $2 AND (log_epoch, log_sequence) < ($3, $4)
           ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT $5"#,
        lead_id.as_bytes(),
        project_id.as_bytes(),
        epoch,
        log_seq,
        i64::from(limit) + 1
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(HistoryEntry {
                update_id: id(TABLE, "update_id", &row.update_id)?,
                success: row.success,
                error: row.error,
                error_code: row.error_code,
                from_state: row.from_state,
                to_state: row.to_state,
                disposition: row.disposition,
                version: row.version,
                user_id: row.user_id,
                api_key_id: optional_id(TABLE, "api_key_id", row.api_key_id.as_deref())?,
                warnings: row.warnings,
                epoch: row.log_epoch,
                log_sequence: row.log_sequence as u64,
                logged_at: row.logged_at.into(),
                applied_at: row.applied_at.into(),
            })
        })
        .collect()
}

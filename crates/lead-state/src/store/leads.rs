//! Leads: found, listed and inserted. Only a [batch](super::batch) updates them.

use contract::{ObjectId, Timestamp, rpc};
use service_kit::postgres::{Pool, Session};

use super::{
    StoreError,
    created_leads::CreatedLead,
    row::{Hex, Row, time, upper_bound},
    updates,
};

pub(super) const TABLE: &str = "leads";

/// The most bytes of metadata that are read for a page, without those of the last lead. More than a page holds, so that
/// the page is cut and its cursor shows that there are more.
pub(super) const MAX_PAGE_BYTES: i64 = 1 << 20;

/// How a query names a lead.
#[derive(Debug, Clone)]
pub(crate) enum LeadAddress {
    Id(ObjectId),
    /// Process and external id.
    Reference(ObjectId, String),
}

/// A lead of a project, with its latest updates.
pub(crate) async fn find(
    pool: &Pool,
    project_id: ObjectId,
    address: &LeadAddress,
) -> Result<Option<rpc::Lead>, StoreError> {
    let (lead_id, process_id, reference_id) = match address {
        LeadAddress::Id(lead_id) => (Some(lead_id.as_bytes()), None, None),
        LeadAddress::Reference(process_id, reference_id) => (None, Some(process_id.as_bytes()), Some(reference_id)),
    };
    let row = sqlx::query_as!(
        LeadRow,
        r#"SELECT lead_id AS "lead_id!", process_id AS "process_id!", reference_id, name, phone, email,
                  state AS "state!", disposition, metadata::text AS "metadata!", version AS "version!",
                  created_at AS "created_at!", updated_at AS "updated_at!"
           FROM lead_state.leads
           WHERE project_id = $1 AND erased_at IS NULL AND (lead_id = $2
               OR (process_id = $3 AND md5(reference_id) = md5($4) AND reference_id = $4))"#,
        project_id.as_bytes(),
        lead_id as _,
        process_id as _,
        reference_id.map(String::as_str)
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let lead = row.into_lead(project_id)?;
    let activities = updates::latest_of_lead(pool, project_id, lead.lead_id).await?;
    Ok(Some(rpc::Lead { activities, ..lead }))
}

pub(super) struct LeadRow {
    pub(super) lead_id: Vec<u8>,
    pub(super) process_id: Vec<u8>,
    pub(super) reference_id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) phone: Option<String>,
    pub(super) email: Option<String>,
    pub(super) state: String,
    pub(super) disposition: Option<String>,
    pub(super) metadata: String,
    pub(super) version: i64,
    pub(super) created_at: time::OffsetDateTime,
    pub(super) updated_at: time::OffsetDateTime,
}

impl LeadRow {
    pub(super) fn into_lead(self, project_id: ObjectId) -> Result<rpc::Lead, StoreError> {
        let stored = Row::new(TABLE, Hex(&self.lead_id));
        Ok(rpc::Lead {
            lead_id: stored.id("lead_id", &self.lead_id)?,
            project_id,
            process_id: stored.id("process_id", &self.process_id)?,
            reference_id: self.reference_id,
            name: self.name,
            phone: self.phone,
            email: self.email,
            state: self.state,
            disposition: self.disposition,
            metadata: stored.object("metadata", self.metadata)?,
            version: self.version,
            created_at: self.created_at.into(),
            updated_at: self.updated_at.into(),
            activities: Vec::new(),
        })
    }
}

/// The leads of a project that a list includes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeadFilter<'a> {
    pub(crate) process_id: Option<ObjectId>,
    pub(crate) state: Option<&'a str>,
    pub(crate) updated_since: Option<Timestamp>,
}

impl LeadFilter<'_> {
    pub(crate) fn includes_all(&self) -> bool {
        matches!(self, Self { process_id: None, state: None, updated_since: None })
    }
}

/// The `count`-th lead below `before`, newest first; None if there are fewer.
pub(crate) async fn nth_below(
    pool: &Pool,
    project_id: ObjectId,
    before: Option<ObjectId>,
    count: u32,
) -> Result<Option<ObjectId>, StoreError> {
    let lead_id = sqlx::query_scalar!(
        r#"SELECT lead_id FROM lead_state.leads
           WHERE project_id = $1 AND lead_id < $2
           ORDER BY lead_id DESC OFFSET $3 LIMIT 1"#,
        project_id.as_bytes(),
        upper_bound(before.as_ref()),
        i64::from(count) - 1
    )
    .fetch_optional(pool)
    .await?;
    lead_id.map(|bytes| Row::new(TABLE, Hex(&bytes)).id("lead_id", &bytes)).transpose()
}

/// A project's leads below `before` and not below `down_to`, newest first: `limit` of them, and one more to show that
/// there are more.
pub(crate) async fn list(
    pool: &Pool,
    project_id: ObjectId,
    filter: LeadFilter<'_>,
    before: Option<ObjectId>,
    down_to: Option<ObjectId>,
    limit: u32,
) -> Result<Vec<rpc::Lead>, StoreError> {
    let rows = sqlx::query_as!(
        LeadRow,
        r#"WITH requested AS MATERIALIZED (
               SELECT lead_id, process_id, reference_id, name, phone, email, state, disposition, metadata::text
                      AS metadata, version, created_at, updated_at
               FROM lead_state.leads
               WHERE project_id = $1 AND lead_id < $2 AND lead_id >= $3 AND erased_at IS NULL
                   AND ($4::bytea IS NULL OR process_id = $4) AND ($5::text IS NULL OR state = $5)
                   AND ($6::timestamptz IS NULL OR updated_at >= $6)
               ORDER BY lead_id DESC LIMIT $7
           ), sized AS (
               SELECT *, sum(octet_length(metadata)) OVER (ORDER BY lead_id DESC) - octet_length(metadata) AS before
               FROM requested
           )
           SELECT lead_id AS "lead_id!", process_id AS "process_id!", reference_id, name, phone, email,
                  state AS "state!", disposition, metadata AS "metadata!", version AS "version!",
                  created_at AS "created_at!", updated_at AS "updated_at!"
           FROM sized WHERE before <= $8 ORDER BY lead_id DESC"#,
        project_id.as_bytes(),
        upper_bound(before.as_ref()),
        down_to.as_ref().map_or(&[][..], |id| id.as_bytes()),
        filter.process_id.as_ref().map(|id| id.as_bytes()) as _,
        filter.state,
        filter.updated_since.map(time),
        i64::from(limit) + 1,
        MAX_PAGE_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| row.into_lead(project_id)).collect()
}

/// Whether a project has or had this lead: the updates of an erased one are still listed.
pub(crate) async fn exists(pool: &Pool, project_id: ObjectId, lead_id: ObjectId) -> Result<bool, StoreError> {
    let exists = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM lead_state.leads WHERE lead_id = $1 AND project_id = $2) AS "exists!""#,
        lead_id.as_bytes(),
        project_id.as_bytes()
    )
    .fetch_one(pool)
    .await?;
    Ok(exists)
}

/// Inserts a lead and, in the same statement, its creation into the outbox. Returns false if its process has a lead
/// with this external id.
pub(crate) async fn insert(
    connection: &mut Session,
    lead_id: ObjectId,
    lead: &rpc::InitiateLead,
    state: &str,
    created: Option<&CreatedLead>,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let inserted = sqlx::query_scalar!(
        r#"WITH inserted AS (
               INSERT INTO lead_state.leads
                   (lead_id, project_id, process_id, group_id, reference_id, name, phone, email, state, metadata, version,
                    created_at, updated_at)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json, 1, $11, $11)
               ON CONFLICT (process_id, md5(reference_id)) DO NOTHING
               RETURNING lead_id, project_id
           ), to_log AS (
               INSERT INTO lead_state.created_leads (lead_id, project_id, update_id, command, created_at)
               SELECT lead_id, project_id, $12::bytea, $13::text::json, $11 FROM inserted WHERE $12::bytea IS NOT NULL
           )
           SELECT EXISTS (SELECT FROM inserted) AS "inserted!""#,
        lead_id.as_bytes(),
        lead.project_id.as_bytes(),
        lead.process_id.as_bytes(),
        lead.group_id.as_deref(),
        lead.reference_id.as_deref(),
        lead.name.as_deref(),
        lead.phone.as_deref(),
        lead.email.as_deref(),
        state,
        lead.metadata.get(),
        time(now),
        created.map(|created| *created.update_id.as_bytes()) as _,
        created.map(|created| created.command.as_str())
    )
    .fetch_one(connection)
    .await?;
    Ok(inserted)
}

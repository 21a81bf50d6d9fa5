//! Leads: looked up and initiated. Existing ones change in [`batch`](super::batch) only.

use contract::{ObjectId, Timestamp, process::Rules, rpc};
use sqlx::PgPool;

use super::{StoreError, id, ledger, object, time};

/// Which lead.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    /// By its id.
    Id(ObjectId),
    /// By process and external id.
    Reference(ObjectId, String),
}

/// Finds a lead of a project, with its last updates.
pub(crate) async fn find(
    pool: &PgPool,
    project_id: ObjectId,
    address: &Address,
) -> Result<Option<rpc::Lead>, StoreError> {
    let (lead_id, process_id, reference_id) = match address {
        Address::Id(lead_id) => (Some(lead_id.as_bytes()), None, None),
        Address::Reference(process_id, reference_id) => (None, Some(process_id.as_bytes()), Some(reference_id)),
    };
    let row = sqlx::query!(
        r#"SELECT lead_id, process_id, reference_id, name, phone, email, state, disposition,
                  metadata::text AS "metadata!", version, created_at, updated_at
           FROM lead_state.leads
           WHERE project_id = $1 AND (lead_id = $2
               OR (process_id = $3 AND md5(reference_id) = md5($4) AND reference_id = $4))"#,
        project_id.as_bytes(),
        lead_id as _,
        process_id as _,
        reference_id.map(String::as_str)
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let lead_id = id("leads", "lead_id", &row.lead_id)?;
    Ok(Some(rpc::Lead {
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
        activities: ledger::activities(pool, project_id, lead_id).await?,
    }))
}

/// The rules of a process of this project.
pub(crate) async fn rules(
    pool: &PgPool,
    project_id: ObjectId,
    process_id: ObjectId,
) -> Result<Option<Rules>, StoreError> {
    let config = sqlx::query_scalar!(
        r#"SELECT config::text AS "config!" FROM lead_state.processes WHERE process_id = $1 AND project_id = $2"#,
        process_id.as_bytes(),
        project_id.as_bytes()
    )
    .fetch_optional(pool)
    .await?;
    config
        .map(|config| {
            serde_json::from_str(&config)
                .map_err(|e| StoreError::Corrupt { table: "processes", fault: format!("config of {process_id}: {e}") })
        })
        .transpose()
}

/// Adds a lead; false if its external id is taken in its process.
pub(crate) async fn insert(
    pool: &PgPool,
    lead_id: ObjectId,
    lead: &rpc::InitiateLead,
    state: &str,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let inserted = sqlx::query!(
        r#"INSERT INTO lead_state.leads
               (lead_id, project_id, process_id, group_id, reference_id, name, phone, email, state, metadata, version,
                created_at, updated_at)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json, 1, $11, $11)
           ON CONFLICT (process_id, md5(reference_id)) DO NOTHING"#,
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
        time(now)
    )
    .execute(pool)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

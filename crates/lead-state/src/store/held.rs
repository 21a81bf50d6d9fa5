//! 4 Decide: updates that are held until no call with their lead is in progress.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use contract::{
    ObjectId, Timestamp,
    command::UpdateCommand,
    position::LogPosition,
    rpc::{self, UpdateStatus},
};
use futures::TryStreamExt;
use sqlx::{PgConnection, PgPool};

use super::{StoreError, batch::WriteError, checkpoint::Checkpoint, id, object, time};
use crate::core::{
    batch::{LeadKeys, Plan, QueuedUpdate, UpdateKey},
    entry::UpdateEntry,
};

const TABLE: &str = "queued_updates";

/// Most leads whose expired calls are looked for at once.
const MAX_DUE: i64 = 500;

/// How many updates are held.
pub(crate) async fn count(pool: &PgPool) -> Result<u64, StoreError> {
    let count = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM lead_state.queued_updates"#).fetch_one(pool);
    Ok(count.await? as u64)
}

/// What is held of these leads, in the order of the log. None if the commands are more than `budget` bytes.
pub(crate) async fn of_leads(
    connection: &mut PgConnection,
    leads: impl Iterator<Item = ObjectId>,
    mut budget: usize,
) -> Result<Option<HashMap<ObjectId, Vec<Arc<QueuedUpdate>>>>, StoreError> {
    let ids: Vec<_> = leads.map(|lead| *lead.as_bytes()).collect();
    let mut held = HashMap::<_, Vec<_>>::new();
    let mut rows = sqlx::query!(
        r#"SELECT project_id, update_id, lead_id, log_epoch, log_sequence, logged_at, command::text AS "command!", traceparent
           FROM lead_state.queued_updates WHERE lead_id = ANY($1::bytea[]) ORDER BY lead_id, log_epoch, log_sequence, log_index"#,
        &ids as _
    )
    .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let Some(left) = budget.checked_sub(row.command.len()) else { return Ok(None) };
        budget = left;
        let update_id = id(TABLE, "update_id", &row.update_id)?;
        let command: UpdateCommand = serde_json::from_str(&row.command)
            .map_err(|e| StoreError::Corrupt { table: TABLE, fault: format!("command of {update_id}: {e}") })?;
        let lead_id = id(TABLE, "lead_id", &row.lead_id)?;
        let update = UpdateEntry {
            project_id: id(TABLE, "project_id", &row.project_id)?,
            update_id,
            position: LogPosition::message(row.log_epoch, row.log_sequence as u64),
            logged_at: row.logged_at.into(),
            command: Box::new(command),
            text: row.command.into(),
            traceparent: row.traceparent,
        };
        held.entry(lead_id).or_default().push(Arc::new(QueuedUpdate { lead_id, update }));
    }
    Ok(Some(held))
}

/// Which of a batch's updates are held already.
pub(crate) async fn known(pool: &PgPool, keys: &LeadKeys) -> Result<HashSet<UpdateKey>, StoreError> {
    let (projects, updates): (Vec<_>, Vec<_>) =
        keys.updates.iter().map(|(project, update)| (*project.as_bytes(), *update.as_bytes())).unzip();
    // Lateral with a limit: looked up one by one through the index, whatever the planner thinks of the table's size.
    let rows = sqlx::query!(
        r#"SELECT h.project_id, h.update_id
           FROM unnest($1::bytea[], $2::bytea[]) AS n (project_id, update_id)
           CROSS JOIN LATERAL (
               SELECT h.project_id, h.update_id FROM lead_state.queued_updates h
               WHERE h.project_id = n.project_id AND h.update_id = n.update_id
               LIMIT 1
           ) AS h"#,
        &projects as _,
        &updates as _
    )
    .fetch_all(pool)
    .await?;
    let id = |column, bytes| id(TABLE, column, bytes);
    rows.iter().map(|row| Ok((id("project_id", &row.project_id)?, id("update_id", &row.update_id)?))).collect()
}

/// An update's story while it is held.
pub(crate) async fn find(
    pool: &PgPool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Option<rpc::Update>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT h.log_sequence, h.logged_at, h.lead_id, l.process_id, l.reference_id, h.command::text AS "command!",
                  (SELECT max(c.expires_at) FROM lead_state.active_calls c WHERE c.lead_id = h.lead_id) AS held_until
           FROM lead_state.queued_updates h JOIN lead_state.leads l USING (lead_id)
           WHERE h.project_id = $1 AND h.update_id = $2"#,
        project_id.as_bytes(),
        update_id.as_bytes()
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        let command: UpdateCommand = serde_json::from_str(&row.command)
            .map_err(|e| StoreError::Corrupt { table: TABLE, fault: format!("command of {update_id}: {e}") })?;
        Ok(rpc::Update {
            status: UpdateStatus::Pending,
            log_sequence: Some(row.log_sequence as u64),
            logged_at: Some(row.logged_at.into()),
            lead_id: Some(id(TABLE, "lead_id", &row.lead_id)?),
            process_id: Some(id("leads", "process_id", &row.process_id)?),
            reference_id: row.reference_id,
            user_id: command.user_id,
            api_key_id: command.api_key_id,
            command: Some(object(TABLE, "command", update_id, row.command)?),
            queued_until: row.held_until.map(Into::into),
            ..rpc::Update::pending(update_id)
        })
    })
    .transpose()
}

/// Leads, with their projects, of which something is held though no call is in progress at this time.
pub(crate) async fn due(pool: &PgPool, now: Timestamp) -> Result<Vec<(ObjectId, ObjectId)>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT DISTINCT h.project_id, h.lead_id FROM lead_state.queued_updates h
           WHERE NOT EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = h.lead_id AND c.expires_at > $1)
           LIMIT $2"#,
        time(now),
        MAX_DUE
    )
    .fetch_all(pool)
    .await?;
    let id = |column, bytes| id(TABLE, column, bytes);
    rows.iter().map(|row| Ok((id("project_id", &row.project_id)?, id("lead_id", &row.lead_id)?))).collect()
}

/// Writes what a batch holds, and takes away what it decided.
pub(crate) async fn write(connection: &mut PgConnection, from: &Checkpoint, plan: &Plan) -> Result<(), WriteError> {
    if !plan.released.is_empty() {
        let (projects, updates): (Vec<_>, Vec<_>) =
            plan.released.iter().map(|(project, update)| (*project.as_bytes(), *update.as_bytes())).unzip();
        let done = sqlx::query!(
            r#"DELETE FROM lead_state.queued_updates h USING unnest($1::bytea[], $2::bytea[]) AS n (project_id, update_id)
               WHERE h.project_id = n.project_id AND h.update_id = n.update_id"#,
            &projects as _,
            &updates as _
        )
        .execute(&mut *connection)
        .await?;
        if done.rows_affected() != plan.released.len() as u64 {
            let fault = format!("{} of {} updates are there", done.rows_affected(), plan.released.len());
            return Err(StoreError::Corrupt { table: TABLE, fault }.into());
        }
    }
    if !plan.newly_queued.is_empty() {
        let updates: Vec<_> = plan.newly_queued.iter().map(|held| &held.update).collect();
        let leads: Vec<_> = plan.newly_queued.iter().map(|held| *held.lead_id.as_bytes()).collect();
        let projects: Vec<_> = updates.iter().map(|update| *update.project_id.as_bytes()).collect();
        let ids: Vec<_> = updates.iter().map(|update| *update.update_id.as_bytes()).collect();
        let seqs: Vec<_> = updates.iter().map(|update| update.position.sequence as i64).collect();
        let times: Vec<_> = updates.iter().map(|update| time(update.logged_at)).collect();
        let commands: Vec<_> = updates.iter().map(|update| &*update.text).collect();
        let traces: Vec<_> = updates.iter().map(|update| update.traceparent.as_deref()).collect();
        // What is in the ledger already is no more held than it would be applied.
        let done = sqlx::query!(
            r#"INSERT INTO lead_state.queued_updates
                   (project_id, update_id, lead_id, log_epoch, log_sequence, log_index, logged_at, command, traceparent)
               SELECT n.project_id, n.update_id, n.lead_id, $1, n.log_sequence, 0, n.logged_at, n.command::json, n.traceparent
               FROM unnest($2::bytea[], $3::bytea[], $4::bytea[], $5::bigint[], $6::timestamptz[], $7::text[], $8::text[])
                   AS n (project_id, update_id, lead_id, log_sequence, logged_at, command, traceparent)
               WHERE NOT EXISTS (SELECT FROM lead_state.lead_updates u
                                 WHERE u.project_id = n.project_id AND u.update_id = n.update_id)"#,
            from.applied.epoch,
            &projects as _,
            &ids as _,
            &leads as _,
            &seqs,
            &times,
            &commands as _,
            &traces as _
        )
        .execute(connection)
        .await?;
        if done.rows_affected() != plan.newly_queued.len() as u64 {
            return Err(WriteError::Known);
        }
    }
    Ok(())
}

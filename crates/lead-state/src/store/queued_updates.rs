//! Queued updates: they wait for the end of a call.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use contract::{
    ObjectId, Timestamp,
    command::UpdateCommand,
    rpc::{self, UpdateStatus},
};
use futures::TryStreamExt;
use service_kit::postgres::{Pool, Session};

use super::{
    StoreError,
    columns::query_columns,
    row::{Hex, Row, position_columns, time},
};
use crate::core::{
    batch::{LeadKeys, QueuedUpdate, UpdateKey},
    entry::UpdateEntry,
};

const TABLE: &str = "queued_updates";

/// Limit of the leads in one answer of [`due_leads`].
const MAX_DUE: i64 = 500;

pub(crate) async fn count(pool: &Pool) -> Result<u64, StoreError> {
    let count = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM lead_state.queued_updates"#).fetch_one(pool);
    Ok(count.await? as u64)
}

/// The queued updates of these leads, in log order. None if their commands have more than `budget` bytes.
pub(crate) async fn of_leads(
    connection: &mut Session,
    leads: impl Iterator<Item = ObjectId>,
    mut budget: usize,
) -> Result<Option<HashMap<ObjectId, Vec<Arc<QueuedUpdate>>>>, StoreError> {
    let ids: Vec<_> = leads.map(|lead| *lead.as_bytes()).collect();
    let mut queued = HashMap::<_, Vec<_>>::new();
    let mut rows = sqlx::query!(
        r#"SELECT project_id, update_id, lead_id, log_epoch, log_sequence, log_index, logged_at,
                  command::text AS "command!", traceparent
           FROM lead_state.queued_updates WHERE lead_id = ANY($1::bytea[])
           ORDER BY lead_id, log_epoch, log_sequence, log_index"#,
        &ids as _
    )
    .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let Some(left) = budget.checked_sub(row.command.len()) else { return Ok(None) };
        budget = left;
        let stored = Row::new(TABLE, Hex(&row.update_id));
        let lead_id = stored.id("lead_id", &row.lead_id)?;
        let update = UpdateEntry {
            project_id: stored.id("project_id", &row.project_id)?,
            update_id: stored.id("update_id", &row.update_id)?,
            position: stored.position("log_sequence", (row.log_epoch, row.log_sequence, row.log_index))?,
            logged_at: row.logged_at.into(),
            command: Box::new(stored.json("command", &row.command)?),
            text: row.command.into(),
            traceparent: row.traceparent,
        };
        queued.entry(lead_id).or_default().push(Arc::new(QueuedUpdate { lead_id, update }));
    }
    Ok(Some(queued))
}

/// The updates of a batch that are queued already.
pub(crate) async fn duplicates(pool: &Pool, keys: &LeadKeys) -> Result<HashSet<UpdateKey>, StoreError> {
    let (projects, updates): (Vec<_>, Vec<_>) =
        keys.updates.iter().map(|(project, update)| (*project.as_bytes(), *update.as_bytes())).unzip();
    // Lateral with a limit: one index look-up per update, whatever the planner estimates of the table's size.
    let rows = sqlx::query!(
        r#"SELECT q.project_id, q.update_id
           FROM unnest($1::bytea[], $2::bytea[]) AS n (project_id, update_id)
           CROSS JOIN LATERAL (
               SELECT q.project_id, q.update_id FROM lead_state.queued_updates q
               WHERE q.project_id = n.project_id AND q.update_id = n.update_id
               LIMIT 1
           ) AS q"#,
        &projects as _,
        &updates as _
    )
    .fetch_all(pool)
    .await?;
    rows.iter().map(|row| update_key(TABLE, &row.project_id, &row.update_id)).collect()
}

pub(super) fn update_key(table: &'static str, project_id: &[u8], update_id: &[u8]) -> Result<UpdateKey, StoreError> {
    let stored = Row::new(table, Hex(update_id));
    Ok((stored.id("project_id", project_id)?, stored.id("update_id", update_id)?))
}

/// An update, while it is queued.
pub(crate) async fn find(
    pool: &Pool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Option<rpc::Update>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT q.log_sequence, q.logged_at, q.lead_id, l.process_id, l.reference_id, q.command::text AS "command!",
                  (SELECT max(c.expires_at) FROM lead_state.active_calls c WHERE c.lead_id = q.lead_id) AS queued_until
           FROM lead_state.queued_updates q JOIN lead_state.leads l USING (lead_id)
           WHERE q.project_id = $1 AND q.update_id = $2"#,
        project_id.as_bytes(),
        update_id.as_bytes()
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let stored = Row::new(TABLE, &update_id);
    let command: UpdateCommand = stored.json("command", &row.command)?;
    Ok(Some(rpc::Update {
        status: UpdateStatus::Pending,
        log_sequence: Some(row.log_sequence as u64),
        logged_at: Some(row.logged_at.into()),
        lead_id: Some(stored.id("lead_id", &row.lead_id)?),
        process_id: Some(Row::new("leads", Hex(&row.lead_id)).id("process_id", &row.process_id)?),
        reference_id: row.reference_id,
        user_id: command.user_id,
        api_key_id: command.api_key_id,
        command: Some(stored.object("command", row.command)?),
        queued_until: row.queued_until.map(Into::into),
        ..rpc::Update::pending(update_id)
    }))
}

/// The projects and leads that have queued updates and no call in progress at this time.
pub(crate) async fn due_leads(pool: &Pool, now: Timestamp) -> Result<Vec<(ObjectId, ObjectId)>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT DISTINCT q.project_id, q.lead_id FROM lead_state.queued_updates q
           WHERE NOT EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = q.lead_id AND c.expires_at > $1)
           LIMIT $2"#,
        time(now),
        MAX_DUE
    )
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let stored = Row::new(TABLE, Hex(&row.lead_id));
            Ok((stored.id("project_id", &row.project_id)?, stored.id("lead_id", &row.lead_id)?))
        })
        .collect()
}

/// Removes updates that a batch decided.
pub(super) async fn delete(connection: &mut Session, released: &[UpdateKey]) -> Result<(), StoreError> {
    if released.is_empty() {
        return Ok(());
    }
    let deleted = query_columns!(query, [],
        "DELETE FROM lead_state.queued_updates q USING "
        unnest(released) {
            "project_id" "bytea[]" = |(project_id, _)| *project_id.as_bytes();
            "update_id" "bytea[]" = |(_, update_id)| *update_id.as_bytes();
        }
        " WHERE q.project_id = n.project_id AND q.update_id = n.update_id"
    )
    .execute(connection)
    .await?;
    match deleted.rows_affected() {
        deleted if deleted == released.len() as u64 => Ok(()),
        deleted => Err(StoreError::Inconsistent(format!(
            "{} queued updates were decided, but {deleted} of them are in {TABLE}",
            released.len()
        ))),
    }
}

/// Inserts the updates that a batch queued, unless one of them is in the ledger.
pub(super) async fn insert(connection: &mut Session, queued: &[Arc<QueuedUpdate>]) -> Result<(), StoreError> {
    if queued.is_empty() {
        return Ok(());
    }
    let inserted = query_columns!(query, [],
        "INSERT INTO lead_state.queued_updates"
        insert(queued) {
            "project_id" "bytea[]" = |queued| *queued.update.project_id.as_bytes();
            "update_id" "bytea[]" = |queued| *queued.update.update_id.as_bytes();
            "lead_id" "bytea[]" = |queued| *queued.lead_id.as_bytes();
            "log_epoch" "int[]" = |queued| queued.update.position.epoch;
            "log_sequence" "bigint[]" = |queued| position_columns(queued.update.position).1;
            "log_index" "int[]" = |queued| position_columns(queued.update.position).2;
            "logged_at" "timestamptz[]" = |queued| time(queued.update.logged_at);
            "command" "text[]" "n.command::json" = |queued| &*queued.update.text;
            "traceparent" "text[]" = |queued| queued.update.traceparent.as_deref();
        }
        " WHERE NOT EXISTS (SELECT FROM lead_state.lead_updates u
                            WHERE u.project_id = n.project_id AND u.update_id = n.update_id)"
    )
    .execute(connection)
    .await?;
    if inserted.rows_affected() == queued.len() as u64 { Ok(()) } else { Err(StoreError::Duplicate) }
}

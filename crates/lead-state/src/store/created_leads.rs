//! The outbox of created leads: creations to be logged.

use contract::{ObjectId, Timestamp};
use service_kit::postgres::Pool;

use super::{
    StoreError,
    row::{Hex, Row, time},
};

const TABLE: &str = "created_leads";

/// The creation of a lead, to be logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CreatedLead {
    pub(crate) project_id: ObjectId,
    pub(crate) update_id: ObjectId,
    /// The text of a [`LeadCreated`](contract::command::LeadCreated).
    pub(crate) command: String,
}

/// Deletes the creations that are in the ledger; at most `limit`. Returns how many.
pub(crate) async fn delete_applied(pool: &Pool, limit: i64) -> Result<u64, StoreError> {
    // Lateral with a limit: one look-up per creation, in the index of its partition.
    let deleted = sqlx::query!(
        "DELETE FROM lead_state.created_leads AS c
         USING (SELECT w.lead_id FROM lead_state.created_leads w
                CROSS JOIN LATERAL (SELECT 1 FROM lead_state.lead_updates u
                                    WHERE u.project_id = w.project_id AND u.update_id = w.update_id LIMIT 1) AS u
                LIMIT $1) AS applied
         WHERE c.lead_id = applied.lead_id",
        limit
    )
    .execute(pool)
    .await?;
    Ok(deleted.rows_affected())
}

/// The oldest creations before this time; at most `limit`.
pub(crate) async fn before(pool: &Pool, before: Timestamp, limit: i64) -> Result<Vec<CreatedLead>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT lead_id, project_id, update_id, command::text AS "command!"
           FROM lead_state.created_leads WHERE created_at < $1 ORDER BY created_at LIMIT $2"#,
        time(before),
        limit
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let stored = Row::new(TABLE, Hex(&row.lead_id));
            Ok(CreatedLead {
                project_id: stored.id("project_id", &row.project_id)?,
                update_id: stored.id("update_id", &row.update_id)?,
                command: row.command,
            })
        })
        .collect()
}

//! Calls in progress.

use contract::{ObjectId, Timestamp, rpc};
use service_kit::postgres::Pool;

use super::{
    StoreError,
    row::{Hex, Row, time},
};

const TABLE: &str = "active_calls";

/// A position in the list of a project's calls: a lead, and the id of a call with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallPosition {
    pub(crate) lead_id: ObjectId,
    /// Empty where the producer gave no id.
    pub(crate) call_id: String,
}

/// A project's calls after `after` that are in progress, by lead: `limit` of them, and one more to show that there are
/// more.
pub(crate) async fn list(
    pool: &Pool,
    project_id: ObjectId,
    lead_id: Option<ObjectId>,
    after: Option<&CallPosition>,
    now: Timestamp,
    limit: u32,
) -> Result<Vec<rpc::Call>, StoreError> {
    let (after_lead, after_call) =
        after.map_or((&[][..], ""), |place| (&place.lead_id.as_bytes()[..], place.call_id.as_str()));
    let rows = sqlx::query!(
        r#"SELECT c.lead_id, c.call_id, c.started_at, c.expires_at, l.process_id, l.reference_id
           FROM lead_state.active_calls c JOIN lead_state.leads l USING (lead_id)
           WHERE c.project_id = $1 AND (c.lead_id, c.call_id) > ($2, $3)
               AND ($4::bytea IS NULL OR c.lead_id = $4) AND c.expires_at > $5
           ORDER BY c.lead_id, c.call_id LIMIT $6"#,
        project_id.as_bytes(),
        after_lead,
        after_call,
        lead_id.as_ref().map(|id| id.as_bytes()) as _,
        time(now),
        i64::from(limit) + 1
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let stored = Row::new(TABLE, Hex(&row.lead_id));
            Ok(rpc::Call {
                lead_id: stored.id("lead_id", &row.lead_id)?,
                process_id: stored.id("process_id", &row.process_id)?,
                reference_id: row.reference_id,
                call_id: Some(row.call_id).filter(|id| !id.is_empty()),
                started_at: row.started_at.into(),
                expires_at: row.expires_at.into(),
            })
        })
        .collect()
}

//! A project's updates by their ids, and their outcomes as webhooks tell them.

use contract::{JsonObject, ObjectId, Timestamp, event::WebhookPayload, rpc::Outcome};
use sqlx::PgPool;

use super::{StoreError, id, object, optional_id};

const TABLE: &str = "lead_updates";
/// Beyond every id. A bound that is always there is met by index under any plan.
const BEYOND_IDS: [u8; 13] = [0xff; 13];
/// Most bytes of outcomes that are told at once, the last one aside: they must fit into a message of NATS (1 MiB).
const MAX_BYTES: i64 = 256 << 10;

/// The updates of a project that were made since, the newest first, before this one; or the oldest first, after it.
pub(crate) async fn of_project(
    pool: &PgPool,
    project_id: ObjectId,
    since: Option<Timestamp>,
    oldest_first: bool,
    place: Option<ObjectId>,
    limit: u32,
) -> Result<Vec<ObjectId>, StoreError> {
    // The ids of a second begin with it.
    let since = since.map(|at| at.unix_seconds().to_be_bytes().to_vec()).unwrap_or_default();
    let limit = i64::from(limit) + 1;
    let rows = if oldest_first {
        sqlx::query_scalar!(
            r#"SELECT update_id FROM lead_state.lead_updates
               WHERE project_id = $1 AND update_id >= $2 AND update_id > $3 ORDER BY update_id LIMIT $4"#,
            project_id.as_bytes(),
            since,
            place.as_ref().map_or(&[][..], |id| id.as_bytes()),
            limit
        )
        .fetch_all(pool)
        .await?
    } else {
        sqlx::query_scalar!(
            r#"SELECT update_id FROM lead_state.lead_updates
               WHERE project_id = $1 AND update_id >= $2 AND update_id < $3 ORDER BY update_id DESC LIMIT $4"#,
            project_id.as_bytes(),
            since,
            place.as_ref().map_or(&BEYOND_IDS[..], |id| id.as_bytes()),
            limit
        )
        .fetch_all(pool)
        .await?
    };
    rows.iter().map(|bytes| id(TABLE, "update_id", bytes)).collect()
}

/// What became of these updates, in their order: as many as fit, and at least one if there is any.
pub(crate) async fn outcomes(
    pool: &PgPool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
) -> Result<Vec<Outcome>, StoreError> {
    let update_ids = update_ids.iter().map(|id| id.as_bytes().to_vec()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"WITH wanted AS MATERIALIZED (
               SELECT u.place, l.update_id, l.success, l.error, l.lead_id, l.reference_id, l.applied_at, l.data::text AS data
               FROM unnest($2::bytea[]) WITH ORDINALITY AS u (update_id, place)
               JOIN lead_state.lead_updates AS l ON l.project_id = $1 AND l.update_id = u.update_id
           ), weighed AS (
               SELECT *, sum(coalesce(octet_length(data), 0)) OVER (ORDER BY place) - coalesce(octet_length(data), 0) AS before
               FROM wanted
           )
           SELECT update_id AS "update_id!", success AS "success!", error, lead_id, reference_id,
                  applied_at AS "applied_at!", data
           FROM weighed WHERE before <= $3 ORDER BY place"#,
        project_id.as_bytes(),
        &update_ids[..],
        MAX_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let update_id = id(TABLE, "update_id", &row.update_id)?;
            let data = row.data.map(|text| object(TABLE, "data", update_id, text)).transpose()?;
            let payload = WebhookPayload {
                action_type: "update",
                update_id,
                success: row.success,
                error: row.error.as_deref(),
                lead_id: optional_id(TABLE, "lead_id", row.lead_id.as_deref())?,
                reference_id: row.reference_id.as_deref(),
                timestamp: row.applied_at.into(),
                data: data.as_ref(),
            };
            let corrupt = |e: &dyn std::fmt::Display| StoreError::Corrupt {
                table: TABLE,
                fault: format!("the outcome of {update_id} cannot be told: {e}"),
            };
            let text = serde_json::to_string(&payload).map_err(|e| corrupt(&e))?;
            Ok(Outcome { update_id, payload: JsonObject::from_text(text).map_err(|e| corrupt(&e))? })
        })
        .collect()
}

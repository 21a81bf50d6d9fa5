//! 8 Retry: deliveries listed, and settled ones made pending again. No statement looks at more rows than it is told.

use contract::{
    ObjectId, Timestamp,
    rpc::{DeliveryId, DeliveryStatus, ListedDelivery},
};
use sqlx::PgPool;
use time::OffsetDateTime;

use super::id;

/// A row as it is listed.
struct Row {
    update_id: [u8; 12],
    callback_id: [u8; 12],
    process_id: Option<[u8; 12]>,
    status: String,
    attempts: i32,
    next_attempt_at: Option<OffsetDateTime>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    last_error: Option<String>,
}

impl From<Row> for ListedDelivery {
    fn from(row: Row) -> Self {
        Self {
            id: DeliveryId { update_id: id(row.update_id), callback_id: id(row.callback_id) },
            process_id: row.process_id.map(id),
            status: match row.status.as_str() {
                "delivered" => DeliveryStatus::Delivered,
                "exhausted" => DeliveryStatus::Exhausted,
                // A CHECK leaves no fourth.
                _ => DeliveryStatus::Pending,
            },
            attempts: row.attempts.unsigned_abs(),
            next_attempt_at: row.next_attempt_at.map(Into::into),
            created_at: row.created_at.into(),
            updated_at: row.updated_at.into(),
            error: row.last_error,
        }
    }
}

pub(crate) fn name(status: DeliveryStatus) -> &'static str {
    match status {
        DeliveryStatus::Pending => "pending",
        DeliveryStatus::Delivered => "delivered",
        DeliveryStatus::Exhausted => "exhausted",
    }
}

/// What the ids of updates since this second begin with, or are greater than.
fn prefix(since: Option<Timestamp>) -> Vec<u8> {
    since.map(|at| at.unix_seconds().to_be_bytes().to_vec()).unwrap_or_default()
}

/// Beyond every id. A bound that is always there is met by index under any plan.
const BEYOND_IDS: [u8; 13] = [0xff; 13];

/// A project's deliveries that stand so, but not those that are delivered: the newest first, before this one.
pub(crate) async fn unsettled(
    pool: &PgPool,
    project_id: ObjectId,
    status: DeliveryStatus,
    since: Option<Timestamp>,
    before: Option<DeliveryId>,
    limit: i64,
) -> sqlx::Result<Vec<ListedDelivery>> {
    let rows = sqlx::query_as!(
        Row,
        r#"
        SELECT update_id AS "update_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]",
               process_id AS "process_id: [u8; 12]", status, attempts, next_attempt_at, created_at, updated_at, last_error
        FROM webhooks.deliveries
        WHERE project_id = $1 AND status = $2 AND status <> 'delivered'
            AND update_id >= $3 AND (update_id, callback_id) < ($4, $5)
        ORDER BY update_id DESC, callback_id DESC
        LIMIT $6
        "#,
        project_id.as_bytes(),
        name(status),
        prefix(since),
        before.as_ref().map_or(&BEYOND_IDS[..], |id| id.update_id.as_bytes()),
        before.as_ref().map_or(&[][..], |id| id.callback_id.as_bytes()),
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// A project's exhausted deliveries, the oldest first, after this one.
pub(crate) async fn exhausted_after(
    pool: &PgPool,
    project_id: ObjectId,
    since: Timestamp,
    after: Option<DeliveryId>,
    limit: i64,
) -> sqlx::Result<Vec<DeliveryId>> {
    let rows = sqlx::query!(
        r#"
        SELECT update_id AS "update_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]"
        FROM webhooks.deliveries
        WHERE project_id = $1 AND status = 'exhausted' AND status <> 'delivered'
            AND update_id >= $2 AND (update_id, callback_id) > ($3, $4)
        ORDER BY update_id, callback_id
        LIMIT $5
        "#,
        project_id.as_bytes(),
        prefix(Some(since)),
        after.as_ref().map_or(&[][..], |id| id.update_id.as_bytes()),
        after.as_ref().map_or(&[][..], |id| id.callback_id.as_bytes()),
        limit,
    )
    .fetch_all(pool)
    .await?;
    let ids = rows.into_iter().map(|row| DeliveryId { update_id: id(row.update_id), callback_id: id(row.callback_id) });
    Ok(ids.collect())
}

/// The deliveries of a project's updates, in the order of the updates.
pub(crate) async fn of_updates(
    pool: &PgPool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
) -> sqlx::Result<Vec<ListedDelivery>> {
    let update_ids = update_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query_as!(
        Row,
        r#"
        SELECT d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]",
               d.process_id AS "process_id: [u8; 12]", d.status, d.attempts, d.next_attempt_at, d.created_at, d.updated_at,
               d.last_error
        FROM unnest($2::bytea[]) WITH ORDINALITY AS u (update_id, place)
        JOIN webhooks.deliveries AS d ON d.update_id = u.update_id
        WHERE d.project_id = $1
        ORDER BY u.place, d.callback_id DESC
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// A delivery to be made again.
#[derive(Debug, Clone)]
pub(crate) struct Again<'a> {
    pub(crate) id: DeliveryId,
    pub(crate) due: Timestamp,
    /// Its body, where it was delivered and none was kept.
    pub(crate) payload: Option<&'a str>,
}

/// Makes settled deliveries of a project pending, with their schedules from the beginning; returns those that are so now. Those of
/// callbacks with an order are due when their turn comes.
/// One that was settled otherwise or is pending meanwhile stays as it is.
pub(crate) async fn requeue(
    pool: &PgPool,
    project_id: ObjectId,
    deliveries: &[Again<'_>],
    now: Timestamp,
) -> sqlx::Result<Vec<ListedDelivery>> {
    let update_ids = deliveries.iter().map(|d| *d.id.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = deliveries.iter().map(|d| *d.id.callback_id.as_bytes()).collect::<Vec<_>>();
    let dues = deliveries.iter().map(|d| d.due.into()).collect::<Vec<OffsetDateTime>>();
    let payloads = deliveries.iter().map(|d| d.payload).collect::<Vec<_>>();
    let rows = sqlx::query_as!(
        Row,
        r#"
        UPDATE webhooks.deliveries AS d SET
            status = 'pending', next_attempt_at = CASE WHEN d.lead_id IS NULL THEN again.due END, payload = coalesce(d.payload, again.payload),
            schedule_from = d.attempts, exhausted_announced = false, updated_at = $6
        FROM unnest($2::bytea[], $3::bytea[], $4::timestamptz[], $5::text[])
            AS again (update_id, callback_id, due, payload)
        WHERE d.update_id = again.update_id AND d.callback_id = again.callback_id AND d.project_id = $1
            AND d.status <> 'pending' AND coalesce(d.payload, again.payload) IS NOT NULL
        RETURNING d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]",
                  d.process_id AS "process_id: [u8; 12]", d.status, d.attempts, d.next_attempt_at, d.created_at,
                  d.updated_at, d.last_error
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &dues as &[OffsetDateTime],
        &payloads as &[Option<&str>],
        OffsetDateTime::from(now),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

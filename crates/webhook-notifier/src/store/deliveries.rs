//! Reads the delivery log, and makes completed deliveries pending again. Every statement reads a limited number of
//! rows.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use contract::{
    ObjectId, Timestamp,
    event::ERASED,
    event_kind::DeliveryKind,
    rpc::{Attempt, Delivery, DeliveryId, DeliveryStatus, ListDeliveries, ListedDelivery},
};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{bodies, error::StoreError, id};
use crate::core::ordering::LeadKey;

fn parse_status(text: &str, id: DeliveryId) -> Result<DeliveryStatus, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt {
        table: "deliveries",
        column: "status",
        id: id.to_string(),
        value: text.to_owned(),
    })
}

/// Reads the column `kind` of a delivery of this update.
pub(super) fn parse_kind(text: &str, update_id: ObjectId) -> Result<DeliveryKind, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt {
        table: "deliveries",
        column: "kind",
        id: update_id.to_string(),
        value: text.to_owned(),
    })
}

/// The kinds that this version can read.
pub(super) fn kind_names() -> Vec<&'static str> {
    DeliveryKind::ALL.iter().map(|kind| kind.as_str()).collect()
}

pub(super) fn delivery_id(update_id: [u8; 12], callback_id: [u8; 12], kind: &str) -> Result<DeliveryId, StoreError> {
    let update_id = id(update_id);
    Ok(DeliveryId { update_id, callback_id: id(callback_id), kind: parse_kind(kind, update_id)? })
}

struct Row {
    update_id: [u8; 12],
    callback_id: [u8; 12],
    kind: String,
    process_id: Option<[u8; 12]>,
    status: String,
    attempts: i32,
    next_attempt_at: Option<OffsetDateTime>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    last_error: Option<String>,
}

impl TryFrom<Row> for ListedDelivery {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let id = delivery_id(row.update_id, row.callback_id, &row.kind)?;
        Ok(Self {
            id,
            process_id: row.process_id.map(super::id),
            status: parse_status(&row.status, id)?,
            attempts: row.attempts.unsigned_abs(),
            next_attempt_at: row.next_attempt_at.map(Into::into),
            created_at: row.created_at.into(),
            updated_at: row.updated_at.into(),
            status_code: None,
            error: row.last_error,
        })
    }
}

fn listed(rows: Vec<Row>) -> Result<Vec<ListedDelivery>, StoreError> {
    rows.into_iter().map(TryInto::try_into).collect()
}

/// The prefix of update ids from this second on.
fn id_prefix(since: Option<Timestamp>) -> Vec<u8> {
    since.map(|at| at.unix_seconds().to_be_bytes().to_vec()).unwrap_or_default()
}

/// Greater than every id. A bound that is always present makes every plan use the index.
const BEYOND_IDS: [u8; 13] = [0xff; 13];

/// The recorded deliveries of this update: their callbacks and kinds. A pending delivery without a body is left out, so
/// that its event delivers it: an earlier version lost long bodies when it crashed.
pub(crate) async fn recorded(
    pool: &Pool,
    update_id: ObjectId,
) -> Result<HashSet<(ObjectId, DeliveryKind)>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT callback_id AS "callback_id: [u8; 12]", kind FROM webhooks.deliveries AS d
        WHERE update_id = $1
            AND (status <> 'pending' OR payload IS NOT NULL
                 OR EXISTS (SELECT FROM webhooks.payloads AS p
                            WHERE p.update_id = d.update_id AND p.kind = d.kind AND p.project_id = d.project_id))
        "#,
        update_id.as_bytes(),
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok((id(row.callback_id), parse_kind(&row.kind, update_id)?))).collect()
}

/// The deliveries of a project's update with their attempts, ordered by callback and kind.
pub(crate) async fn with_attempts(
    pool: &Pool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Vec<Delivery>, StoreError> {
    // One statement, so that status and attempts are consistent.
    let rows = sqlx::query!(
        r#"
        SELECT d.callback_id AS "callback_id: [u8; 12]", d.kind, d.status, d.next_attempt_at,
               a.number AS "number?", a.started_at AS "started_at?", a.duration_ms AS "duration_ms?",
               a.status_code, a.error, a.response
        FROM webhooks.deliveries AS d
        LEFT JOIN webhooks.every_attempt AS a
            ON a.update_id = $2 AND a.callback_id = d.callback_id AND a.kind = d.kind
        WHERE d.update_id = $2 AND d.project_id = $1
        ORDER BY d.callback_id, a.number
        "#,
        project_id.as_bytes(),
        update_id.as_bytes(),
    )
    .fetch_all(pool)
    .await?;
    let mut deliveries = BTreeMap::new();
    for row in rows {
        let delivery_id = delivery_id(*update_id.as_bytes(), row.callback_id, &row.kind)?;
        let status = parse_status(&row.status, delivery_id)?;
        let DeliveryId { callback_id, kind, .. } = delivery_id;
        let delivery = deliveries.entry(delivery_id).or_insert_with(|| Delivery {
            update_id,
            callback_id,
            kind,
            status,
            next_attempt_at: row.next_attempt_at.map(Into::into),
            attempts: Vec::new(),
        });
        if let (Some(number), Some(started_at)) = (row.number, row.started_at) {
            delivery.attempts.push(Attempt {
                number: number.unsigned_abs(),
                started_at: started_at.into(),
                duration_ms: row.duration_ms.unwrap_or_default().unsigned_abs(),
                status_code: row.status_code.and_then(|code| u16::try_from(code).ok()),
                error: row.error,
                response: row.response,
            });
        }
    }
    Ok(deliveries.into_values().collect())
}

/// A project's deliveries with this status, which is not `delivered`, in the time range of a query: the newest first,
/// before `before`.
pub(crate) async fn undelivered(
    pool: &Pool,
    query: &ListDeliveries,
    status: DeliveryStatus,
    before: Option<DeliveryId>,
    limit: i64,
) -> Result<Vec<ListedDelivery>, StoreError> {
    let end = query.until.map(|at| at.unix_seconds_rounded_up().to_be_bytes());
    let end = end.as_ref().map_or(&BEYOND_IDS[..], |seconds| &seconds[..]);
    let rows = sqlx::query_as!(
        Row,
        r#"
        SELECT update_id AS "update_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]", kind,
               process_id AS "process_id: [u8; 12]", status, attempts, next_attempt_at, created_at, updated_at, last_error
        FROM webhooks.deliveries
        WHERE project_id = $1 AND status = $2 AND status <> 'delivered'
            AND update_id >= $3 AND (update_id, callback_id, kind) < ($4, $5, $6)
        ORDER BY update_id DESC, callback_id DESC, kind DESC
        LIMIT $7
        "#,
        query.project_id.as_bytes(),
        status.as_str(),
        id_prefix(query.since),
        before.as_ref().map_or(end, |id| id.update_id.as_bytes()),
        before.as_ref().map_or(&[][..], |id| id.callback_id.as_bytes()),
        before.as_ref().map_or("", |id| id.kind.as_str()),
        limit,
    )
    .fetch_all(pool)
    .await?;
    listed(rows)
}

/// A project's exhausted deliveries, the oldest first, after `after`.
pub(crate) async fn exhausted(
    pool: &Pool,
    project_id: ObjectId,
    since: Timestamp,
    after: Option<DeliveryId>,
    limit: i64,
) -> Result<Vec<DeliveryId>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT update_id AS "update_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]", kind
        FROM webhooks.deliveries
        WHERE project_id = $1 AND status = 'exhausted' AND status <> 'delivered'
            AND update_id >= $2 AND (update_id, callback_id, kind) > ($3, $4, $5)
        ORDER BY update_id, callback_id, kind
        LIMIT $6
        "#,
        project_id.as_bytes(),
        id_prefix(Some(since)),
        after.as_ref().map_or(&[][..], |id| id.update_id.as_bytes()),
        after.as_ref().map_or(&[][..], |id| id.callback_id.as_bytes()),
        after.as_ref().map_or("", |id| id.kind.as_str()),
        limit,
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| delivery_id(row.update_id, row.callback_id, &row.kind)).collect()
}

/// The deliveries of a project's updates, in the order of the updates.
pub(crate) async fn of_updates(
    pool: &Pool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
) -> Result<Vec<ListedDelivery>, StoreError> {
    let update_ids = update_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query_as!(
        Row,
        r#"
        SELECT d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]", d.kind,
               d.process_id AS "process_id: [u8; 12]", d.status, d.attempts, d.next_attempt_at, d.created_at, d.updated_at,
               d.last_error
        FROM unnest($2::bytea[]) WITH ORDINALITY AS u (update_id, number)
        JOIN webhooks.deliveries AS d ON d.update_id = u.update_id
        WHERE d.project_id = $1
        ORDER BY u.number, d.callback_id DESC, d.kind DESC
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
    )
    .fetch_all(pool)
    .await?;
    listed(rows)
}

/// Reads the status of the response to the last attempt of each delivery.
pub(crate) async fn add_status_codes(pool: &Pool, deliveries: &mut [ListedDelivery]) -> Result<(), StoreError> {
    let update_ids = deliveries.iter().map(|d| *d.id.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = deliveries.iter().map(|d| *d.id.callback_id.as_bytes()).collect::<Vec<_>>();
    let kinds = deliveries.iter().map(|d| d.id.kind.as_str()).collect::<Vec<_>>();
    let codes = sqlx::query_scalar!(
        r#"
        SELECT (SELECT a.status_code FROM webhooks.every_attempt AS a
                WHERE a.update_id = d.update_id AND a.callback_id = d.callback_id AND a.kind = d.kind
                ORDER BY a.number DESC LIMIT 1)
        FROM unnest($1::bytea[], $2::bytea[], $3::text[]) WITH ORDINALITY AS d (update_id, callback_id, kind, place)
        ORDER BY d.place
        "#,
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &kinds as &[&str],
    )
    .fetch_all(pool)
    .await?;
    for (delivery, code) in deliveries.iter_mut().zip(codes) {
        delivery.status_code = code.and_then(|code| u16::try_from(code).ok());
    }
    Ok(())
}

/// A completed delivery that is to be made again.
#[derive(Debug, Clone)]
pub(crate) struct Redelivery<'a> {
    pub(crate) id: DeliveryId,
    pub(crate) due: Timestamp,
    /// The body, if the delivery is delivered and so has none stored.
    pub(crate) payload: Option<&'a str>,
}

/// The deliveries that were made pending again, and the leads of the ordered ones.
pub(crate) struct Requeued {
    pub(crate) deliveries: Vec<ListedDelivery>,
    pub(crate) leads: Vec<LeadKey>,
}

/// Makes completed deliveries of a project pending and starts their schedules again. Ordered ones become due when they
/// are their lead's next. Deliveries that are pending already are not changed, and not returned.
pub(crate) async fn requeue(
    pool: &Pool,
    project_id: ObjectId,
    redeliveries: &[Redelivery<'_>],
    now: Timestamp,
) -> Result<Requeued, StoreError> {
    let update_ids = redeliveries.iter().map(|d| *d.id.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = redeliveries.iter().map(|d| *d.id.callback_id.as_bytes()).collect::<Vec<_>>();
    let kinds = redeliveries.iter().map(|d| d.id.kind.as_str()).collect::<Vec<_>>();
    let due = redeliveries.iter().map(|d| d.due.into()).collect::<Vec<OffsetDateTime>>();
    let (long, inline): (Vec<_>, Vec<_>) = redeliveries
        .iter()
        .map(|d| if d.payload.is_some_and(bodies::is_long) { (d.payload, None) } else { (None, d.payload) })
        .unzip();
    let has_long = long.iter().map(Option::is_some).collect::<Vec<_>>();
    let mut transaction = pool.begin().await?;
    let rows = sqlx::query!(
        r#"
        UPDATE webhooks.deliveries AS d SET
            status = 'pending', next_attempt_at = CASE WHEN d.lead_id IS NULL THEN r.due END,
            payload = coalesce(d.payload, r.payload), schedule_offset = d.attempts, exhausted_announced = false,
            updated_at = $6
        FROM unnest($2::bytea[], $3::bytea[], $4::timestamptz[], $5::text[], $7::text[], $8::boolean[])
            AS r (update_id, callback_id, due, payload, kind, has_long)
        WHERE d.update_id = r.update_id AND d.callback_id = r.callback_id AND d.kind = r.kind AND d.project_id = $1
            AND d.status <> 'pending' AND d.last_error IS DISTINCT FROM $9
            AND (coalesce(d.payload, r.payload) IS NOT NULL OR r.has_long
                 OR EXISTS (SELECT FROM webhooks.payloads AS p
                            WHERE p.update_id = d.update_id AND p.kind = d.kind AND p.project_id = d.project_id))
        RETURNING d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]", d.kind,
                  d.process_id AS "process_id: [u8; 12]", d.status, d.attempts, d.next_attempt_at, d.created_at,
                  d.updated_at, d.last_error, d.lead_id AS "lead_id: [u8; 12]"
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &due as &[OffsetDateTime],
        &inline as &[Option<&str>],
        OffsetDateTime::from(now),
        &kinds as &[&str],
        &has_long as &[bool],
        ERASED,
    )
    .fetch_all(&mut *transaction)
    .await?;
    let lead = |callback_id, lead_id| LeadKey { callback_id: id(callback_id), lead_id: id(lead_id) };
    let leads = rows.iter().filter_map(|row| Some(lead(row.callback_id, row.lead_id?))).collect();
    let rows = rows.into_iter().map(|row| Row {
        update_id: row.update_id,
        callback_id: row.callback_id,
        kind: row.kind,
        process_id: row.process_id,
        status: row.status,
        attempts: row.attempts,
        next_attempt_at: row.next_attempt_at,
        created_at: row.created_at,
        updated_at: row.updated_at,
        last_error: row.last_error,
    });
    let deliveries = listed(rows.collect())?;
    let ids = deliveries.iter().map(|delivery| delivery.id).collect::<BTreeSet<_>>();
    let stored = redeliveries.iter().zip(long).filter(|(redelivery, _)| ids.contains(&redelivery.id));
    let bodies = stored.filter_map(|(r, body)| Some(((project_id, r.id.update_id, r.id.kind), body?)));
    bodies::store(&mut transaction, bodies.collect()).await?;
    transaction.commit().await?;
    Ok(Requeued { deliveries, leads })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_status_is_an_error_that_names_the_row() {
        let id = delivery_id([1; 12], [2; 12], "call.ended").unwrap();

        let error = parse_status("lost", id).unwrap_err().to_string();

        assert_eq!(error, format!("corrupt row {id} in webhooks.deliveries: status is \"lost\""));
    }
}

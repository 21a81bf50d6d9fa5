//! Events whose process cannot be read.

use contract::{ObjectId, Timestamp, rpc::ParkedUpdate, text::bounded_error};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{error::StoreError, id};
use crate::core::delivery::LeadOrder;

/// Maximum number of events that are counted.
const MAX_COUNTED: i64 = 100_000;

/// The identity of an event's stream, and its sequence there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventKey {
    pub(crate) stream: String,
    pub(crate) sequence: u64,
}

/// A completion event that waits until its process can be read.
#[derive(Debug, Clone)]
pub(crate) struct ParkedEvent {
    pub(crate) event: EventKey,
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: Option<ObjectId>,
    pub(crate) update_id: ObjectId,
    /// None for an event without a lead.
    pub(crate) order: Option<LeadOrder>,
    pub(crate) published_at: Timestamp,
    pub(crate) reason: String,
    pub(crate) traceparent: Option<String>,
    pub(crate) payload: String,
}

/// The process of parked events, with its project. None: the events have no process.
pub(crate) type ProcessRef = (ObjectId, Option<ObjectId>);

/// The column `process_id`.
fn column(process_id: Option<&ObjectId>) -> &[u8] {
    process_id.map_or(&[][..], |process_id| process_id.as_bytes())
}

fn process_ref(project_id: [u8; 12], process_id: &[u8]) -> ProcessRef {
    (id(project_id), process_id.try_into().ok().map(id))
}

/// Parks an event, unless it is parked already.
pub(crate) async fn insert(pool: &Pool, parked: &ParkedEvent, now: Timestamp) -> Result<(), StoreError> {
    let order = parked.order.as_ref();
    sqlx::query!(
        r#"
        INSERT INTO webhooks.parked_events
            (event_stream, event_sequence, project_id, process_id, update_id, lead_id, order_key, published_at, parked_at,
             reason, traceparent, payload)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
        ON CONFLICT DO NOTHING
        "#,
        parked.event.stream,
        parked.event.sequence.cast_signed(),
        parked.project_id.as_bytes(),
        column(parked.process_id.as_ref()),
        parked.update_id.as_bytes(),
        order.map(|order| order.lead_id.as_bytes().as_slice()),
        order.map(|order| order.key.as_slice()),
        OffsetDateTime::from(parked.published_at),
        OffsetDateTime::from(now),
        bounded_error(parked.reason.as_str()),
        parked.traceparent,
        parked.payload,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// The processes after `after` that events are parked for. Skips from process to process, however many events one has.
pub(crate) async fn processes(
    pool: &Pool,
    after: Option<ProcessRef>,
    limit: i64,
) -> Result<Vec<ProcessRef>, StoreError> {
    let after_process = after.as_ref().and_then(|(_, process_id)| process_id.as_ref());
    let rows = sqlx::query!(
        r#"
        WITH RECURSIVE parked AS (
            (SELECT project_id, process_id FROM webhooks.parked_events
             WHERE (project_id, process_id) > ($1, $2) ORDER BY project_id, process_id LIMIT 1)
            UNION ALL
            SELECT next.* FROM parked
            CROSS JOIN LATERAL (
                SELECT e.project_id, e.process_id FROM webhooks.parked_events e
                WHERE (e.project_id, e.process_id) > (parked.project_id, parked.process_id)
                ORDER BY e.project_id, e.process_id LIMIT 1
            ) AS next
        )
        SELECT project_id AS "project_id!: [u8; 12]", process_id AS "process_id!" FROM parked LIMIT $3
        "#,
        after.as_ref().map_or(&[][..], |(project_id, _)| project_id.as_bytes()),
        column(after_process),
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| process_ref(row.project_id, &row.process_id)).collect())
}

/// Claims events of a process, the oldest first. Concurrent claims get different events.
pub(crate) async fn claim(
    pool: &Pool,
    (project_id, process_id): ProcessRef,
    limit: i64,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<Vec<ParkedEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"
        UPDATE webhooks.parked_events AS e SET claimed_until = $5
        FROM (
            SELECT event_stream, event_sequence FROM webhooks.parked_events
            WHERE project_id = $1 AND process_id = $2 AND (claimed_until IS NULL OR claimed_until < $4)
            ORDER BY event_stream, event_sequence LIMIT $3
            FOR UPDATE SKIP LOCKED
        ) AS claimed
        WHERE e.event_stream = claimed.event_stream AND e.event_sequence = claimed.event_sequence
        RETURNING e.event_stream, e.event_sequence, e.project_id AS "project_id: [u8; 12]", e.process_id,
                  e.update_id AS "update_id: [u8; 12]", e.lead_id AS "lead_id: [u8; 12]", e.order_key, e.published_at,
                  e.reason, e.traceparent, e.payload
        "#,
        project_id.as_bytes(),
        column(process_id.as_ref()),
        limit,
        OffsetDateTime::from(now),
        OffsetDateTime::from(lease_until),
    )
    .fetch_all(pool)
    .await?;
    let events = rows.into_iter().map(|row| {
        let (project_id, process_id) = process_ref(row.project_id, &row.process_id);
        let event = EventKey { stream: row.event_stream, sequence: row.event_sequence.cast_unsigned() };
        let order = row.lead_id.zip(row.order_key).map(|(lead_id, key)| LeadOrder {
            lead_id: id(lead_id),
            key,
            event_stream: event.stream.as_str().into(),
            event_sequence: event.sequence,
        });
        ParkedEvent {
            event,
            project_id,
            process_id,
            update_id: id(row.update_id),
            order,
            published_at: row.published_at.into(),
            reason: row.reason,
            traceparent: row.traceparent,
            payload: row.payload,
        }
    });
    Ok(events.collect())
}

/// Deletes events whose deliveries are recorded.
pub(crate) async fn delete(pool: &Pool, events: &[EventKey]) -> Result<(), StoreError> {
    let streams = events.iter().map(|event| event.stream.as_str()).collect::<Vec<_>>();
    let sequences = events.iter().map(|event| event.sequence.cast_signed()).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        DELETE FROM webhooks.parked_events AS e USING unnest($1::text[], $2::bigint[]) AS done (stream, sequence)
        WHERE e.event_stream = done.stream AND e.event_sequence = done.sequence
        "#,
        &streams as &[&str],
        &sequences,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Whether the event of an update is parked, and since when.
pub(crate) async fn of_update(
    pool: &Pool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Option<ParkedUpdate>, StoreError> {
    let row = sqlx::query!(
        r#"
        SELECT parked_at, reason FROM webhooks.parked_events
        WHERE update_id = $2 AND project_id = $1 ORDER BY event_stream, event_sequence LIMIT 1
        "#,
        project_id.as_bytes(),
        update_id.as_bytes(),
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| ParkedUpdate { since: row.parked_at.into(), reason: row.reason }))
}

/// How many events are parked, up to [`MAX_COUNTED`].
pub(crate) async fn count(pool: &Pool) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM (SELECT FROM webhooks.parked_events LIMIT $1) AS counted"#,
        MAX_COUNTED
    )
    .fetch_one(pool)
    .await?;
    Ok(count)
}

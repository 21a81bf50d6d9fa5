//! Operational events, from their record to their deliveries.

use std::time::Duration;

use contract::{ObjectId, Timestamp, event_kind::DeliveryKind, rpc::DeliveryId};
use service_kit::postgres::{Pool, Session};
use time::OffsetDateTime;

use super::{deliveries::parse_kind, error::StoreError, id};

/// How long the count of a callback without exhausted deliveries is kept.
const FORGET_AFTER: Duration = Duration::from_hours(24);

/// Something that happened to a callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OperationalEvent {
    pub(crate) event_id: ObjectId,
    pub(crate) callback_id: ObjectId,
    pub(crate) kind: DeliveryKind,
    pub(crate) at: Timestamp,
    pub(crate) reason: Option<String>,
    pub(crate) failing_since: Option<Timestamp>,
    /// How many deliveries were exhausted, and the last one of them.
    pub(crate) exhausted: Option<(i64, DeliveryId)>,
}

/// A delivery of an operational event, to be attempted by the retries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OperationalDelivery {
    pub(crate) event_id: ObjectId,
    pub(crate) kind: DeliveryKind,
    pub(crate) project_id: ObjectId,
    /// The process whose configuration contains the callback; none for the project's fallback callbacks.
    pub(crate) process_id: Option<ObjectId>,
    pub(crate) callback_id: ObjectId,
    pub(crate) body: String,
}

/// Records the event of callbacks that have had nothing but failures since before `since`, once per series of failures.
pub(crate) async fn record_failing(pool: &Pool, since: Timestamp, now: Timestamp) -> Result<(), StoreError> {
    sqlx::query!(
        r#"
        WITH failing AS (
            UPDATE webhooks.callback_failures SET failing_recorded = true
            WHERE NOT failing_recorded AND failing_since <= $1
            RETURNING callback_id, failing_since
        )
        INSERT INTO webhooks.operational_events (event_id, callback_id, kind, occurred_at, reason, failing_since)
        SELECT webhooks.new_id($2), f.callback_id, 'callback.failing', $2,
               (SELECT d.last_error FROM webhooks.deliveries AS d
                WHERE d.callback_id = f.callback_id AND d.status = 'pending' AND d.last_error IS NOT NULL
                ORDER BY d.next_attempt_at LIMIT 1),
               f.failing_since
        FROM failing AS f
        "#,
        OffsetDateTime::from(since),
        OffsetDateTime::from(now),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Takes the oldest recorded events, at most `limit`. Concurrent notifiers take different events.
pub(crate) async fn take_recorded(connection: &mut Session, limit: i64) -> Result<Vec<OperationalEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"
        DELETE FROM webhooks.operational_events
        WHERE event_id IN (SELECT event_id FROM webhooks.operational_events ORDER BY occurred_at LIMIT $1
                           FOR UPDATE SKIP LOCKED)
        RETURNING event_id AS "event_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]", kind, occurred_at, reason,
                  failing_since
        "#,
        limit,
    )
    .fetch_all(connection)
    .await?;
    let events = rows.into_iter().map(|row| {
        let event_id = id(row.event_id);
        Ok(OperationalEvent {
            event_id,
            callback_id: id(row.callback_id),
            kind: parse_kind(&row.kind, event_id)?,
            at: row.occurred_at.into(),
            reason: row.reason,
            failing_since: row.failing_since.map(Into::into),
            exhausted: None,
        })
    });
    events.collect()
}

/// Takes the exhausted deliveries of callbacks that may be reported now: one event per callback, at most `limit`. The
/// next one of such a callback is due at `next`.
pub(crate) async fn take_exhausted(
    connection: &mut Session,
    now: Timestamp,
    next: Timestamp,
    limit: i64,
) -> Result<Vec<OperationalEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"
        WITH due AS MATERIALIZED (
            SELECT * FROM webhooks.exhausted_deliveries WHERE due_at <= $1 AND deliveries > 0 ORDER BY due_at LIMIT $3
            FOR UPDATE SKIP LOCKED
        ), reset AS (
            UPDATE webhooks.exhausted_deliveries AS e SET deliveries = 0, due_at = $2
            FROM due WHERE e.callback_id = due.callback_id
        ), forgotten AS (
            DELETE FROM webhooks.exhausted_deliveries WHERE due_at <= $4 AND deliveries = 0
        )
        SELECT webhooks.new_id($1) AS "event_id!: [u8; 12]", callback_id AS "callback_id!: [u8; 12]", deliveries AS "deliveries!",
               last_update_id AS "last_update_id!: [u8; 12]", last_kind AS "last_kind!", last_error
        FROM due
        "#,
        OffsetDateTime::from(now),
        OffsetDateTime::from(next),
        limit,
        OffsetDateTime::from(now.minus(FORGET_AFTER)),
    )
    .fetch_all(connection)
    .await?;
    let events = rows.into_iter().map(|row| {
        let (callback_id, update_id) = (id(row.callback_id), id(row.last_update_id));
        let last = DeliveryId { update_id, callback_id, kind: parse_kind(&row.last_kind, update_id)? };
        Ok(OperationalEvent {
            event_id: id(row.event_id),
            callback_id,
            kind: DeliveryKind::DeliveryExhausted,
            at: now,
            reason: row.last_error,
            failing_since: None,
            exhausted: Some((row.deliveries, last)),
        })
    });
    events.collect()
}

/// Records deliveries as due now.
pub(crate) async fn insert_deliveries(
    connection: &mut Session,
    deliveries: &[OperationalDelivery],
    now: Timestamp,
) -> Result<(), StoreError> {
    let event_ids = deliveries.iter().map(|d| *d.event_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = deliveries.iter().map(|d| *d.callback_id.as_bytes()).collect::<Vec<_>>();
    let kinds = deliveries.iter().map(|d| d.kind.as_str()).collect::<Vec<_>>();
    let project_ids = deliveries.iter().map(|d| *d.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = deliveries.iter().map(|d| d.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    let bodies = deliveries.iter().map(|d| d.body.as_str()).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        INSERT INTO webhooks.deliveries
            (update_id, callback_id, kind, project_id, process_id, payload, status, attempts, next_attempt_at, created_at,
             updated_at)
        SELECT event_id, callback_id, kind, project_id, process_id, body, 'pending', 0, $7, $7, $7
        FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::bytea[], $5::bytea[], $6::text[])
            AS r (event_id, callback_id, kind, project_id, process_id, body)
        ON CONFLICT (update_id, callback_id, kind) DO NOTHING
        "#,
        &event_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &kinds as &[&str],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
        &bodies as &[&str],
        OffsetDateTime::from(now),
    )
    .execute(connection)
    .await?;
    Ok(())
}

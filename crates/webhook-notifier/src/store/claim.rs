//! Finds due deliveries and claims them with a lease.

use std::sync::Arc;

use contract::{ObjectId, Timestamp};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{
    deliveries::{kind_names, parse_kind},
    error::StoreError,
    id,
};
use crate::core::delivery::{LeadOrder, PendingDelivery};

/// A callback with due deliveries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DueCallback {
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: Option<ObjectId>,
}

/// The callbacks with due deliveries, the longest due first.
///
/// Skips from callback to callback through the index, so a million due deliveries of one callback cost as much as one.
pub(crate) async fn due_callbacks(pool: &Pool, now: Timestamp) -> Result<Vec<DueCallback>, StoreError> {
    let rows = sqlx::query!(
        r#"
        WITH RECURSIVE waiting AS (
            (SELECT callback_id FROM webhooks.deliveries WHERE status = 'pending' ORDER BY callback_id LIMIT 1)
            UNION ALL
            SELECT (SELECT d.callback_id FROM webhooks.deliveries d
                    WHERE d.status = 'pending' AND d.callback_id > waiting.callback_id
                    ORDER BY d.callback_id LIMIT 1)
            FROM waiting
            WHERE waiting.callback_id IS NOT NULL
        )
        SELECT waiting.callback_id AS "callback_id!: [u8; 12]",
               oldest.project_id AS "project_id: [u8; 12]", oldest.process_id AS "process_id: [u8; 12]"
        FROM waiting
        CROSS JOIN LATERAL (
            SELECT d.project_id, d.process_id, d.next_attempt_at
            FROM webhooks.deliveries d
            WHERE d.status = 'pending' AND d.callback_id = waiting.callback_id AND d.next_attempt_at <= $1
            ORDER BY d.next_attempt_at
            LIMIT 1
        ) AS oldest
        ORDER BY oldest.next_attempt_at
        "#,
        OffsetDateTime::from(now),
    )
    .fetch_all(pool)
    .await?;
    let due = rows.into_iter().map(|row| DueCallback {
        callback_id: id(row.callback_id),
        project_id: id(row.project_id),
        process_id: row.process_id.map(id),
    });
    Ok(due.collect())
}

/// How many of a callback's due deliveries to claim.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClaimRequest {
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) max_deliveries: usize,
    /// Of all bodies together; the last one may exceed it.
    pub(crate) max_bytes: usize,
    /// Of all bodies of the project together; the same in each of its requests.
    pub(crate) max_project_bytes: usize,
}

/// A delivery that no other notifier claims until its lease ends.
#[derive(Debug)]
pub(crate) struct ClaimedDelivery {
    pub(crate) delivery: PendingDelivery,
    /// Earlier attempts that count in its schedule.
    pub(crate) attempts: u32,
    pub(crate) lease_until: Timestamp,
}

/// A row that [`claim`] returns.
struct ClaimedRow {
    update_id: [u8; 12],
    callback_id: [u8; 12],
    kind: String,
    project_id: [u8; 12],
    process_id: Option<[u8; 12]>,
    attempts: i32,
    traceparent: Option<String>,
    payload: String,
    lead_id: Option<[u8; 12]>,
    order_key: Option<Vec<u8>>,
    event_stream: Option<String>,
    event_sequence: Option<i64>,
    /// How many rows with a body all requests found, whether the bodies fit or not.
    found_count: i64,
}

impl ClaimedRow {
    fn delivery(self, lease_until: Timestamp) -> Result<ClaimedDelivery, StoreError> {
        let update_id = id(self.update_id);
        let order = self.lead_id.map(|lead_id| LeadOrder {
            lead_id: id(lead_id),
            key: self.order_key.unwrap_or_default(),
            event_stream: self.event_stream.unwrap_or_default().into(),
            event_sequence: self.event_sequence.unwrap_or_default().cast_unsigned(),
        });
        let delivery = PendingDelivery {
            update_id,
            callback_id: id(self.callback_id),
            kind: parse_kind(&self.kind, update_id)?,
            project_id: id(self.project_id),
            process_id: self.process_id.map(id),
            body: self.payload.into(),
            traceparent: self.traceparent.map(Into::into),
            order: order.map(Arc::new),
        };
        Ok(ClaimedDelivery { delivery, attempts: self.attempts.unsigned_abs(), lease_until })
    }
}

/// What a round claimed.
#[derive(Debug)]
pub(crate) struct Claims {
    pub(crate) deliveries: Vec<ClaimedDelivery>,
    /// Whether requests found more deliveries than fit into their bytes.
    pub(crate) left_some: bool,
}

/// Claims due deliveries, the longest due of each callback first. Concurrent claims get different deliveries.
///
/// The order of the requests is the order in which the callbacks of a project use its bytes. The very first delivery is
/// claimed in any case: it may be larger than any project's bytes.
pub(crate) async fn claim(
    pool: &Pool,
    requests: &[ClaimRequest],
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<Claims, StoreError> {
    let callback_ids = requests.iter().map(|request| *request.callback_id.as_bytes()).collect::<Vec<_>>();
    let project_ids = requests.iter().map(|request| *request.project_id.as_bytes()).collect::<Vec<_>>();
    let deliveries = requests.iter().map(|request| request.max_deliveries as i64).collect::<Vec<_>>();
    let bytes = requests.iter().map(|request| request.max_bytes as i64).collect::<Vec<_>>();
    let project_bytes = requests.iter().map(|request| request.max_project_bytes as i64).collect::<Vec<_>>();
    let rows = sqlx::query_as!(
        ClaimedRow,
        r#"
        WITH found AS (
            SELECT locked.*, request.*,
                   sum(locked.length) OVER (
                       PARTITION BY request.place ORDER BY locked.next_attempt_at, locked.update_id, locked.kind
                   ) - locked.length AS bytes_before,
                   -- A row without a body can never be claimed.
                   count(locked.length) OVER () AS found_count
            FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::bigint[], $5::bigint[]) WITH ORDINALITY
                     AS request (callback_id, project_id, max_deliveries, max_bytes, max_project_bytes, place)
            CROSS JOIN LATERAL (
                SELECT d.update_id, d.kind, d.next_attempt_at,
                       coalesce(octet_length(d.payload), (SELECT octet_length(p.payload) FROM webhooks.payloads AS p
                                                          WHERE p.update_id = d.update_id AND p.kind = d.kind
                                                              AND p.project_id = d.project_id)) AS length
                FROM webhooks.deliveries AS d
                WHERE d.status = 'pending' AND d.callback_id = request.callback_id AND d.next_attempt_at <= $6
                    AND d.kind = ANY($8)
                ORDER BY d.next_attempt_at
                LIMIT request.max_deliveries
                FOR UPDATE SKIP LOCKED
            ) AS locked
        ), fitting AS (
            SELECT found.*,
                   sum(found.length) OVER (
                       PARTITION BY found.project_id
                       ORDER BY found.place, found.next_attempt_at, found.update_id, found.kind
                   ) AS project_bytes,
                   row_number() OVER (ORDER BY found.place, found.next_attempt_at, found.update_id, found.kind) AS number
            FROM found
            WHERE found.bytes_before < found.max_bytes
        ), due AS MATERIALIZED (
            SELECT fitting.update_id, fitting.callback_id, fitting.kind, fitting.found_count
            FROM fitting
            WHERE fitting.project_bytes <= fitting.max_project_bytes OR fitting.number = 1
        )
        UPDATE webhooks.deliveries AS d SET next_attempt_at = $7
        FROM due
        WHERE d.update_id = due.update_id AND d.callback_id = due.callback_id AND d.kind = due.kind
        RETURNING d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]", d.kind,
                  d.project_id AS "project_id: [u8; 12]", d.process_id AS "process_id: [u8; 12]",
                  d.attempts - coalesce(d.schedule_offset, 0) AS "attempts!", d.traceparent,
                  coalesce(d.payload, (SELECT p.payload FROM webhooks.payloads AS p
                                       WHERE p.update_id = d.update_id AND p.kind = d.kind
                                           AND p.project_id = d.project_id)) AS "payload!",
                  d.lead_id AS "lead_id: [u8; 12]", d.order_key, d.event_stream, d.event_sequence,
                  due.found_count AS "found_count!"
        "#,
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &deliveries,
        &bytes,
        &project_bytes,
        OffsetDateTime::from(now),
        OffsetDateTime::from(lease_until),
        // Kinds of a later version are left to its notifiers.
        &kind_names() as &[&str],
    )
    .fetch_all(pool)
    .await?;
    let left_some = rows.first().is_some_and(|row| row.found_count > rows.len() as i64);
    let deliveries = rows.into_iter().map(|row| row.delivery(lease_until)).collect::<Result<_, _>>()?;
    Ok(Claims { deliveries, left_some })
}

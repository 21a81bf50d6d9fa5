//! 8 Retry: finding what is due, and claiming it with a lease.

use std::sync::Arc;

use contract::{ObjectId, Timestamp};
use sqlx::PgPool;
use time::OffsetDateTime;

use super::id;
use crate::core::delivery::{Delivery, Order};

/// A callback that has something due.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Due {
    pub(crate) callback_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: Option<ObjectId>,
}

/// The callbacks that have something due, the longest due first.
///
/// Skips from callback to callback through the index, so a million due deliveries of one cost no more than one.
pub(crate) async fn due_callbacks(pool: &PgPool, now: Timestamp) -> sqlx::Result<Vec<Due>> {
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
    let due = rows.into_iter().map(|row| Due {
        callback_id: id(row.callback_id),
        project_id: id(row.project_id),
        process_id: row.process_id.map(id),
    });
    Ok(due.collect())
}

/// How much of a callback's due deliveries to claim.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) callback_id: ObjectId,
    pub(crate) deliveries: usize,
    /// Bytes of bodies in all; the last one may go beyond.
    pub(crate) bytes: usize,
}

/// A delivery that is ours until its lease runs out.
#[derive(Debug)]
pub(crate) struct Claimed {
    pub(crate) delivery: Delivery,
    /// How often it was tried before on this schedule.
    pub(crate) attempts: u32,
}

/// Claims due deliveries, of each callback the longest due first. Whoever claims at the same time gets others.
pub(crate) async fn claim(
    pool: &PgPool,
    wanted: &[Wanted],
    now: Timestamp,
    lease_until: Timestamp,
) -> sqlx::Result<Vec<Claimed>> {
    let callback_ids = wanted.iter().map(|wanted| *wanted.callback_id.as_bytes()).collect::<Vec<_>>();
    let deliveries = wanted.iter().map(|wanted| wanted.deliveries as i64).collect::<Vec<_>>();
    let bytes = wanted.iter().map(|wanted| wanted.bytes as i64).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        WITH due AS MATERIALIZED (
            SELECT fitting.update_id, fitting.callback_id
            FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS wanted (callback_id, deliveries, bytes)
            CROSS JOIN LATERAL (
                SELECT locked.update_id, locked.callback_id,
                       sum(locked.length) OVER (ORDER BY locked.next_attempt_at, locked.update_id) - locked.length AS before
                FROM (
                    SELECT d.update_id, d.callback_id, d.next_attempt_at, octet_length(d.payload) AS length
                    FROM webhooks.deliveries AS d
                    WHERE d.status = 'pending' AND d.callback_id = wanted.callback_id AND d.next_attempt_at <= $4
                    ORDER BY d.next_attempt_at
                    LIMIT wanted.deliveries
                    FOR UPDATE SKIP LOCKED
                ) AS locked
            ) AS fitting
            WHERE fitting.before < wanted.bytes
        )
        UPDATE webhooks.deliveries AS d SET next_attempt_at = $5
        FROM due
        WHERE d.update_id = due.update_id AND d.callback_id = due.callback_id
        RETURNING d.update_id AS "update_id: [u8; 12]", d.callback_id AS "callback_id: [u8; 12]",
                  d.project_id AS "project_id: [u8; 12]", d.process_id AS "process_id: [u8; 12]",
                  d.attempts - coalesce(d.schedule_from, 0) AS "attempts!", d.traceparent, d.payload AS "payload!",
                  d.lead_id AS "lead_id: [u8; 12]", d.place, d.event_stream, d.event_seq
        "#,
        &callback_ids as &[[u8; 12]],
        &deliveries,
        &bytes,
        OffsetDateTime::from(now),
        OffsetDateTime::from(lease_until),
    )
    .fetch_all(pool)
    .await?;
    let claimed = rows.into_iter().map(|row| Claimed {
        delivery: Delivery {
            update_id: id(row.update_id),
            callback_id: id(row.callback_id),
            project_id: id(row.project_id),
            process_id: row.process_id.map(id),
            body: row.payload.into(),
            traceparent: row.traceparent.map(Into::into),
            order: row.lead_id.map(|lead_id| {
                Arc::new(Order {
                    lead_id: id(lead_id),
                    place: row.place.unwrap_or_default(),
                    stream: row.event_stream.unwrap_or_default().into(),
                    sequence: row.event_seq.unwrap_or_default().cast_unsigned(),
                })
            }),
        },
        attempts: row.attempts.unsigned_abs(),
    });
    Ok(claimed.collect())
}

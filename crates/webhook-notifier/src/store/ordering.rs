//! Makes ordered deliveries due.

use contract::{ObjectId, Timestamp};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{error::StoreError, id};
use crate::core::ordering::{LeadHead, LeadKey, RecordedWatermark, VisitedLead};

/// Makes the oldest pending delivery of each of these leads due, if it has no due time yet, all earlier events are
/// recorded, and no earlier event of the lead is parked.
pub(crate) async fn make_heads_due(
    pool: &Pool,
    leads: &[LeadKey],
    watermark: &RecordedWatermark,
    now: Timestamp,
) -> Result<Vec<LeadHead>, StoreError> {
    let callback_ids = leads.iter().map(|lead| *lead.callback_id.as_bytes()).collect::<Vec<_>>();
    let lead_ids = leads.iter().map(|lead| *lead.lead_id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        WITH head AS MATERIALIZED (
            SELECT oldest.*
            FROM unnest($1::bytea[], $2::bytea[]) AS lead (callback_id, lead_id)
            CROSS JOIN LATERAL (
                SELECT d.update_id, d.callback_id, d.kind, d.lead_id, d.next_attempt_at, d.event_stream, d.event_sequence,
                       d.order_key
                FROM webhooks.deliveries d
                WHERE d.callback_id = lead.callback_id AND d.lead_id = lead.lead_id AND d.status = 'pending'
                    AND d.lead_id IS NOT NULL
                ORDER BY d.order_key LIMIT 1
            ) AS oldest
            WHERE oldest.next_attempt_at IS NULL
        ), made_due AS (
            UPDATE webhooks.deliveries AS d SET next_attempt_at = $3
            FROM head
            WHERE d.update_id = head.update_id AND d.callback_id = head.callback_id AND d.kind = head.kind
                AND (head.event_stream <> $4 OR head.event_sequence <= $5)
                AND NOT EXISTS (SELECT FROM webhooks.parked_events p
                                WHERE p.lead_id = head.lead_id AND p.order_key < head.order_key)
                AND d.status = 'pending' AND d.next_attempt_at IS NULL
            RETURNING d.callback_id, d.lead_id
        )
        SELECT head.callback_id AS "callback_id!: [u8; 12]", head.lead_id AS "lead_id!: [u8; 12]",
               EXISTS (SELECT FROM made_due WHERE made_due.callback_id = head.callback_id
                                              AND made_due.lead_id = head.lead_id) AS "is_due!"
        FROM head
        "#,
        &callback_ids as &[[u8; 12]],
        &lead_ids as &[[u8; 12]],
        OffsetDateTime::from(now),
        &*watermark.stream,
        watermark.sequence.cast_signed(),
    )
    .fetch_all(pool)
    .await?;
    let heads = rows.into_iter().map(|row| LeadHead {
        lead: LeadKey { callback_id: id(row.callback_id), lead_id: id(row.lead_id) },
        is_due: row.is_due,
    });
    Ok(heads.collect())
}

/// Greater than every id of a lead.
const BEYOND_LEADS: [u8; 13] = [0xff; 13];

/// Visits up to `limit` leads with pending ordered deliveries, those after `after`. However many leads have pending
/// deliveries, a statement reads at most `limit` of them.
pub(crate) async fn visit_leads(
    pool: &Pool,
    after: Option<LeadKey>,
    held: &[ObjectId],
    limit: i64,
) -> Result<Vec<VisitedLead>, StoreError> {
    let after = after.map(|lead| (lead.callback_id, lead.lead_id));
    let held = held.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    // Skips from lead to lead through the index, however many deliveries a lead has; and past all leads of a held
    // callback. Postgres evaluates a recursive query only as far as its rows are read.
    let rows = sqlx::query!(
        r#"
        WITH RECURSIVE oldest AS (
            (SELECT d.callback_id, d.lead_id, d.next_attempt_at FROM webhooks.deliveries d
             WHERE d.status = 'pending' AND d.lead_id IS NOT NULL AND (d.callback_id, d.lead_id) > ($1, $2)
             ORDER BY d.callback_id, d.lead_id, d.order_key LIMIT 1)
            UNION ALL
            SELECT next.* FROM oldest
            CROSS JOIN LATERAL (
                SELECT d.callback_id, d.lead_id, d.next_attempt_at FROM webhooks.deliveries d
                WHERE d.status = 'pending' AND d.lead_id IS NOT NULL
                    AND (d.callback_id, d.lead_id) >
                        (oldest.callback_id, CASE WHEN oldest.callback_id = ANY($4) THEN $5 ELSE oldest.lead_id END)
                ORDER BY d.callback_id, d.lead_id, d.order_key LIMIT 1
            ) AS next
        )
        SELECT callback_id AS "callback_id!: [u8; 12]", lead_id AS "lead_id!: [u8; 12]",
               next_attempt_at IS NULL AND callback_id <> ALL($4) AS "is_waiting!"
        FROM oldest LIMIT $3
        "#,
        after.as_ref().map_or(&[][..], |(callback_id, _)| callback_id.as_bytes()),
        after.as_ref().map_or(&[][..], |(_, lead_id)| lead_id.as_bytes()),
        limit,
        &held as &[[u8; 12]],
        &BEYOND_LEADS[..],
    )
    .fetch_all(pool)
    .await?;
    let leads = rows.into_iter().map(|row| VisitedLead {
        lead: LeadKey { callback_id: id(row.callback_id), lead_id: id(row.lead_id) },
        is_waiting: row.is_waiting,
    });
    Ok(leads.collect())
}

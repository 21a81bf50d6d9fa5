//! 8 Retry: whose turn it is, of deliveries that wait for the one before.

use contract::Timestamp;
use sqlx::PgPool;
use time::OffsetDateTime;

use super::id;
use crate::dispatch::ordering::{Floor, Lead};

/// What a lead's oldest delivery that waits came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) lead: Lead,
    /// Whether it is due now; else something before it may not be recorded yet.
    pub(crate) begun: bool,
}

/// Makes the oldest pending delivery of each of these leads due, where it waits and nothing before it can still come.
pub(crate) async fn give(pool: &PgPool, leads: &[Lead], floor: &Floor, now: Timestamp) -> sqlx::Result<Vec<Turn>> {
    let callback_ids = leads.iter().map(|lead| *lead.callback_id.as_bytes()).collect::<Vec<_>>();
    let lead_ids = leads.iter().map(|lead| *lead.lead_id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        WITH waiting AS MATERIALIZED (
            SELECT oldest.*
            FROM unnest($1::bytea[], $2::bytea[]) AS n (callback_id, lead_id)
            CROSS JOIN LATERAL (
                SELECT d.update_id, d.callback_id, d.lead_id, d.next_attempt_at, d.event_stream, d.event_seq
                FROM webhooks.deliveries d
                WHERE d.callback_id = n.callback_id AND d.lead_id = n.lead_id AND d.status = 'pending'
                    AND d.lead_id IS NOT NULL
                ORDER BY d.place LIMIT 1
            ) AS oldest
            WHERE oldest.next_attempt_at IS NULL
        ), begun AS (
            UPDATE webhooks.deliveries AS d SET next_attempt_at = $3
            FROM waiting
            WHERE d.update_id = waiting.update_id AND d.callback_id = waiting.callback_id
                AND (waiting.event_stream <> $4 OR waiting.event_seq <= $5)
                AND d.status = 'pending' AND d.next_attempt_at IS NULL
            RETURNING d.callback_id, d.lead_id
        )
        SELECT waiting.callback_id AS "callback_id!: [u8; 12]", waiting.lead_id AS "lead_id!: [u8; 12]",
               EXISTS (SELECT FROM begun WHERE begun.callback_id = waiting.callback_id
                                           AND begun.lead_id = waiting.lead_id) AS "begun!"
        FROM waiting
        "#,
        &callback_ids as &[[u8; 12]],
        &lead_ids as &[[u8; 12]],
        OffsetDateTime::from(now),
        &*floor.stream,
        floor.reached.cast_signed(),
    )
    .fetch_all(pool)
    .await?;
    let turns = rows.into_iter().map(|row| Turn {
        lead: Lead { callback_id: id(row.callback_id), lead_id: id(row.lead_id) },
        begun: row.begun,
    });
    Ok(turns.collect())
}

/// Leads whose oldest pending delivery waits, behind this one: the next so many.
pub(crate) async fn waiting(pool: &PgPool, after: Option<Lead>, limit: i64) -> sqlx::Result<Vec<Lead>> {
    let after = after.map(|lead| (lead.callback_id, lead.lead_id));
    // Skips from lead to lead through the index, however many wait behind the oldest.
    let rows = sqlx::query!(
        r#"
        WITH RECURSIVE oldest AS (
            (SELECT d.callback_id, d.lead_id, d.next_attempt_at FROM webhooks.deliveries d
             WHERE d.status = 'pending' AND d.lead_id IS NOT NULL AND (d.callback_id, d.lead_id) > ($1, $2)
             ORDER BY d.callback_id, d.lead_id, d.place LIMIT 1)
            UNION ALL
            SELECT next.* FROM oldest
            CROSS JOIN LATERAL (
                SELECT d.callback_id, d.lead_id, d.next_attempt_at FROM webhooks.deliveries d
                WHERE d.status = 'pending' AND d.lead_id IS NOT NULL
                    AND (d.callback_id, d.lead_id) > (oldest.callback_id, oldest.lead_id)
                ORDER BY d.callback_id, d.lead_id, d.place LIMIT 1
            ) AS next
        )
        SELECT callback_id AS "callback_id!: [u8; 12]", lead_id AS "lead_id!: [u8; 12]"
        FROM oldest WHERE next_attempt_at IS NULL LIMIT $3
        "#,
        after.as_ref().map_or(&[][..], |(callback_id, _)| callback_id.as_bytes()),
        after.as_ref().map_or(&[][..], |(_, lead_id)| lead_id.as_bytes()),
        limit,
    )
    .fetch_all(pool)
    .await?;
    let leads = rows.into_iter().map(|row| Lead { callback_id: id(row.callback_id), lead_id: id(row.lead_id) });
    Ok(leads.collect())
}

//! Pending erasures of leads, and the content that they erase.

use contract::{ObjectId, Timestamp, event::ERASED};
use service_kit::postgres::{Pool, Session};
use time::{Date, OffsetDateTime};

use super::{error::StoreError, id, parked::EventKey};

/// A lead whose deliveries still have content.
#[derive(Debug, Clone)]
pub(crate) struct PendingErasure {
    pub(crate) lead_id: ObjectId,
    pub(crate) project_id: ObjectId,
    pub(crate) update_id: ObjectId,
    pub(crate) event: EventKey,
}

/// Makes an erasure pending. A later one of the same lead erases all that this one does.
pub(crate) async fn insert(pool: &Pool, erasure: &PendingErasure, due: Timestamp) -> Result<(), StoreError> {
    sqlx::query!(
        r#"
        INSERT INTO webhooks.pending_erasures (lead_id, project_id, update_id, event_stream, event_sequence, due_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (lead_id) DO UPDATE SET
            update_id = excluded.update_id, event_stream = excluded.event_stream,
            event_sequence = excluded.event_sequence, due_at = excluded.due_at
        "#,
        erasure.lead_id.as_bytes(),
        erasure.project_id.as_bytes(),
        erasure.update_id.as_bytes(),
        erasure.event.stream,
        erasure.event.sequence.cast_signed(),
        OffsetDateTime::from(due),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Claims the due erasure that waits the longest. Concurrent claims get different erasures.
pub(crate) async fn claim(
    pool: &Pool,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<Option<PendingErasure>, StoreError> {
    let row = sqlx::query!(
        r#"
        UPDATE webhooks.pending_erasures AS e SET due_at = $2
        FROM (
            SELECT lead_id FROM webhooks.pending_erasures WHERE due_at <= $1
            ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
        ) AS claimed
        WHERE e.lead_id = claimed.lead_id
        RETURNING e.lead_id AS "lead_id: [u8; 12]", e.project_id AS "project_id: [u8; 12]",
                  e.update_id AS "update_id: [u8; 12]", e.event_stream, e.event_sequence
        "#,
        OffsetDateTime::from(now),
        OffsetDateTime::from(lease_until),
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| PendingErasure {
        lead_id: id(row.lead_id),
        project_id: id(row.project_id),
        update_id: id(row.update_id),
        event: EventKey { stream: row.event_stream, sequence: row.event_sequence.cast_unsigned() },
    }))
}

/// Makes an erasure due again at `until`.
pub(crate) async fn postpone(pool: &Pool, erasure: &PendingErasure, until: Timestamp) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE webhooks.pending_erasures SET due_at = $3 WHERE lead_id = $1 AND update_id = $2",
        erasure.lead_id.as_bytes(),
        erasure.update_id.as_bytes(),
        OffsetDateTime::from(until),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Ends an erasure, unless the lead was erased again meanwhile.
pub(crate) async fn finish(pool: &Pool, erasure: &PendingErasure) -> Result<(), StoreError> {
    sqlx::query!(
        "DELETE FROM webhooks.pending_erasures WHERE lead_id = $1 AND update_id = $2",
        erasure.lead_id.as_bytes(),
        erasure.update_id.as_bytes(),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Erases the bodies and responses of the deliveries of a project's updates. Pending deliveries have nothing left to
/// send: they become exhausted, and are counted. Returns whether nothing is left: a delivery that is requeued meanwhile
/// keeps its body until the next call.
pub(crate) async fn erase_deliveries(
    pool: &Pool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
    now: Timestamp,
) -> Result<bool, StoreError> {
    let id_months = update_ids.iter().map(ObjectId::month).collect::<Vec<Date>>();
    let update_ids = update_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let mut transaction = pool.begin().await?;
    sqlx::query!(
        r#"
        WITH updates AS (
            SELECT * FROM unnest($2::bytea[], $5::date[]) AS u (update_id, id_month)
        ), erased AS (
            UPDATE webhooks.deliveries AS d SET
                status = CASE WHEN status = 'pending' THEN 'exhausted' ELSE status END,
                last_error = CASE WHEN status <> 'delivered' THEN $3 ELSE last_error END,
                updated_at = CASE WHEN status = 'pending' THEN $4::timestamptz ELSE updated_at END,
                exhausted_at = CASE WHEN status = 'pending' THEN exhausted_at || $4::timestamptz ELSE exhausted_at END,
                next_attempt_at = NULL, payload = NULL
            FROM updates AS u
            WHERE d.project_id = $1 AND d.update_id = u.update_id
                AND (payload IS NOT NULL OR status = 'pending' OR status = 'exhausted' AND last_error IS DISTINCT FROM $3)
            RETURNING d.project_id, d.callback_id, d.kind, d.process_id, d.exhausted_at, u.id_month
        )
        INSERT INTO webhooks.delivery_counts AS c
            (project_id, minute, callback_id, kind, id_month, writer, process_id,
             delivered_100ms, delivered_1s, delivered_10s, delivered_longer, failed, exhausted)
        SELECT project_id, date_trunc('minute', $4::timestamptz), callback_id, kind, id_month, pg_backend_pid(), coalesce(process_id, ''),
               0, 0, 0, 0, 0, count(*)
        FROM erased
        WHERE exhausted_at[cardinality(exhausted_at)] = $4::timestamptz
        GROUP BY 1, 2, 3, 4, 5, 6, 7
        ON CONFLICT (project_id, minute, callback_id, kind, id_month, writer) DO UPDATE SET
            exhausted = c.exhausted + excluded.exhausted
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
        ERASED,
        OffsetDateTime::from(now),
        &id_months as &[Date],
    )
    .execute(&mut *transaction)
    .await?;
    erase_responses(&mut transaction, project_id, &update_ids).await?;
    let is_complete = erase_bodies(&mut transaction, project_id, &update_ids).await?;
    transaction.commit().await?;
    Ok(is_complete)
}

/// Updates of other projects may have the same ids.
async fn erase_responses(
    connection: &mut Session,
    project_id: ObjectId,
    update_ids: &[[u8; 12]],
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"
        UPDATE webhooks.attempts AS a SET response = NULL
        WHERE a.update_id = ANY($2) AND a.response IS NOT NULL
            AND EXISTS (SELECT FROM webhooks.deliveries AS d
                        WHERE d.update_id = a.update_id AND d.callback_id = a.callback_id AND d.kind = a.kind
                            AND d.project_id = $1)
        "#,
        project_id.as_bytes(),
        update_ids as &[[u8; 12]],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Erases the long bodies, except those of deliveries that were requeued after this transaction exhausted the pending
/// ones. Without its body, such a delivery could never be claimed. Returns whether no delivery is pending.
async fn erase_bodies(
    connection: &mut Session,
    project_id: ObjectId,
    update_ids: &[[u8; 12]],
) -> Result<bool, StoreError> {
    // A statement of its own, so that the next one sees the deliveries of transactions that held the locks before.
    sqlx::query!(
        r#"
        SELECT FROM webhooks.payloads WHERE update_id = ANY($2) AND project_id = $1
        ORDER BY update_id, project_id, kind FOR UPDATE
        "#,
        project_id.as_bytes(),
        update_ids as &[[u8; 12]],
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        r#"
        DELETE FROM webhooks.payloads AS p
        WHERE p.update_id = ANY($2) AND p.project_id = $1
            AND NOT EXISTS (SELECT FROM webhooks.deliveries AS d
                            WHERE d.update_id = p.update_id AND d.kind = p.kind AND d.project_id = p.project_id
                                AND d.status = 'pending')
        "#,
        project_id.as_bytes(),
        update_ids as &[[u8; 12]],
    )
    .execute(&mut *connection)
    .await?;
    let is_complete = sqlx::query_scalar!(
        r#"
        SELECT NOT EXISTS (SELECT FROM webhooks.deliveries
                           WHERE update_id = ANY($2) AND project_id = $1 AND status = 'pending') AS "is_complete!"
        "#,
        project_id.as_bytes(),
        update_ids as &[[u8; 12]],
    )
    .fetch_one(connection)
    .await?;
    Ok(is_complete)
}

/// The parked events of a project's updates that no notifier has claimed, and whether others are claimed.
pub(crate) async fn parked(
    pool: &Pool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
    now: Timestamp,
) -> Result<(Vec<(EventKey, String)>, bool), StoreError> {
    let update_ids = update_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        SELECT event_stream, event_sequence, payload, coalesce(claimed_until >= $3, false) AS "is_claimed!"
        FROM webhooks.parked_events WHERE project_id = $1 AND update_id = ANY($2)
        "#,
        project_id.as_bytes(),
        &update_ids as &[[u8; 12]],
        OffsetDateTime::from(now),
    )
    .fetch_all(pool)
    .await?;
    let any_claimed = rows.iter().any(|row| row.is_claimed);
    let free = rows
        .into_iter()
        .filter(|row| !row.is_claimed)
        .map(|row| (EventKey { stream: row.event_stream, sequence: row.event_sequence.cast_unsigned() }, row.payload));
    Ok((free.collect(), any_claimed))
}

/// Replaces a parked event, unless a notifier has claimed it. Returns whether it was replaced.
pub(crate) async fn replace_parked(
    pool: &Pool,
    event: &EventKey,
    payload: &str,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let replaced = sqlx::query!(
        r#"
        UPDATE webhooks.parked_events SET payload = $3
        WHERE event_stream = $1 AND event_sequence = $2 AND (claimed_until IS NULL OR claimed_until < $4)
        "#,
        event.stream,
        event.sequence.cast_signed(),
        payload,
        OffsetDateTime::from(now),
    )
    .execute(pool)
    .await?;
    Ok(replaced.rows_affected() == 1)
}

//! The outbox of events about deliveries and callbacks.

use contract::{
    ObjectId, Timestamp,
    event::{ERASED, WebhookEvent},
    event_kind::DeliveryKind,
    rpc::DeliveryId,
};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{
    deliveries::{kind_names, parse_kind},
    error::StoreError,
    id,
};

/// The exhausted deliveries that are not announced.
pub(crate) async fn exhausted(pool: &Pool, limit: i64) -> Result<Vec<WebhookEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT update_id AS "update_id: [u8; 12]", callback_id AS "callback_id: [u8; 12]",
               project_id AS "project_id: [u8; 12]", process_id AS "process_id: [u8; 12]",
               kind, attempts, last_error, updated_at
        FROM webhooks.deliveries
        WHERE status = 'exhausted' AND NOT exhausted_announced AND kind = ANY($2)
        ORDER BY update_id, callback_id
        LIMIT $1
        "#,
        limit,
        // Kinds of a later version are left to its notifiers.
        &kind_names() as &[&str],
    )
    .fetch_all(pool)
    .await?;
    let events = rows.into_iter().map(|row| {
        let update_id = id(row.update_id);
        Ok(WebhookEvent::Exhausted {
            update_id,
            project_id: id(row.project_id),
            process_id: row.process_id.map(id),
            callback_id: id(row.callback_id),
            kind: parse_kind(&row.kind, update_id)?,
            attempts: row.attempts.unsigned_abs(),
            error: row.last_error.unwrap_or_default(),
            timestamp: row.updated_at.into(),
        })
    });
    events.collect()
}

/// An exhaustion that was announced. The same delivery may be exhausted again after it is requeued.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnnouncedExhaustion {
    pub(crate) id: DeliveryId,
    pub(crate) attempts: u32,
    pub(crate) exhausted_at: Timestamp,
}

/// Marks deliveries as announced if they have not been exhausted again since, and counts them for the event
/// `delivery.exhausted`: but no deliveries of operational events, and none that an erasure ended. A delivery that was
/// requeued since is not marked, so that its next exhaustion is announced, too.
pub(crate) async fn mark_exhausted_announced(
    pool: &Pool,
    deliveries: &[AnnouncedExhaustion],
    now: Timestamp,
) -> Result<(), StoreError> {
    if deliveries.is_empty() {
        return Ok(());
    }
    let operational = DeliveryKind::ALL.iter().filter(|kind| kind.is_operational()).map(|kind| kind.as_str());
    let update_ids = deliveries.iter().map(|announced| *announced.id.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = deliveries.iter().map(|announced| *announced.id.callback_id.as_bytes()).collect::<Vec<_>>();
    let kinds = deliveries.iter().map(|announced| announced.id.kind.as_str()).collect::<Vec<_>>();
    let attempts = deliveries.iter().map(|announced| announced.attempts.cast_signed()).collect::<Vec<_>>();
    let exhausted_at = deliveries.iter().map(|announced| announced.exhausted_at.into());
    let exhausted_at = exhausted_at.collect::<Vec<OffsetDateTime>>();
    sqlx::query!(
        r#"
        WITH marked AS (
            UPDATE webhooks.deliveries AS d SET exhausted_announced = true
            FROM unnest($1::bytea[], $2::bytea[], $3::text[], $7::integer[], $8::timestamptz[])
                AS announced (update_id, callback_id, kind, attempts, exhausted_at)
            WHERE d.update_id = announced.update_id AND d.callback_id = announced.callback_id AND d.kind = announced.kind
                AND d.status = 'exhausted' AND d.attempts = announced.attempts
                AND date_trunc('milliseconds', d.updated_at) = announced.exhausted_at AND NOT d.exhausted_announced
            RETURNING d.update_id, d.callback_id, d.kind, d.last_error, d.updated_at
        ), counted AS (
            SELECT DISTINCT ON (callback_id) callback_id, count(*) OVER (PARTITION BY callback_id) AS deliveries,
                   update_id, kind, last_error
            FROM marked
            WHERE kind <> ALL ($4) AND last_error IS DISTINCT FROM $5
            ORDER BY callback_id, updated_at DESC
        )
        INSERT INTO webhooks.exhausted_deliveries AS e
            (callback_id, deliveries, last_update_id, last_kind, last_error, due_at)
        SELECT callback_id, deliveries, update_id, kind, last_error, $6 FROM counted ORDER BY callback_id
        ON CONFLICT (callback_id) DO UPDATE SET
            deliveries = e.deliveries + excluded.deliveries,
            last_update_id = excluded.last_update_id,
            last_kind = excluded.last_kind,
            last_error = excluded.last_error
        "#,
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &kinds as &[&str],
        &operational.collect::<Vec<_>>() as &[&str],
        ERASED,
        OffsetDateTime::from(now),
        &attempts,
        &exhausted_at as &[OffsetDateTime],
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// The disabled callbacks that are not announced.
pub(crate) async fn disabled(pool: &Pool, limit: i64) -> Result<Vec<WebhookEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT callback_id AS "callback_id: [u8; 12]", project_id AS "project_id: [u8; 12]",
               process_id AS "process_id: [u8; 12]", reason, disabled_at
        FROM webhooks.callback_health
        WHERE NOT disabled_announced
        LIMIT $1
        "#,
        limit,
    )
    .fetch_all(pool)
    .await?;
    let events = rows.into_iter().map(|row| WebhookEvent::CallbackDisabled {
        project_id: id(row.project_id),
        process_id: row.process_id.map(id),
        callback_id: id(row.callback_id),
        reason: row.reason,
        timestamp: row.disabled_at.into(),
    });
    Ok(events.collect())
}

/// Marks callbacks as announced, unless they were disabled again since. Each comes with the time when it was disabled.
pub(crate) async fn mark_disabled_announced(
    pool: &Pool,
    callbacks: &[(ObjectId, Timestamp)],
) -> Result<(), StoreError> {
    let callback_ids = callbacks.iter().map(|(callback_id, _)| *callback_id.as_bytes()).collect::<Vec<_>>();
    let disabled_at = callbacks.iter().map(|(_, at)| (*at).into()).collect::<Vec<OffsetDateTime>>();
    sqlx::query!(
        r#"
        UPDATE webhooks.callback_health AS h SET disabled_announced = true
        FROM unnest($1::bytea[], $2::timestamptz[]) AS announced (callback_id, disabled_at)
        WHERE h.callback_id = announced.callback_id AND h.disabled_at = announced.disabled_at
        "#,
        &callback_ids as &[[u8; 12]],
        &disabled_at as &[OffsetDateTime],
    )
    .execute(pool)
    .await?;
    Ok(())
}

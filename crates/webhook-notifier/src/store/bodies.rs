//! Bodies that are too long for a row of `deliveries`: stored once per update of a project and kind, however many
//! deliveries wait. An update id is unique only within its project.
//!
//! Every transaction writes bodies after its deliveries, which excludes deadlocks.

use std::collections::{BTreeMap, BTreeSet};

use contract::{ObjectId, event::ERASED, event_kind::DeliveryKind};
use service_kit::postgres::Session;

/// Longer bodies are not stored in the rows of deliveries: Postgres itself would move them out of the row, once per
/// delivery.
const MAX_INLINE_BYTES: usize = 2000;

/// Identifies a body: the project, the update, and the kind of the event.
pub(super) type BodyKey = (ObjectId, ObjectId, DeliveryKind);

/// Whether a body is stored here, and not in the rows of its deliveries.
pub(super) fn is_long(body: &str) -> bool {
    body.len() > MAX_INLINE_BYTES
}

/// Stores long bodies of deliveries that wait or are exhausted. An event may be recorded again after its deliveries
/// ended: then there is nothing to store.
pub(super) async fn store(connection: &mut Session, bodies: BTreeMap<BodyKey, &str>) -> sqlx::Result<()> {
    if bodies.is_empty() {
        return Ok(());
    }
    let project_ids = bodies.keys().map(|(project_id, ..)| *project_id.as_bytes()).collect::<Vec<_>>();
    let update_ids = bodies.keys().map(|(_, update_id, _)| *update_id.as_bytes()).collect::<Vec<_>>();
    let kinds = bodies.keys().map(|(.., kind)| kind.as_str()).collect::<Vec<_>>();
    let bodies = bodies.into_values().collect::<Vec<_>>();
    // An existing row is locked, so that it is not released meanwhile.
    sqlx::query!(
        r#"
        INSERT INTO webhooks.payloads (project_id, update_id, kind, payload)
        SELECT project_id, update_id, kind, payload
        FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[]) AS r (project_id, update_id, kind, payload)
        WHERE EXISTS (SELECT FROM webhooks.deliveries AS d
                      WHERE d.update_id = r.update_id AND d.kind = r.kind AND d.project_id = r.project_id
                          AND (d.status = 'pending' OR d.status = 'exhausted' AND d.last_error IS DISTINCT FROM $5))
        ORDER BY update_id, project_id, kind
        ON CONFLICT (update_id, project_id, kind) DO UPDATE SET kind = excluded.kind
        "#,
        &project_ids as &[[u8; 12]],
        &update_ids as &[[u8; 12]],
        &kinds as &[&str],
        &bodies as &[&str],
        ERASED,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Deletes each long body of these updates whose recorded deliveries are all delivered now.
pub(super) async fn release(connection: &mut Session, update_ids: BTreeSet<ObjectId>) -> sqlx::Result<()> {
    if update_ids.is_empty() {
        return Ok(());
    }
    let update_ids = update_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    // Two statements, so that the second one sees the deliveries of transactions that held the locks before.
    let locked = sqlx::query_scalar!(
        r#"
        SELECT update_id AS "update_id: [u8; 12]" FROM webhooks.payloads
        WHERE update_id = ANY($1::bytea[]) ORDER BY update_id, project_id, kind FOR UPDATE
        "#,
        &update_ids as &[[u8; 12]],
    )
    .fetch_all(&mut *connection)
    .await?;
    if locked.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        r#"
        DELETE FROM webhooks.payloads AS p
        WHERE p.update_id = ANY($1::bytea[])
            AND NOT EXISTS (SELECT FROM webhooks.deliveries AS d
                            WHERE d.update_id = p.update_id AND d.kind = p.kind AND d.project_id = p.project_id
                                AND d.status <> 'delivered')
        "#,
        &locked as &[[u8; 12]],
    )
    .execute(connection)
    .await?;
    Ok(())
}

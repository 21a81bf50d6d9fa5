//! The paused and disabled callbacks, and the callbacks with nothing but failures.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use contract::{
    ObjectId, Timestamp,
    rpc::{CallbackDetails, MAX_PENDING_COUNTED},
};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{error::StoreError, id};

/// The disabled callbacks, and why.
pub(crate) async fn disabled_callbacks(pool: &Pool) -> Result<HashMap<ObjectId, Arc<str>>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT callback_id AS "callback_id: [u8; 12]", reason FROM webhooks.callback_health WHERE enabled_at IS NULL"#
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (id(row.callback_id), row.reason.into())).collect())
}

pub(crate) async fn paused_callbacks(pool: &Pool) -> Result<HashSet<ObjectId>, StoreError> {
    let ids = sqlx::query_scalar!(r#"SELECT callback_id AS "callback_id: [u8; 12]" FROM webhooks.paused_callbacks"#)
        .fetch_all(pool)
        .await?;
    Ok(ids.into_iter().map(id).collect())
}

/// The process that configures a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConfiguredIn {
    pub(crate) project_id: ObjectId,
    /// None for the project's fallback callbacks.
    pub(crate) process_id: Option<ObjectId>,
}

/// Pauses a callback, and records its process if it is known. Returns whether it was paused already.
pub(crate) async fn pause_callback(
    pool: &Pool,
    callback_id: ObjectId,
    process: Option<ConfiguredIn>,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let inserted = sqlx::query!(
        r#"
        INSERT INTO webhooks.paused_callbacks (callback_id, paused_at, project_id, process_id) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING
        "#,
        callback_id.as_bytes(),
        OffsetDateTime::from(now),
        process.as_ref().map(|process| &process.project_id.as_bytes()[..]),
        process.as_ref().and_then(|process| process.process_id.as_ref()).map(|id| &id.as_bytes()[..]),
    )
    .execute(pool)
    .await?;
    Ok(inserted.rows_affected() == 0)
}

/// The paused callbacks, and the processes where they were found.
pub(crate) async fn pauses(pool: &Pool) -> Result<Vec<(ObjectId, Option<ConfiguredIn>)>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT callback_id AS "callback_id: [u8; 12]", project_id AS "project_id: [u8; 12]", process_id AS "process_id: [u8; 12]"
        FROM webhooks.paused_callbacks
        "#
    )
    .fetch_all(pool)
    .await?;
    let pauses = rows.into_iter().map(|row| {
        let project_id = row.project_id.map(id);
        let process = project_id.map(|project_id| ConfiguredIn { project_id, process_id: row.process_id.map(id) });
        (id(row.callback_id), process)
    });
    Ok(pauses.collect())
}

/// The disabled callbacks, and the processes that configured them.
pub(crate) async fn processes_of_disabled(pool: &Pool) -> Result<Vec<(ObjectId, ConfiguredIn)>, StoreError> {
    let rows = sqlx::query!(
        r#"
        SELECT callback_id AS "callback_id: [u8; 12]", project_id AS "project_id: [u8; 12]", process_id AS "process_id: [u8; 12]"
        FROM webhooks.callback_health WHERE enabled_at IS NULL
        "#
    )
    .fetch_all(pool)
    .await?;
    let disabled = rows.into_iter().map(|row| {
        let process = ConfiguredIn { project_id: id(row.project_id), process_id: row.process_id.map(id) };
        (id(row.callback_id), process)
    });
    Ok(disabled.collect())
}

/// Deletes the disabled state of a removed callback, once its disabling is announced, and its streak of failures.
/// Returns whether it was deleted.
pub(crate) async fn forget_disabled(pool: &Pool, callback_id: ObjectId) -> Result<bool, StoreError> {
    let forgotten = sqlx::query_scalar!(
        r#"
        WITH forgotten AS (
            DELETE FROM webhooks.callback_health
            WHERE callback_id = $1 AND enabled_at IS NULL AND disabled_announced
            RETURNING callback_id
        ), streak AS (
            DELETE FROM webhooks.callback_failures AS f USING forgotten WHERE f.callback_id = forgotten.callback_id
        )
        SELECT count(*) AS "count!" FROM forgotten
        "#,
        callback_id.as_bytes(),
    )
    .fetch_one(pool)
    .await?;
    Ok(forgotten > 0)
}

/// Records the processes in which paused callbacks were found.
pub(crate) async fn note_processes(pool: &Pool, found: &[(ObjectId, ConfiguredIn)]) -> Result<(), StoreError> {
    let callback_ids = found.iter().map(|(id, _)| *id.as_bytes()).collect::<Vec<_>>();
    let project_ids = found.iter().map(|(_, process)| *process.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = found.iter().map(|(_, process)| process.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        UPDATE webhooks.paused_callbacks AS p SET project_id = f.project_id, process_id = f.process_id
        FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS f (callback_id, project_id, process_id)
        WHERE p.callback_id = f.callback_id
        "#,
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Resumes a callback and ends its streak of failures: otherwise its first failure could disable it after a long pause.
/// If the streak was reported, the event of its end is recorded. A disabled callback keeps its streak until it is
/// enabled. Returns whether the callback was paused.
pub(crate) async fn resume_callback(pool: &Pool, callback_id: ObjectId, now: Timestamp) -> Result<bool, StoreError> {
    let resumed = sqlx::query_scalar!(
        r#"
        WITH resumed AS (
            DELETE FROM webhooks.paused_callbacks WHERE callback_id = $1 RETURNING callback_id
        ), streak AS (
            DELETE FROM webhooks.callback_failures AS f USING resumed
            WHERE f.callback_id = resumed.callback_id
                AND NOT EXISTS (SELECT FROM webhooks.callback_health AS h
                                WHERE h.callback_id = resumed.callback_id AND h.enabled_at IS NULL)
            RETURNING f.callback_id, f.failing_since, f.failing_recorded
        ), recovered AS (
            INSERT INTO webhooks.operational_events
                (event_id, callback_id, kind, occurred_at, reason, failing_since)
            SELECT webhooks.new_id($2), callback_id, 'callback.recovered', $2, 'it was resumed', failing_since
            FROM streak WHERE failing_recorded
        )
        SELECT count(*) AS "count!" FROM resumed
        "#,
        callback_id.as_bytes(),
        OffsetDateTime::from(now),
    )
    .fetch_one(pool)
    .await?;
    Ok(resumed > 0)
}

/// The callbacks with nothing but failures, and when their failures started.
pub(crate) async fn failing_callbacks(pool: &Pool) -> Result<HashMap<ObjectId, Timestamp>, StoreError> {
    let rows =
        sqlx::query!(r#"SELECT callback_id AS "callback_id: [u8; 12]", failing_since FROM webhooks.callback_failures"#)
            .fetch_all(pool)
            .await?;
    Ok(rows.into_iter().map(|row| (id(row.callback_id), row.failing_since.into())).collect())
}

/// The recorded details of these callbacks, in their order.
pub(crate) async fn details(pool: &Pool, callback_ids: &[ObjectId]) -> Result<Vec<CallbackDetails>, StoreError> {
    let callback_ids = callback_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        SELECT h.disabled_at AS "disabled_at?", counted.pending AS "pending!", counted.oldest_at, counted.last_error
        FROM unnest($1::bytea[]) WITH ORDINALITY AS c (callback_id, place)
        LEFT JOIN webhooks.callback_health AS h ON h.callback_id = c.callback_id AND h.enabled_at IS NULL
        CROSS JOIN LATERAL (
            SELECT count(*) AS pending, min(created_at) AS oldest_at,
                   (array_agg(last_error ORDER BY updated_at DESC) FILTER (WHERE last_error IS NOT NULL))[1] AS last_error
            FROM (SELECT created_at, updated_at, last_error FROM webhooks.deliveries AS d
                  WHERE d.callback_id = c.callback_id AND d.status = 'pending' ORDER BY d.next_attempt_at LIMIT $2) AS due
        ) AS counted
        ORDER BY c.place
        "#,
        &callback_ids as &[[u8; 12]],
        i64::from(MAX_PENDING_COUNTED),
    )
    .fetch_all(pool)
    .await?;
    let details = rows.into_iter().map(|row| CallbackDetails {
        disabled_since: row.disabled_at.map(Into::into),
        pending: u32::try_from(row.pending).unwrap_or(u32::MAX),
        oldest_pending_at: row.oldest_at.map(Into::into),
        last_error: row.last_error,
    });
    Ok(details.collect())
}

/// Writes the ends and starts of streaks of failures, and the events of callbacks that recovered. If several replicas
/// report a start, the first one written counts.
pub(crate) async fn write_streaks(
    pool: &Pool,
    ended: &HashMap<ObjectId, Timestamp>,
    started: &HashMap<ObjectId, Timestamp>,
) -> Result<(), StoreError> {
    let columns = |map: &HashMap<ObjectId, Timestamp>| -> (Vec<[u8; 12]>, Vec<OffsetDateTime>) {
        map.iter().map(|(id, at)| (*id.as_bytes(), OffsetDateTime::from(*at))).unzip()
    };
    if !ended.is_empty() {
        let (callback_ids, at) = columns(ended);
        sqlx::query!(
            r#"
            WITH ended AS (
                DELETE FROM webhooks.callback_failures AS f
                USING unnest($1::bytea[], $2::timestamptz[]) AS ended (callback_id, at)
                WHERE f.callback_id = ended.callback_id AND f.failing_since <= ended.at
                RETURNING f.callback_id, f.failing_since, f.failing_recorded, ended.at
            )
            INSERT INTO webhooks.operational_events (event_id, callback_id, kind, occurred_at, failing_since)
            SELECT webhooks.new_id(at), callback_id, 'callback.recovered', at, failing_since
            FROM ended WHERE failing_recorded
            "#,
            &callback_ids as &[[u8; 12]],
            &at as &[OffsetDateTime],
        )
        .execute(pool)
        .await?;
    }
    if !started.is_empty() {
        let (callback_ids, since) = columns(started);
        sqlx::query!(
            r#"
            INSERT INTO webhooks.callback_failures (callback_id, failing_since)
            SELECT callback_id, since FROM unnest($1::bytea[], $2::timestamptz[]) AS begun (callback_id, since)
            ORDER BY callback_id
            ON CONFLICT (callback_id) DO NOTHING
            "#,
            &callback_ids as &[[u8; 12]],
            &since as &[OffsetDateTime],
        )
        .execute(pool)
        .await?;
    }
    Ok(())
}

/// Enables a callback, ends its streak of failures, and records the event. Returns whether it was disabled.
pub(crate) async fn enable_callback(pool: &Pool, callback_id: ObjectId, now: Timestamp) -> Result<bool, StoreError> {
    let enabled = sqlx::query_scalar!(
        r#"
        WITH enabled AS (
            UPDATE webhooks.callback_health SET enabled_at = $2 WHERE callback_id = $1 AND enabled_at IS NULL
            RETURNING callback_id
        ), streak AS (
            DELETE FROM webhooks.callback_failures AS f USING enabled WHERE f.callback_id = enabled.callback_id
            RETURNING f.callback_id, f.failing_since
        ), recovered AS (
            INSERT INTO webhooks.operational_events
                (event_id, callback_id, kind, occurred_at, reason, failing_since)
            SELECT webhooks.new_id($2), e.callback_id, 'callback.recovered', $2, 'it was enabled again', s.failing_since
            FROM enabled AS e LEFT JOIN streak AS s USING (callback_id)
        )
        SELECT count(*) AS "count!" FROM enabled
        "#,
        callback_id.as_bytes(),
        OffsetDateTime::from(now),
    )
    .fetch_one(pool)
    .await?;
    Ok(enabled > 0)
}

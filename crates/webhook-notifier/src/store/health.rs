//! 7 Deliver: which callbacks are disabled.

use contract::{ObjectId, Timestamp};
use sqlx::PgPool;
use time::OffsetDateTime;

use super::id;

/// The callbacks that are disabled, and why.
pub(crate) async fn disabled_callbacks(pool: &PgPool) -> sqlx::Result<Vec<(ObjectId, String)>> {
    let rows = sqlx::query!(
        r#"SELECT callback_id AS "callback_id: [u8; 12]", reason FROM webhooks.callback_health WHERE enabled_at IS NULL"#
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (id(row.callback_id), row.reason)).collect())
}

/// Enables a callback. Returns whether it was disabled.
pub(crate) async fn enable_callback(pool: &PgPool, callback_id: ObjectId, now: Timestamp) -> sqlx::Result<bool> {
    let enabled = sqlx::query!(
        "UPDATE webhooks.callback_health SET enabled_at = $2 WHERE callback_id = $1 AND enabled_at IS NULL",
        callback_id.as_bytes(),
        OffsetDateTime::from(now),
    )
    .execute(pool)
    .await?;
    Ok(enabled.rows_affected() > 0)
}

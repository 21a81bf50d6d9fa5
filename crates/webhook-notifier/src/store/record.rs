//! 7 Deliver, 8 Retry: recording what was attempted and what comes next, in one transaction.
//!
//! The attempt that has number 1 and succeeds stands in its delivery's row, so most deliveries are one row; every other attempt has a
//! row of its own (docs/adr/0036-store-a-successful-first-attempt-in-its-delivery-row.md).

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::core::delivery::{Origin, Report, Standing};

/// Records reports, in the caller's transaction. No two may be of the same delivery.
pub(crate) async fn record(connection: &mut PgConnection, reports: &[Report]) -> sqlx::Result<()> {
    let of = |origin| reports.iter().filter(move |report| report.origin == origin);
    let (ordered, others): (Vec<_>, Vec<_>) = of(Origin::Event).partition(|report| report.delivery.order.is_some());
    record_in_order(connection, &ordered).await?;
    record_from_events(connection, &others).await?;
    record_from_claims(connection, &of(Origin::Claim).collect::<Vec<_>>()).await?;
    disable_callbacks(connection, reports).await
}

/// The columns of attempts. A delivery that was not attempted has none of them.
#[derive(Default)]
struct Attempts {
    started_at: Vec<Option<OffsetDateTime>>,
    duration_ms: Vec<Option<i32>>,
    status_code: Vec<Option<i32>>,
    response: Vec<Option<String>>,
}

impl Attempts {
    fn of(reports: &[&Report]) -> Self {
        let mut columns = Self::default();
        for attempt in reports.iter().map(|report| report.attempt.as_ref()) {
            columns.started_at.push(attempt.map(|attempt| attempt.started_at.into()));
            let duration = attempt.map(|attempt| i32::try_from(attempt.duration.as_millis()).unwrap_or(i32::MAX));
            columns.duration_ms.push(duration);
            columns.status_code.push(attempt.and_then(|attempt| attempt.status).map(i32::from));
            columns.response.push(attempt.and_then(|attempt| attempt.response.clone()));
        }
        columns
    }
}

fn status(standing: Standing) -> &'static str {
    match standing {
        Standing::Pending { .. } | Standing::Waiting => "pending",
        Standing::Delivered => "delivered",
        Standing::Exhausted => "exhausted",
    }
}

fn due(standing: Standing) -> Option<OffsetDateTime> {
    match standing {
        Standing::Pending { due } => Some(due.into()),
        Standing::Waiting | Standing::Delivered | Standing::Exhausted => None,
    }
}

/// Deliveries of callbacks with an order, which are never attempted straight off the event. The event comes to several who record
/// it: the first one counts.
async fn record_in_order(connection: &mut PgConnection, reports: &[&Report]) -> sqlx::Result<()> {
    let ordered = reports.iter().filter_map(|report| Some((*report, report.delivery.order.as_deref()?)));
    let ordered = ordered.collect::<Vec<_>>();
    if ordered.is_empty() {
        return Ok(());
    }
    let update_ids = ordered.iter().map(|(r, _)| *r.delivery.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = ordered.iter().map(|(r, _)| *r.delivery.callback_id.as_bytes()).collect::<Vec<_>>();
    let project_ids = ordered.iter().map(|(r, _)| *r.delivery.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = ordered.iter().map(|(r, _)| r.delivery.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    let statuses = ordered.iter().map(|(r, _)| status(r.standing)).collect::<Vec<_>>();
    let traceparents = ordered.iter().map(|(r, _)| r.delivery.traceparent.as_deref()).collect::<Vec<_>>();
    let errors = ordered.iter().map(|(r, _)| r.error.as_deref()).collect::<Vec<_>>();
    let payloads = ordered.iter().map(|(r, _)| &*r.delivery.body).collect::<Vec<_>>();
    let at = ordered.iter().map(|(r, _)| r.at.into()).collect::<Vec<OffsetDateTime>>();
    let leads = ordered.iter().map(|(_, order)| *order.lead_id.as_bytes()).collect::<Vec<_>>();
    let places = ordered.iter().map(|(_, order)| order.place.clone()).collect::<Vec<_>>();
    let streams = ordered.iter().map(|(_, order)| &*order.stream).collect::<Vec<_>>();
    let sequences = ordered.iter().map(|(_, order)| order.sequence.cast_signed()).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        INSERT INTO webhooks.deliveries
            (update_id, callback_id, project_id, process_id, status, attempts, created_at, updated_at, traceparent, last_error,
             payload, lead_id, place, event_stream, event_seq)
        SELECT r.update_id, r.callback_id, r.project_id, r.process_id, r.status, 0, r.at, r.at, r.traceparent, r.error,
               r.payload, r.lead_id, r.place, r.event_stream, r.event_seq
        FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bytea[], $5::text[], $6::text[], $7::text[], $8::text[],
                    $9::timestamptz[], $10::bytea[], $11::bytea[], $12::text[], $13::bigint[])
            AS r (update_id, callback_id, project_id, process_id, status, traceparent, error, payload, at,
                  lead_id, place, event_stream, event_seq)
        ORDER BY r.update_id, r.callback_id
        ON CONFLICT (update_id, callback_id) DO NOTHING
        "#,
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
        &statuses as &[&str],
        &traceparents as &[Option<&str>],
        &errors as &[Option<&str>],
        &payloads as &[&str],
        &at as &[OffsetDateTime],
        &leads as &[[u8; 12]],
        &places as &[Vec<u8>],
        &streams as &[&str],
        &sequences,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Of a delivery that is recorded already only success is new: its schedule is the retries' to change.
async fn record_from_events(connection: &mut PgConnection, reports: &[&Report]) -> sqlx::Result<()> {
    if reports.is_empty() {
        return Ok(());
    }
    let update_ids = reports.iter().map(|r| *r.delivery.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = reports.iter().map(|r| *r.delivery.callback_id.as_bytes()).collect::<Vec<_>>();
    let project_ids = reports.iter().map(|r| *r.delivery.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = reports.iter().map(|r| r.delivery.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    let statuses = reports.iter().map(|r| status(r.standing)).collect::<Vec<_>>();
    let dues = reports.iter().map(|r| due(r.standing)).collect::<Vec<_>>();
    let traceparents = reports.iter().map(|r| r.delivery.traceparent.as_deref()).collect::<Vec<_>>();
    let errors = reports.iter().map(|r| r.error.as_deref()).collect::<Vec<_>>();
    let payloads =
        reports.iter().map(|r| (r.standing != Standing::Delivered).then_some(&*r.delivery.body)).collect::<Vec<_>>();
    let at = reports.iter().map(|r| r.at.into()).collect::<Vec<OffsetDateTime>>();
    let attempts = Attempts::of(reports);
    sqlx::query!(
        r#"
        WITH reported AS MATERIALIZED (
            SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bytea[], $5::text[], $6::timestamptz[],
                                 $7::text[], $8::text[], $9::text[], $10::timestamptz[],
                                 $11::timestamptz[], $12::integer[], $13::integer[], $14::text[])
                AS r (update_id, callback_id, project_id, process_id, status, due,
                      traceparent, error, payload, at,
                      started_at, duration_ms, status_code, response)
        ), recorded AS (
            INSERT INTO webhooks.deliveries AS d
                (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at,
                 created_at, updated_at, traceparent, last_error, payload,
                 first_started_at, first_duration_ms, first_status_code)
            SELECT update_id, callback_id, project_id, process_id, status, (started_at IS NOT NULL)::integer, due,
                   at, at, traceparent, error, payload,
                   CASE WHEN status = 'delivered' THEN started_at END,
                   CASE WHEN status = 'delivered' THEN duration_ms END,
                   CASE WHEN status = 'delivered' THEN status_code END
            FROM reported
            ORDER BY update_id, callback_id
            ON CONFLICT (update_id, callback_id) DO UPDATE SET
                attempts = d.attempts + excluded.attempts,
                status = CASE WHEN excluded.status = 'delivered' THEN 'delivered' ELSE d.status END,
                next_attempt_at = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.next_attempt_at END,
                payload = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.payload END,
                last_error = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.last_error END,
                updated_at = excluded.updated_at,
                first_started_at = CASE d.attempts WHEN 0 THEN excluded.first_started_at ELSE d.first_started_at END,
                first_duration_ms = CASE d.attempts WHEN 0 THEN excluded.first_duration_ms ELSE d.first_duration_ms END,
                first_status_code = CASE d.attempts WHEN 0 THEN excluded.first_status_code ELSE d.first_status_code END
            RETURNING update_id, callback_id, attempts
        )
        INSERT INTO webhooks.attempts
            (update_id, callback_id, number, started_at, duration_ms, status_code, error, response)
        SELECT update_id, callback_id, attempts, started_at, duration_ms, status_code, error, response
        FROM reported JOIN recorded USING (update_id, callback_id)
        WHERE started_at IS NOT NULL AND NOT (attempts = 1 AND status = 'delivered')
        "#,
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
        &statuses as &[&str],
        &dues as &[Option<OffsetDateTime>],
        &traceparents as &[Option<&str>],
        &errors as &[Option<&str>],
        &payloads as &[Option<&str>],
        &at as &[OffsetDateTime],
        &attempts.started_at as &[Option<OffsetDateTime>],
        &attempts.duration_ms as &[Option<i32>],
        &attempts.status_code as &[Option<i32>],
        &attempts.response as &[Option<String>],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A claim may have run out and been taken over, so what is settled stays settled; but success is success.
async fn record_from_claims(connection: &mut PgConnection, reports: &[&Report]) -> sqlx::Result<()> {
    if reports.is_empty() {
        return Ok(());
    }
    let update_ids = reports.iter().map(|r| *r.delivery.update_id.as_bytes()).collect::<Vec<_>>();
    let callback_ids = reports.iter().map(|r| *r.delivery.callback_id.as_bytes()).collect::<Vec<_>>();
    let statuses = reports.iter().map(|r| status(r.standing)).collect::<Vec<_>>();
    let dues = reports.iter().map(|r| due(r.standing)).collect::<Vec<_>>();
    let errors = reports.iter().map(|r| r.error.as_deref()).collect::<Vec<_>>();
    let at = reports.iter().map(|r| r.at.into()).collect::<Vec<OffsetDateTime>>();
    let attempts = Attempts::of(reports);
    sqlx::query!(
        r#"
        WITH reported AS MATERIALIZED (
            SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::timestamptz[], $5::text[], $6::timestamptz[],
                                 $7::timestamptz[], $8::integer[], $9::integer[], $10::text[])
                AS r (update_id, callback_id, status, due, error, at, started_at, duration_ms, status_code, response)
        ), recorded AS (
            UPDATE webhooks.deliveries AS d SET
                attempts = d.attempts + (r.started_at IS NOT NULL)::integer,
                status = r.status,
                next_attempt_at = r.due,
                payload = CASE WHEN r.status = 'delivered' THEN NULL ELSE d.payload END,
                last_error = r.error,
                updated_at = r.at,
                first_started_at =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.started_at ELSE d.first_started_at END,
                first_duration_ms =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.duration_ms ELSE d.first_duration_ms END,
                first_status_code =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.status_code ELSE d.first_status_code END
            FROM reported AS r
            WHERE d.update_id = r.update_id AND d.callback_id = r.callback_id
                AND (d.status = 'pending' OR r.status = 'delivered')
            RETURNING d.update_id, d.callback_id, d.attempts
        )
        INSERT INTO webhooks.attempts
            (update_id, callback_id, number, started_at, duration_ms, status_code, error, response)
        SELECT update_id, callback_id, attempts, started_at, duration_ms, status_code, error, response
        FROM reported JOIN recorded USING (update_id, callback_id)
        WHERE started_at IS NOT NULL AND NOT (attempts = 1 AND status = 'delivered')
        "#,
        &update_ids as &[[u8; 12]],
        &callback_ids as &[[u8; 12]],
        &statuses as &[&str],
        &dues as &[Option<OffsetDateTime>],
        &errors as &[Option<&str>],
        &at as &[OffsetDateTime],
        &attempts.started_at as &[Option<OffsetDateTime>],
        &attempts.duration_ms as &[Option<i32>],
        &attempts.status_code as &[Option<i32>],
        &attempts.response as &[Option<String>],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// One that is disabled already stays as it is.
async fn disable_callbacks(connection: &mut PgConnection, reports: &[Report]) -> sqlx::Result<()> {
    let disabling = reports.iter().filter_map(|report| Some((report, report.disable.as_deref()?))).collect::<Vec<_>>();
    if disabling.is_empty() {
        return Ok(());
    }
    let callback_ids = disabling.iter().map(|(r, _)| *r.delivery.callback_id.as_bytes()).collect::<Vec<_>>();
    let project_ids = disabling.iter().map(|(r, _)| *r.delivery.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = disabling.iter().map(|(r, _)| r.delivery.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    let at = disabling.iter().map(|(r, _)| r.at.into()).collect::<Vec<OffsetDateTime>>();
    let reasons = disabling.iter().map(|(_, reason)| *reason).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        INSERT INTO webhooks.callback_health AS h (callback_id, project_id, process_id, disabled_at, reason)
        SELECT DISTINCT ON (callback_id) callback_id, project_id, process_id, at, reason
        FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::timestamptz[], $5::text[])
            AS r (callback_id, project_id, process_id, at, reason)
        ORDER BY callback_id, at
        ON CONFLICT (callback_id) DO UPDATE SET
            disabled_at = excluded.disabled_at,
            reason = excluded.reason,
            enabled_at = NULL,
            disabled_announced = false
        WHERE h.enabled_at IS NOT NULL
        "#,
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
        &at as &[OffsetDateTime],
        &reasons as &[&str],
    )
    .execute(connection)
    .await?;
    Ok(())
}

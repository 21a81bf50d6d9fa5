//! Records deliveries and their attempts.
//!
//! Attempt 1, if the endpoint accepted it, is stored in the row of its delivery, so most deliveries are one row. Every
//! other attempt has its own row (docs/adr/0036-store-a-successful-first-attempt-in-its-delivery-row.md). A long body
//! is stored once per update of a project and kind, in `payloads`.

use contract::text::{MAX_ERROR_CHARS, prefix};
use service_kit::postgres::Session;
use time::{Date, OffsetDateTime};

use super::{bodies, error::StoreError};
use crate::core::delivery::{DeliveryRecord, DeliverySource, DeliveryState, LeadOrder};

/// The body that is stored in a delivery's row.
fn inline_body(record: &DeliveryRecord) -> Option<&str> {
    let body = &*record.delivery.body;
    (record.state != DeliveryState::Delivered && !bodies::is_long(body)).then_some(body)
}

/// Whether one statement writes all of these records, so that they need no transaction. Most batches are of this kind.
/// A long body is written by a statement of its own: a crash between two transactions would lose it.
pub(crate) fn is_one_statement(records: &[DeliveryRecord]) -> bool {
    records.iter().all(|record| {
        record.source == DeliverySource::Event
            && record.disable_callback.is_none()
            && record.delivery.order.is_none()
            && !bodies::is_long(&record.delivery.body)
    })
}

/// Writes records, in the caller's transaction. No two may be of the same delivery.
pub(crate) async fn write(connection: &mut Session, records: &[DeliveryRecord]) -> Result<(), StoreError> {
    write_selected(connection, &records.iter().collect::<Vec<_>>()).await
}

/// Writes records after a write that failed, in the caller's transaction, which must not have read anything yet. The
/// failed write may have been committed: then its attempts are skipped, so that none is counted twice. Records without
/// an attempt change nothing the second time.
pub(crate) async fn write_again(connection: &mut Session, records: &[DeliveryRecord]) -> Result<(), StoreError> {
    // The failed write may still be committed after this transaction looked for its attempts. At this level, a write to
    // the same rows then fails, and is repeated.
    sqlx::query!("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *connection).await?;
    let recorded = recorded_attempts(connection, records).await?;
    let left = records.iter().zip(recorded).filter(|(_, is_recorded)| !is_recorded);
    write_selected(connection, &left.map(|(record, _)| record).collect::<Vec<_>>()).await
}

/// Whether the attempt of each record is recorded. The start of an attempt identifies it among those of a delivery.
async fn recorded_attempts(connection: &mut Session, records: &[DeliveryRecord]) -> sqlx::Result<Vec<bool>> {
    let records = records.iter().collect::<Vec<_>>();
    let columns = Columns::of(&records);
    let attempts = AttemptColumns::of(&records);
    sqlx::query_scalar!(
        r#"
        SELECT EXISTS (SELECT FROM webhooks.every_attempt AS a
                       WHERE a.update_id = r.update_id AND a.callback_id = r.callback_id AND a.kind = r.kind
                           AND a.started_at = r.started_at) AS "is_recorded!"
        FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::timestamptz[]) WITH ORDINALITY
            AS r (update_id, callback_id, kind, started_at, place)
        ORDER BY r.place
        "#,
        &columns.update_ids as &[[u8; 12]],
        &columns.callback_ids as &[[u8; 12]],
        &columns.kinds as &[&str],
        &attempts.started_at as &[Option<OffsetDateTime>],
    )
    .fetch_all(connection)
    .await
}

async fn write_selected(connection: &mut Session, records: &[&DeliveryRecord]) -> Result<(), StoreError> {
    let (claimed, from_events): (Vec<_>, Vec<_>) =
        records.iter().copied().partition(|record| record.source.lease().is_some());
    let (ordered, others): (Vec<_>, Vec<_>) =
        from_events.into_iter().partition(|record| record.delivery.order.is_some());
    insert_ordered(connection, &ordered).await?;
    upsert_from_events(connection, &others).await?;
    update_claimed(connection, &claimed).await?;
    let long = |record: &&DeliveryRecord| bodies::is_long(&record.delivery.body);
    let (delivered, waiting): (Vec<&DeliveryRecord>, Vec<_>) =
        records.iter().copied().filter(long).partition(|record| record.state == DeliveryState::Delivered);
    // The body of a claimed delivery is there already.
    let from_events = waiting.into_iter().filter(|record| record.source == DeliverySource::Event);
    let key = |r: &DeliveryRecord| (r.delivery.project_id, r.delivery.update_id, r.delivery.kind);
    let stored = from_events.map(|record| (key(record), &*record.delivery.body));
    bodies::store(connection, stored.collect()).await?;
    bodies::release(connection, delivered.into_iter().map(|record| record.delivery.update_id).collect()).await?;
    disable_callbacks(connection, records).await?;
    Ok(())
}

/// The columns that every record has.
struct Columns<'a> {
    update_ids: Vec<[u8; 12]>,
    callback_ids: Vec<[u8; 12]>,
    kinds: Vec<&'static str>,
    statuses: Vec<&'static str>,
    due: Vec<Option<OffsetDateTime>>,
    errors: Vec<Option<&'a str>>,
    at: Vec<OffsetDateTime>,
    id_months: Vec<Date>,
}

impl<'a> Columns<'a> {
    fn of(records: &[&'a DeliveryRecord]) -> Self {
        Self {
            update_ids: records.iter().map(|r| *r.delivery.update_id.as_bytes()).collect(),
            callback_ids: records.iter().map(|r| *r.delivery.callback_id.as_bytes()).collect(),
            kinds: records.iter().map(|r| r.delivery.kind.as_str()).collect(),
            statuses: records.iter().map(|r| r.state.status().as_str()).collect(),
            due: records.iter().map(|r| r.state.next_attempt_at().map(Into::into)).collect(),
            errors: records.iter().map(|r| r.error.as_deref().map(|e| prefix(e, MAX_ERROR_CHARS))).collect(),
            at: records.iter().map(|r| r.at.into()).collect(),
            id_months: records.iter().map(|r| r.delivery.update_id.month()).collect(),
        }
    }
}

/// The columns of new rows.
struct NewColumns<'a> {
    project_ids: Vec<[u8; 12]>,
    process_ids: Vec<Option<[u8; 12]>>,
    traceparents: Vec<Option<&'a str>>,
}

impl<'a> NewColumns<'a> {
    fn of(records: &[&'a DeliveryRecord]) -> Self {
        Self {
            project_ids: records.iter().map(|r| *r.delivery.project_id.as_bytes()).collect(),
            process_ids: records.iter().map(|r| r.delivery.process_id.map(|id| *id.as_bytes())).collect(),
            traceparents: records.iter().map(|r| r.delivery.traceparent.as_deref()).collect(),
        }
    }
}

/// The columns of attempts; null for a record without one.
#[derive(Default)]
struct AttemptColumns<'a> {
    started_at: Vec<Option<OffsetDateTime>>,
    duration_ms: Vec<Option<i32>>,
    status_codes: Vec<Option<i32>>,
    responses: Vec<Option<&'a str>>,
}

impl<'a> AttemptColumns<'a> {
    fn of(records: &[&'a DeliveryRecord]) -> Self {
        let mut columns = Self::default();
        for attempt in records.iter().map(|record| record.attempt.as_ref()) {
            columns.started_at.push(attempt.map(|attempt| attempt.started_at.into()));
            let duration = attempt.map(|attempt| i32::try_from(attempt.duration.as_millis()).unwrap_or(i32::MAX));
            columns.duration_ms.push(duration);
            columns.status_codes.push(attempt.and_then(|attempt| attempt.outcome.status()).map(i32::from));
            columns.responses.push(attempt.and_then(|attempt| attempt.response.as_deref()));
        }
        columns
    }
}

/// Completes a statement that defines `records` and `recorded`, the records that changed a row: counts their attempts
/// and exhaustions, and inserts the attempts that are not in the row of their delivery.
macro_rules! record_query {
    ($records:literal, $($args:tt)*) => {
        sqlx::query!(
            $records
                + r#"
        , counted AS (
            INSERT INTO webhooks.delivery_counts AS c
                (project_id, minute, callback_id, kind, id_month, writer, process_id,
                 delivered_100ms, delivered_1s, delivered_10s, delivered_longer, failed, exhausted)
            SELECT d.project_id, date_trunc('minute', e.at), d.callback_id, d.kind, r.id_month, pg_backend_pid(),
                   coalesce(d.process_id, ''),
                   count(*) FILTER (WHERE e.delivered AND e.ms <= 100),
                   count(*) FILTER (WHERE e.delivered AND e.ms > 100 AND e.ms <= 1000),
                   count(*) FILTER (WHERE e.delivered AND e.ms > 1000 AND e.ms <= 10000),
                   count(*) FILTER (WHERE e.delivered AND e.ms > 10000),
                   count(*) FILTER (WHERE NOT e.delivered),
                   count(*) FILTER (WHERE e.delivered IS NULL)
            FROM records AS r
            JOIN recorded AS d USING (update_id, callback_id, kind)
            CROSS JOIN LATERAL (VALUES
                (r.started_at, r.duration_ms, r.status = 'delivered'),
                (CASE WHEN r.status = 'exhausted' AND r.at = d.recorded_at THEN r.at END, NULL, NULL)
            ) AS e (at, ms, delivered)
            WHERE e.at IS NOT NULL
            GROUP BY 1, 2, 3, 4, 5, 6, 7
            ON CONFLICT (project_id, minute, callback_id, kind, id_month, writer) DO UPDATE SET
                delivered_100ms = c.delivered_100ms + excluded.delivered_100ms,
                delivered_1s = c.delivered_1s + excluded.delivered_1s,
                delivered_10s = c.delivered_10s + excluded.delivered_10s,
                delivered_longer = c.delivered_longer + excluded.delivered_longer,
                failed = c.failed + excluded.failed,
                exhausted = c.exhausted + excluded.exhausted
        )
        INSERT INTO webhooks.attempts
            (update_id, callback_id, kind, number, started_at, duration_ms, status_code, error, response, counted)
        SELECT update_id, callback_id, kind, attempts, started_at, duration_ms, status_code, error, response, true
        FROM records JOIN recorded USING (update_id, callback_id, kind)
        WHERE started_at IS NOT NULL AND NOT (attempts = 1 AND status = 'delivered')
        "#,
            $($args)*
        )
    };
}

/// Inserts deliveries of ordered callbacks, which are pending and have no attempt yet. Several notifiers may receive
/// the event: the first insert counts.
async fn insert_ordered(connection: &mut Session, records: &[&DeliveryRecord]) -> sqlx::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let columns = Columns::of(records);
    let new = NewColumns::of(records);
    let payloads = records.iter().map(|r| inline_body(r)).collect::<Vec<_>>();
    let orders = records.iter().filter_map(|r| r.delivery.order.as_deref()).collect::<Vec<&LeadOrder>>();
    let lead_ids = orders.iter().map(|order| *order.lead_id.as_bytes()).collect::<Vec<_>>();
    let order_keys = orders.iter().map(|order| &*order.key).collect::<Vec<_>>();
    let event_streams = orders.iter().map(|order| &*order.event_stream).collect::<Vec<_>>();
    let event_sequences = orders.iter().map(|order| order.event_sequence.cast_signed()).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        INSERT INTO webhooks.deliveries
            (update_id, callback_id, kind, project_id, process_id, status, attempts, created_at, updated_at, traceparent,
             payload, lead_id, order_key, event_stream, event_sequence)
        SELECT update_id, callback_id, kind, project_id, process_id, 'pending', 0, at, at, traceparent,
               payload, lead_id, order_key, event_stream, event_sequence
        FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::bytea[], $5::bytea[], $6::text[], $7::timestamptz[], $8::text[],
                    $9::bytea[], $10::bytea[], $11::text[], $12::bigint[])
            AS r (update_id, callback_id, kind, project_id, process_id, traceparent, at, payload,
                  lead_id, order_key, event_stream, event_sequence)
        ORDER BY update_id, callback_id, kind
        ON CONFLICT (update_id, callback_id, kind) DO NOTHING
        "#,
        &columns.update_ids as &[[u8; 12]],
        &columns.callback_ids as &[[u8; 12]],
        &columns.kinds as &[&str],
        &new.project_ids as &[[u8; 12]],
        &new.process_ids as &[Option<[u8; 12]>],
        &new.traceparents as &[Option<&str>],
        &columns.at as &[OffsetDateTime],
        &payloads as &[Option<&str>],
        &lead_ids as &[[u8; 12]],
        &order_keys as &[&[u8]],
        &event_streams as &[&str],
        &event_sequences,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Records deliveries from events. Only a success changes the state of an existing row, because the retries own it.
async fn upsert_from_events(connection: &mut Session, records: &[&DeliveryRecord]) -> sqlx::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let columns = Columns::of(records);
    let new = NewColumns::of(records);
    let payloads = records.iter().map(|r| inline_body(r)).collect::<Vec<_>>();
    let attempts = AttemptColumns::of(records);
    record_query!(
        r#"
        WITH records AS MATERIALIZED (
            SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bytea[], $5::text[], $6::timestamptz[],
                                 $7::text[], $8::text[], $9::text[], $10::timestamptz[],
                                 $11::timestamptz[], $12::integer[], $13::integer[], $14::text[], $15::text[],
                                 $16::date[])
                AS r (update_id, callback_id, project_id, process_id, status, due,
                      traceparent, error, payload, at,
                      started_at, duration_ms, status_code, response, kind, id_month)
        ), recorded AS (
            INSERT INTO webhooks.deliveries AS d
                (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at,
                 created_at, updated_at, traceparent, last_error, payload,
                 first_started_at, first_duration_ms, first_status_code, kind, first_counted, exhausted_at)
            SELECT update_id, callback_id, project_id, process_id, status, (started_at IS NOT NULL)::integer, due,
                   at, at, traceparent, error, payload,
                   CASE WHEN status = 'delivered' THEN started_at END,
                   CASE WHEN status = 'delivered' THEN duration_ms END,
                   CASE WHEN status = 'delivered' THEN status_code END, kind,
                   CASE WHEN status = 'delivered' THEN started_at IS NOT NULL END,
                   CASE WHEN status = 'exhausted' THEN ARRAY[at] END
            FROM records
            ORDER BY update_id, callback_id, kind
            ON CONFLICT (update_id, callback_id, kind) DO UPDATE SET
                attempts = d.attempts + excluded.attempts,
                status = CASE WHEN excluded.status = 'delivered' THEN 'delivered' ELSE d.status END,
                next_attempt_at = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.next_attempt_at END,
                payload = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.payload END,
                last_error = CASE WHEN excluded.status = 'delivered' THEN NULL ELSE d.last_error END,
                updated_at = excluded.updated_at,
                first_started_at = CASE d.attempts WHEN 0 THEN excluded.first_started_at ELSE d.first_started_at END,
                first_duration_ms = CASE d.attempts WHEN 0 THEN excluded.first_duration_ms ELSE d.first_duration_ms END,
                first_status_code = CASE d.attempts WHEN 0 THEN excluded.first_status_code ELSE d.first_status_code END,
                first_counted = CASE d.attempts WHEN 0 THEN excluded.first_counted ELSE d.first_counted END
            -- Only the time of creation tells a new row from an existing one, which is not exhausted by its event.
            RETURNING update_id, callback_id, kind, attempts, project_id, process_id, created_at AS recorded_at
        )
        "#,
        &columns.update_ids as &[[u8; 12]],
        &columns.callback_ids as &[[u8; 12]],
        &new.project_ids as &[[u8; 12]],
        &new.process_ids as &[Option<[u8; 12]>],
        &columns.statuses as &[&str],
        &columns.due as &[Option<OffsetDateTime>],
        &new.traceparents as &[Option<&str>],
        &columns.errors as &[Option<&str>],
        &payloads as &[Option<&str>],
        &columns.at as &[OffsetDateTime],
        &attempts.started_at as &[Option<OffsetDateTime>],
        &attempts.duration_ms as &[Option<i32>],
        &attempts.status_codes as &[Option<i32>],
        &attempts.responses as &[Option<&str>],
        &columns.kinds as &[&str],
        &columns.id_months as &[Date],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A lease may have ended and another notifier may have claimed the row, or completed the delivery. Then only a success
/// changes its state: with the due time of a failure, the delivery would be attempted during the other attempt. The
/// failed attempt of a pending delivery is recorded in any case.
async fn update_claimed(connection: &mut Session, records: &[&DeliveryRecord]) -> sqlx::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let columns = Columns::of(records);
    let attempts = AttemptColumns::of(records);
    let leases = records.iter().map(|r| r.source.lease().map(Into::into)).collect::<Vec<Option<OffsetDateTime>>>();
    record_query!(
        r#"
        WITH records AS MATERIALIZED (
            SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::timestamptz[], $5::text[], $6::timestamptz[],
                                 $7::timestamptz[], $8::integer[], $9::integer[], $10::text[], $11::text[], $12::date[],
                                 $13::timestamptz[])
                AS r (update_id, callback_id, status, due, error, at, started_at, duration_ms, status_code, response, kind,
                      id_month, lease)
        ), recorded AS (
            UPDATE webhooks.deliveries AS d SET
                attempts = d.attempts + (r.started_at IS NOT NULL)::integer,
                status = CASE WHEN r.status = 'delivered' OR d.next_attempt_at = r.lease THEN r.status ELSE d.status END,
                next_attempt_at =
                    CASE WHEN r.status = 'delivered' OR d.next_attempt_at = r.lease THEN r.due ELSE d.next_attempt_at END,
                payload = CASE WHEN r.status = 'delivered' THEN NULL ELSE d.payload END,
                last_error = r.error,
                updated_at = r.at,
                first_started_at =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.started_at ELSE d.first_started_at END,
                first_duration_ms =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.duration_ms ELSE d.first_duration_ms END,
                first_status_code =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.status_code ELSE d.first_status_code END,
                first_counted =
                    CASE WHEN d.attempts = 0 AND r.status = 'delivered' THEN r.started_at IS NOT NULL
                         ELSE d.first_counted END,
                exhausted_at =
                    CASE WHEN r.status = 'exhausted' AND d.next_attempt_at = r.lease THEN d.exhausted_at || r.at
                         ELSE d.exhausted_at END
            FROM records AS r
            WHERE d.update_id = r.update_id AND d.callback_id = r.callback_id AND d.kind = r.kind
                AND (r.status = 'delivered'
                     OR d.status = 'pending' AND (d.next_attempt_at = r.lease OR r.started_at IS NOT NULL))
            -- Without the lease, the delivery is not exhausted.
            RETURNING d.update_id, d.callback_id, d.kind, d.attempts, d.project_id, d.process_id,
                      CASE WHEN d.status = 'exhausted' THEN r.at END AS recorded_at
        )
        "#,
        &columns.update_ids as &[[u8; 12]],
        &columns.callback_ids as &[[u8; 12]],
        &columns.statuses as &[&str],
        &columns.due as &[Option<OffsetDateTime>],
        &columns.errors as &[Option<&str>],
        &columns.at as &[OffsetDateTime],
        &attempts.started_at as &[Option<OffsetDateTime>],
        &attempts.duration_ms as &[Option<i32>],
        &attempts.status_codes as &[Option<i32>],
        &attempts.responses as &[Option<&str>],
        &columns.kinds as &[&str],
        &columns.id_months as &[Date],
        &leases as &[Option<OffsetDateTime>],
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Disables callbacks and records the events, unless the delivery is of such an event itself. A callback that is
/// disabled already keeps its first reason.
async fn disable_callbacks(connection: &mut Session, records: &[&DeliveryRecord]) -> sqlx::Result<()> {
    let disabling = records.iter().filter_map(|record| Some((*record, record.disable_callback.as_deref()?)));
    let disabling = disabling.collect::<Vec<_>>();
    if disabling.is_empty() {
        return Ok(());
    }
    let callback_ids = disabling.iter().map(|(r, _)| *r.delivery.callback_id.as_bytes()).collect::<Vec<_>>();
    let project_ids = disabling.iter().map(|(r, _)| *r.delivery.project_id.as_bytes()).collect::<Vec<_>>();
    let process_ids = disabling.iter().map(|(r, _)| r.delivery.process_id.map(|id| *id.as_bytes())).collect::<Vec<_>>();
    let at = disabling.iter().map(|(r, _)| r.at.into()).collect::<Vec<OffsetDateTime>>();
    let reasons = disabling.iter().map(|(_, reason)| *reason).collect::<Vec<_>>();
    let operational = disabling.iter().map(|(r, _)| r.delivery.kind.is_operational()).collect::<Vec<_>>();
    sqlx::query!(
        r#"
        WITH first AS MATERIALIZED (
            SELECT DISTINCT ON (callback_id) callback_id, project_id, process_id, at, reason, is_operational
            FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::timestamptz[], $5::text[], $6::boolean[])
                AS r (callback_id, project_id, process_id, at, reason, is_operational)
            ORDER BY callback_id, at
        ), disabled AS (
            INSERT INTO webhooks.callback_health AS h (callback_id, project_id, process_id, disabled_at, reason)
            SELECT callback_id, project_id, process_id, at, reason FROM first ORDER BY callback_id
            ON CONFLICT (callback_id) DO UPDATE SET
                disabled_at = excluded.disabled_at,
                reason = excluded.reason,
                enabled_at = NULL,
                disabled_announced = false
            WHERE h.enabled_at IS NOT NULL
            RETURNING callback_id
        )
        INSERT INTO webhooks.operational_events (event_id, callback_id, kind, occurred_at, reason, failing_since)
        SELECT webhooks.new_id(first.at), callback_id, 'callback.disabled', first.at, first.reason,
               (SELECT f.failing_since FROM webhooks.callback_failures AS f WHERE f.callback_id = first.callback_id)
        FROM first JOIN disabled USING (callback_id) WHERE NOT first.is_operational
        "#,
        &callback_ids as &[[u8; 12]],
        &project_ids as &[[u8; 12]],
        &process_ids as &[Option<[u8; 12]>],
        &at as &[OffsetDateTime],
        &reasons as &[&str],
        &operational,
    )
    .execute(connection)
    .await?;
    Ok(())
}

//! A snapshot of both schemas, with the contents of the streams in temporary tables beside it.
//!
//! With everything in Postgres, an invariant is one statement over sets, and leadctl does not hold a million rows in
//! memory. The temporary tables are created before the transaction, which is otherwise read-only.

use std::time::Duration;

use anyhow::Context;
use contract::{
    ObjectId,
    pack::MAX_PACK_COMMANDS,
    position::{EventPosition, LogPosition},
};
use service_kit::{clock, postgres::Session};
use sqlx::Row;
use time::OffsetDateTime;

use super::{
    invariants::{EXEMPTIONS, Invariant},
    messages::{DeadLetterOrigin, Entry, EntryKind, Event, StreamBounds},
    partitions::{self, ids_complete_since, rows_complete_since},
    report::{CallbackCounts, Checkpoint, ParkedCounts, Unchecked, UpdateCounts, Violation},
    scope::Scope,
};

/// How long a statement may take. Sorting the updates of a large installation takes minutes.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// How long a new configuration may take to reach every webhook-notifier. An update that was applied sooner after a
/// change may have been delivered under the previous configuration.
const CHANGE_GRACE: Duration = Duration::from_secs(5);

/// A position in the log is one number here, so that positions can be compared: the sequence, with the index in its
/// pack in the lowest ten bits. `pg_temp.entry` prints one.
const INDEX_BITS: u32 = 10;
const _: () = assert!(MAX_PACK_COMMANDS <= 1 << INDEX_BITS, "an index must fit into its bits");

fn position(sequence: i64, index: i32) -> i64 {
    (sequence << INDEX_BITS) + i64::from(index)
}

const TABLES: &str = "
    CREATE FUNCTION pg_temp.place(seq bigint, index int) RETURNS bigint IMMUTABLE LANGUAGE sql
        AS 'SELECT (seq << 10) + index';
    CREATE FUNCTION pg_temp.entry(at bigint) RETURNS text IMMUTABLE LANGUAGE sql
        AS $$ SELECT (at >> 10) || CASE WHEN at & 1023 > 0 THEN '.' || (at & 1023) ELSE '' END $$;
    -- The month (UTC) in which an id was created.
    CREATE FUNCTION pg_temp.id_month(id bytea) RETURNS date IMMUTABLE LANGUAGE sql
        AS $$ SELECT date_trunc('month', to_timestamp(get_byte(id, 0)::bigint * 16777216 + get_byte(id, 1) * 65536
                                                      + get_byte(id, 2) * 256 + get_byte(id, 3)) AT TIME ZONE 'UTC')::date $$;
    CREATE TEMP TABLE audit_facts (
        from_time timestamptz, to_time timestamptz, project_id bytea,
        epoch int NOT NULL, last_seq bigint NOT NULL, generation int NOT NULL, announced_epoch int NOT NULL,
        announced_seq bigint NOT NULL,
        applied_seq bigint NOT NULL, log_first bigint NOT NULL, log_last bigint NOT NULL, log_complete boolean NOT NULL,
        letters_since timestamptz NOT NULL, acked bigint NOT NULL, events_first bigint NOT NULL,
        overtaken boolean NOT NULL,
        -- Older ids, rows that were logged before, and older ids of deliveries may have been dropped.
        ledger_since timestamptz NOT NULL, rows_since timestamptz NOT NULL, deliveries_since bytea NOT NULL);
    -- Ledger rows in the scope, and the other rows that changed their leads.
    CREATE TEMP TABLE audit_rows (
        project_id bytea, update_id bytea, epoch int, log_seq bigint, lead_id bytea, process_id bytea, success boolean,
        from_state text, to_state text, version bigint, applied_at timestamptz, in_scope boolean,
        -- Where it was decided: at its own entry, or for a queued update at the entry that ended the call.
        at_epoch int, at_seq bigint,
        -- What it is of, the disposition that it stored, and whether it changed the lead.
        kind text, disposition text, has_result boolean, changes boolean, logged_at timestamptz);
    -- What each row in the scope means: events that callbacks subscribe to, and the kinds of their deliveries.
    CREATE TEMP TABLE audit_occurrences (project_id bytea, update_id bytea, event text, delivery text);
    CREATE TEMP TABLE audit_queued (
        project_id bytea, update_id bytea, lead_id bytea, epoch int, log_seq bigint, in_scope boolean);
    CREATE TEMP TABLE audit_entries (
        seq bigint, kind text, project_id bytea, update_id bytea, logged_at timestamptz);
    CREATE TEMP TABLE audit_events (
        seq bigint, project_id bytea, update_id bytea, published_at timestamptz, generation int);
    CREATE TEMP TABLE audit_dead_letters (origin text, epoch int, seq bigint);
    CREATE TEMP TABLE audit_callbacks (
        callback_id bytea, project_id bytea, process_id bytea, name text, events text[], known_since timestamptz,
        -- Its conditions; null without any.
        filter json);
    -- Announced events without a delivery to a callback that subscribes to them.
    CREATE TEMP TABLE audit_missing_deliveries (update_id bytea, callback_id bytea, kind text, verdict text);
";

macro_rules! insert_ledger_rows {
    ($in_scope:literal, $from:literal) => {
        concat!(
            "
    INSERT INTO audit_rows
    SELECT u.project_id, u.update_id, u.log_epoch, pg_temp.place(u.log_sequence, u.log_index), u.lead_id, coalesce(u.process_id, ''), u.success,
           u.from_state, u.to_state, u.version, u.applied_at, ",
            $in_scope,
            ", coalesce(u.decided_epoch, u.log_epoch), 
           pg_temp.place(coalesce(u.decided_sequence, u.log_sequence), coalesce(u.decided_index, u.log_index)),
           u.kind, CASE WHEN u.success THEN u.disposition END,
           CASE WHEN u.kind = 'call.ended' THEN u.command->>'result' IS NOT NULL ELSE false END,
           u.success AND u.version IS NOT NULL AND u.kind <> 'lead.created', u.logged_at
    FROM lead_state.lead_updates u",
            $from
        )
    };
}

const ROWS_IN_SCOPE: &str = insert_ledger_rows!(
    true,
    ", audit_facts f
    WHERE (f.from_time IS NULL OR u.logged_at >= f.from_time) AND (f.to_time IS NULL OR u.logged_at < f.to_time)
      AND (f.project_id IS NULL OR u.project_id = f.project_id)"
);

const OTHER_ROWS_OF_LEADS: &str = insert_ledger_rows!(
    false,
    "
    WHERE u.success AND u.version IS NOT NULL AND u.kind <> 'lead.created' AND u.lead_id IN (SELECT lead_id FROM audit_rows WHERE changes)
      AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = u.project_id AND r.update_id = u.update_id)"
);

/// The rules of `contract::event_kind::EventKind::occurred`.
const OCCURRENCES: &str = "
    INSERT INTO audit_occurrences
    SELECT r.project_id, r.update_id, o.event, o.delivery
    FROM audit_rows r CROSS JOIN LATERAL (VALUES
        (r.kind = 'update' AND r.success, 'update.succeeded', 'update'),
        (r.kind = 'update' AND NOT r.success, 'update.failed', 'update'),
        (r.success AND r.kind = 'lead.created', 'lead.created', 'lead.created'),
        (r.success AND r.kind <> 'lead.created' AND r.to_state IS NOT NULL AND r.from_state IS DISTINCT FROM r.to_state,
         'lead.state_changed', 'lead.state_changed'),
        (r.success AND r.disposition IS NOT NULL, 'lead.disposition_set', 'lead.disposition_set'),
        (r.success AND r.kind = 'call.started', 'call.started', 'call.started'),
        (r.success AND r.kind = 'call.ended', 'call.ended', 'call.ended'),
        (r.success AND r.has_result, 'activity.completed', 'activity.completed')) AS o (occurred, event, delivery)
    WHERE r.in_scope AND o.occurred AND EXISTS (SELECT FROM audit_callbacks c WHERE o.event = ANY (c.events))";

const QUEUED: &str = "
    INSERT INTO audit_queued
    SELECT h.project_id, h.update_id, h.lead_id, h.log_epoch, pg_temp.place(h.log_sequence, h.log_index),
           (f.from_time IS NULL OR h.logged_at >= f.from_time) AND (f.to_time IS NULL OR h.logged_at < f.to_time)
               AND (f.project_id IS NULL OR h.project_id = f.project_id)
    FROM lead_state.queued_updates h, audit_facts f";

const CALLBACKS: &str = r#"
    INSERT INTO audit_callbacks
    SELECT decode(c->>'callbackId', 'hex'), p.project_id, coalesce(p.process_id, ''), c->>'name',
           -- Deliveries of callbacks that are off, paused or disabled are recorded and wait.
           CASE WHEN events IS NULL THEN '{update.succeeded,update.failed}'
                ELSE ARRAY(SELECT jsonb_array_elements_text(events)) END,
           CASE WHEN p.projected_revision = p.revision THEN p.changed_at ELSE 'infinity' END, c->'filter'
    FROM lead_state.processes p, audit_facts f, json_array_elements(p.config->'callbacks') c,
         LATERAL (SELECT nullif((c->'events')::jsonb, 'null') AS events) AS settings
    WHERE f.project_id IS NULL OR p.project_id = f.project_id"#;

const MISSING_DELIVERIES: &str = "
    INSERT INTO audit_missing_deliveries
    SELECT r.update_id, c.callback_id, o.delivery,
           CASE WHEN EXISTS (SELECT FROM webhooks.parked_events e
                             WHERE e.update_id = r.update_id AND e.project_id = r.project_id) THEN 'parked'
                WHEN v.seq > f.acked THEN 'pending'
                WHEN v.seq IS NULL AND f.overtaken THEN 'overtaken'
                WHEN r.applied_at < c.known_since + $1 THEN 'changed'
                WHEN r.update_id < f.deliveries_since THEN 'dropped'
                -- What its filter would compare is gone.
                WHEN c.filter IS NOT NULL AND EXISTS (SELECT FROM lead_state.leads l
                                                      WHERE l.lead_id = r.lead_id AND l.erased_at IS NOT NULL)
                THEN 'erased'
                ELSE 'undelivered' END
    FROM audit_facts f
    CROSS JOIN audit_rows r
    JOIN audit_occurrences o ON o.project_id = r.project_id AND o.update_id = r.update_id
    JOIN audit_callbacks c ON c.project_id = r.project_id AND c.process_id = r.process_id AND o.event = ANY (c.events)
    -- An update that is announced again is delivered again: its last event counts.
    LEFT JOIN (SELECT project_id, update_id, max(seq) AS seq FROM audit_events GROUP BY 1, 2) v
        ON v.project_id = r.project_id AND v.update_id = r.update_id
    WHERE r.in_scope AND ((r.at_epoch, r.at_seq) <= (f.announced_epoch, f.announced_seq) OR v.seq IS NOT NULL)
      AND NOT EXISTS (SELECT FROM webhooks.deliveries d
                      WHERE d.update_id = r.update_id AND d.callback_id = c.callback_id AND d.kind = o.delivery)
      -- The rules of `contract::process::FilterCondition::holds`.
      AND (c.filter IS NULL OR NOT EXISTS (
          SELECT FROM json_array_elements(c.filter) AS condition, LATERAL (SELECT CASE condition->>'field'
              WHEN 'fromState' THEN r.from_state WHEN 'toState' THEN r.to_state WHEN 'disposition' THEN r.disposition
              WHEN 'processId' THEN nullif(encode(r.process_id, 'hex'), '')
              ELSE (SELECT u.data #>> string_to_array(substr(condition->>'field', length('metadata.') + 1), '.')
                    FROM lead_state.lead_updates u WHERE u.project_id = r.project_id AND u.update_id = r.update_id)
              END AS content) AS found
          WHERE NOT CASE WHEN condition->>'equals' IS NOT NULL THEN coalesce(content = condition->>'equals', false)
                         WHEN condition->'in' IS NOT NULL
                         THEN content IS NOT NULL AND content IN (SELECT json_array_elements_text(condition->'in'))
                         ELSE (content IS NOT NULL) = (condition->>'exists')::boolean END))";

const COUNT_UPDATES: &str = "
    SELECT
        (SELECT count(*) FROM audit_rows WHERE in_scope AND success),
        (SELECT count(*) FROM audit_rows WHERE in_scope AND NOT success),
        (SELECT count(*) FROM (
            SELECT DISTINCT e.project_id, e.update_id FROM (
                SELECT e.project_id, e.update_id FROM audit_entries e, audit_facts f
                WHERE e.kind = 'update' AND e.seq > f.applied_seq
                UNION ALL
                -- Creations that are not logged yet.
                SELECT c.project_id, c.update_id FROM lead_state.created_leads c, audit_facts f
                WHERE (f.from_time IS NULL OR c.created_at >= f.from_time)
                  AND (f.to_time IS NULL OR c.created_at < f.to_time)
                  AND (f.project_id IS NULL OR c.project_id = f.project_id)) AS e
            WHERE NOT EXISTS (
                SELECT FROM lead_state.lead_updates u WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
              AND NOT EXISTS (SELECT FROM audit_queued h WHERE h.project_id = e.project_id AND h.update_id = e.update_id)
        ) AS behind),
        (SELECT count(*) FROM audit_queued WHERE in_scope),
        (SELECT count(*) FROM audit_entries e, audit_facts f
         WHERE e.kind = 'update' AND e.seq <= f.applied_seq
           AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.epoch = f.epoch AND r.log_seq = e.seq
                             AND r.project_id = e.project_id AND r.update_id = e.update_id)
           AND (EXISTS (SELECT FROM lead_state.lead_updates u
                        WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
                OR EXISTS (SELECT FROM audit_queued h WHERE h.project_id = e.project_id AND h.update_id = e.update_id
                             AND (h.epoch, h.log_seq) <> (f.epoch, e.seq)))),
        (SELECT count(*) FROM audit_dead_letters)";

const COUNT_DELIVERIES: &str = "
    SELECT encode(callback_id, 'hex'), max(c.name), sum(delivered)::bigint, sum(exhausted)::bigint, sum(pending)::bigint,
           sum(parked)::bigint, sum(undelivered)::bigint
    FROM (
        SELECT d.callback_id, count(*) FILTER (WHERE d.status = 'delivered') AS delivered,
               count(*) FILTER (WHERE d.status = 'exhausted') AS exhausted,
               count(*) FILTER (WHERE d.status = 'pending') AS pending, 0 AS parked,
               0 AS undelivered
        FROM webhooks.deliveries d
        JOIN audit_rows r ON r.update_id = d.update_id AND r.project_id = d.project_id AND r.in_scope
        GROUP BY d.callback_id
        UNION ALL
        -- Of operational events, which are of no update.
        SELECT d.callback_id, count(*) FILTER (WHERE d.status = 'delivered'), count(*) FILTER (WHERE d.status = 'exhausted'),
               count(*) FILTER (WHERE d.status = 'pending'), 0, 0
        FROM webhooks.deliveries d, audit_facts f
        WHERE d.kind IN ('callback.failing', 'callback.disabled', 'callback.recovered', 'delivery.exhausted')
          AND (f.from_time IS NULL OR d.created_at >= f.from_time) AND (f.to_time IS NULL OR d.created_at < f.to_time)
          AND (f.project_id IS NULL OR d.project_id = f.project_id)
        GROUP BY d.callback_id
        UNION ALL
        SELECT callback_id, 0, 0, count(*) FILTER (WHERE verdict = 'pending'), count(*) FILTER (WHERE verdict = 'parked'),
               count(*) FILTER (WHERE verdict = 'undelivered')
        FROM audit_missing_deliveries GROUP BY callback_id
    ) AS parts
    LEFT JOIN audit_callbacks c USING (callback_id)
    GROUP BY callback_id ORDER BY max(c.name), callback_id";

const COUNT_PARKED: &str = "
    SELECT encode(e.project_id, 'hex'), count(*) FROM webhooks.parked_events e
    JOIN audit_rows r ON r.update_id = e.update_id AND r.project_id = e.project_id AND r.in_scope
    GROUP BY e.project_id ORDER BY 1";

pub(crate) struct Snapshot {
    session: Session,
    scope: Scope,
    /// None before lead-state has led for the first time.
    pub(crate) checkpoint: Option<Checkpoint>,
}

impl Snapshot {
    pub(crate) async fn take(mut session: Session, scope: Scope) -> anyhow::Result<Self> {
        session.set_deadline(STATEMENT_DEADLINE);
        sqlx::raw_sql(
            "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET jit = off; SET work_mem = '64MB';
             SET client_min_messages = warning",
        )
        .execute(&mut session)
        .await
        .context("cannot configure the session")?;
        sqlx::raw_sql(TABLES).execute(&mut session).await.context("cannot create temporary tables")?;
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(&mut session).await?;
        sqlx::raw_sql(partitions::LOCK)
            .execute(&mut session)
            .await
            .context("cannot lock the ledger and the delivery log; do the schemas lead_state and webhooks exist?")?;
        let row = sqlx::query(
            "SELECT stream_created_at, generation, epoch, last_sequence, last_index, announced_epoch, announced_sequence,
                    announced_index
             FROM lead_state.checkpoints WHERE stream = $1",
        )
        .bind(contract::streams::LEAD_COMMANDS)
        .fetch_optional(&mut session)
        .await
        .context("cannot read the checkpoint; does the schema lead_state exist?")?;
        let checkpoint = match row {
            None => None,
            Some(row) => Some(Checkpoint {
                stream_created_at: row.try_get(0)?,
                generation: row.try_get(1)?,
                epoch: row.try_get(2)?,
                last_sequence: row.try_get(3)?,
                last_index: row.try_get(4)?,
                announced_epoch: row.try_get(5)?,
                announced_sequence: row.try_get(6)?,
                announced_index: row.try_get(7)?,
            }),
        };
        Ok(Self { session, scope, checkpoint })
    }

    pub(crate) async fn insert_entries(&mut self, entries: &[Entry]) -> anyhow::Result<()> {
        let seqs: Vec<_> =
            entries.iter().map(|entry| position(entry.sequence as i64, entry.index.cast_signed())).collect();
        let kinds: Vec<_> = entries
            .iter()
            .map(|entry| match entry.kind {
                EntryKind::Update(..) => "update",
                EntryKind::Expiry => "expiry",
                EntryKind::Unreadable => "dead",
            })
            .collect();
        let ids = |of: fn(&(ObjectId, ObjectId)) -> ObjectId| -> Vec<_> {
            let id = |entry: &Entry| match &entry.kind {
                EntryKind::Update(project_id, update_id) => Some(*of(&(*project_id, *update_id)).as_bytes()),
                EntryKind::Expiry | EntryKind::Unreadable => None,
            };
            entries.iter().map(id).collect()
        };
        sqlx::query(
            "INSERT INTO audit_entries
             SELECT * FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::bytea[], $5::timestamptz[])",
        )
        .bind(seqs)
        .bind(kinds)
        .bind(ids(|ids| ids.0))
        .bind(ids(|ids| ids.1))
        .bind(entries.iter().map(|entry| entry.logged_at.into()).collect::<Vec<OffsetDateTime>>())
        .execute(&mut self.session)
        .await
        .context("cannot store log entries")?;
        Ok(())
    }

    pub(crate) async fn insert_events(&mut self, events: &[Event]) -> anyhow::Result<()> {
        sqlx::query(
            "INSERT INTO audit_events
             SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::timestamptz[], $5::int[])",
        )
        .bind(events.iter().map(|event| event.sequence as i64).collect::<Vec<_>>())
        .bind(events.iter().map(|event| *event.project_id.as_bytes()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| *event.update_id.as_bytes()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.published_at.into()).collect::<Vec<OffsetDateTime>>())
        .bind(events.iter().map(|event| event.generation).collect::<Vec<_>>())
        .execute(&mut self.session)
        .await
        .context("cannot store events")?;
        Ok(())
    }

    pub(crate) async fn insert_dead_letters(&mut self, origins: &[DeadLetterOrigin]) -> anyhow::Result<()> {
        let row = |origin: &DeadLetterOrigin| match origin {
            DeadLetterOrigin::Commands(EventPosition { log: LogPosition { epoch, sequence, index }, .. }) => {
                ("commands", *epoch, position(*sequence as i64, index.cast_signed()))
            }
            DeadLetterOrigin::Events(sequence) => ("events", 0, *sequence as i64),
        };
        let rows: Vec<_> = origins.iter().map(row).collect();
        sqlx::query("INSERT INTO audit_dead_letters SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[])")
            .bind(rows.iter().map(|row| row.0).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.1).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.2).collect::<Vec<_>>())
            .execute(&mut self.session)
            .await
            .context("cannot store dead letters")?;
        Ok(())
    }

    /// Fills the tables that the invariants compare.
    pub(crate) async fn prepare(&mut self, bounds: StreamBounds) -> anyhow::Result<()> {
        let connection = &mut self.session;
        let ledger_since = ids_complete_since(connection, "lead_state.lead_updates").await?;
        let deliveries = ids_complete_since(connection, "webhooks.deliveries").await?;
        let deliveries_since = deliveries.max(ids_complete_since(connection, "webhooks.attempts").await?);
        let checkpoint = self.checkpoint.clone().unwrap_or_default();
        let last_seq = position(checkpoint.last_sequence, checkpoint.last_index);
        // Another stream contains no applied entries, and no entries to compare with.
        let (applied_seq, log_first) =
            if bounds.is_checkpoint_stream { (last_seq, position(bounds.log_first as i64, 0)) } else { (0, i64::MAX) };
        sqlx::query(
            "INSERT INTO audit_facts
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,
                     $18, webhooks.id_prefix($19))",
        )
        .bind(self.scope.from.map(OffsetDateTime::from))
        .bind(self.scope.to.map(OffsetDateTime::from))
        .bind(self.scope.project_id.map(|id| *id.as_bytes()))
        .bind(checkpoint.epoch)
        .bind(last_seq)
        .bind(checkpoint.generation)
        .bind(checkpoint.announced_epoch)
        .bind(position(checkpoint.announced_sequence, checkpoint.announced_index))
        .bind(applied_seq)
        .bind(log_first)
        // Includes all commands of the last message.
        .bind(position(bounds.log_last as i64 + 1, 0) - 1)
        .bind(bounds.log_complete)
        .bind(OffsetDateTime::from(bounds.letters_since))
        .bind(bounds.acked as i64)
        .bind(bounds.events_first as i64)
        .bind(bounds.events_overtaken)
        .bind(OffsetDateTime::from(ledger_since))
        .bind(OffsetDateTime::from(rows_complete_since(ledger_since, clock::now())))
        .bind(OffsetDateTime::from(deliveries_since))
        .execute(&mut *connection)
        .await
        .context("cannot store the state of the streams")?;
        sqlx::query(ROWS_IN_SCOPE).execute(&mut *connection).await.context("cannot read the ledger")?;
        if self.scope.from.is_some() || self.scope.to.is_some() {
            sqlx::raw_sql("ANALYZE audit_rows").execute(&mut *connection).await?;
            sqlx::query(OTHER_ROWS_OF_LEADS).execute(&mut *connection).await.context("cannot read the ledger")?;
        }
        sqlx::query(QUEUED).execute(&mut *connection).await.context("cannot read the queued updates")?;
        sqlx::query(CALLBACKS).execute(&mut *connection).await.context("cannot read the processes")?;
        sqlx::query(OCCURRENCES)
            .execute(&mut *connection)
            .await
            .context("cannot derive the events of the ledger rows")?;
        let analyze = "ANALYZE audit_rows; ANALYZE audit_entries; ANALYZE audit_events; ANALYZE audit_dead_letters;
                       ANALYZE audit_callbacks; ANALYZE audit_facts; ANALYZE audit_queued;
                       ANALYZE audit_occurrences";
        sqlx::raw_sql(analyze).execute(&mut *connection).await?;
        sqlx::query(MISSING_DELIVERIES)
            .bind(CHANGE_GRACE)
            .execute(&mut *connection)
            .await
            .context("cannot compare the events with the deliveries")?;
        Ok(())
    }

    /// Counts the updates. The `unaccounted` ones were accepted as well.
    pub(crate) async fn count_updates(&mut self, unaccounted: i64) -> anyhow::Result<UpdateCounts> {
        let (succeeded, failed, behind, queued, duplicates, dead_letters): (i64, i64, i64, i64, i64, i64) =
            sqlx::query_as(COUNT_UPDATES).fetch_one(&mut self.session).await.context("cannot count the updates")?;
        let pending = behind + queued;
        let accepted = succeeded + failed + pending + unaccounted;
        Ok(UpdateCounts { accepted, succeeded, failed, pending, queued, duplicates, dead_letters })
    }

    pub(crate) async fn count_deliveries(&mut self) -> anyhow::Result<Vec<CallbackCounts>> {
        type Row = (String, Option<String>, i64, i64, i64, i64, i64);
        let rows: Vec<Row> = sqlx::query_as(COUNT_DELIVERIES)
            .fetch_all(&mut self.session)
            .await
            .context("cannot count the deliveries")?;
        let counts = rows.into_iter().map(|(callback_id, name, delivered, exhausted, pending, parked, undelivered)| {
            let announced = delivered + exhausted + pending + parked + undelivered;
            CallbackCounts { callback_id, name, announced, delivered, exhausted, pending, parked }
        });
        Ok(counts.collect())
    }

    /// The parked events of each project.
    pub(crate) async fn count_parked(&mut self) -> anyhow::Result<Vec<ParkedCounts>> {
        let rows: Vec<(String, i64)> = sqlx::query_as(COUNT_PARKED)
            .fetch_all(&mut self.session)
            .await
            .context("cannot count the parked events")?;
        Ok(rows.into_iter().map(|(project_id, events)| ParkedCounts { project_id, events }).collect())
    }

    /// Checks an invariant: the number of violations, and at most `limit` of them.
    pub(crate) async fn violations(
        &mut self,
        invariant: &Invariant,
        limit: Option<i64>,
    ) -> anyhow::Result<(i64, Vec<Violation>)> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as(invariant.sql)
            .bind(limit)
            .fetch_all(&mut self.session)
            .await
            .with_context(|| format!("cannot check the invariant {}", invariant.name))?;
        let count = rows.first().map_or(0, |(_, _, count)| *count);
        Ok((count, rows.into_iter().map(|(id, fault, _)| Violation { id, fault }).collect()))
    }

    /// Counts the rows that could not be checked.
    pub(crate) async fn unchecked(&mut self) -> anyhow::Result<Vec<Unchecked>> {
        let mut unchecked = Vec::new();
        for exemption in &EXEMPTIONS {
            let count: i64 = sqlx::query_scalar(exemption.sql).fetch_one(&mut self.session).await?;
            if count > 0 {
                unchecked.push(Unchecked { invariant: exemption.invariant, count, reason: exemption.reason });
            }
        }
        Ok(unchecked)
    }
}

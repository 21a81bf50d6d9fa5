//! What the audit asks Postgres, all of it in one snapshot.
//!
//! What was read of the streams goes into temporary tables beside the snapshot, so that a law is one statement over
//! sets, and neither side holds a million rows in memory. The tables are made before the transaction, which is read-only
//! for everything else. The macros that check queries at compile time know no temporary tables: tests break each law
//! by hand instead (`tests/audit.rs`).

use std::time::Duration;

use anyhow::Context;
use contract::{
    ObjectId, Timestamp,
    position::{EventPosition, LogPosition},
};
use serde::Serialize;
use sqlx::{Connection, PgConnection, Row};
use time::OffsetDateTime;

use super::streams::{Entry, EntryKind, Event, Letter, Origin};

/// How long a new configuration may take to reach every webhook-notifier. What was applied sooner after a change may
/// have been told by the configuration before.
const CHANGE_GRACE: Duration = Duration::from_secs(5);

/// What is audited.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scope {
    /// Logged at or after this.
    pub(crate) from: Option<Timestamp>,
    /// Logged before this.
    pub(crate) to: Option<Timestamp>,
    /// Of this project.
    pub(crate) project_id: Option<ObjectId>,
}

impl Scope {
    /// Whether something logged at this time is in it.
    pub(crate) fn holds(&self, at: Timestamp) -> bool {
        self.from.is_none_or(|from| at >= from) && self.to.is_none_or(|to| at < to)
    }
}

/// How far the log was applied and announced.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Checkpoint {
    #[serde(skip)]
    pub(crate) stream_created_at: String,
    pub(crate) generation: i32,
    pub(crate) epoch: i32,
    pub(crate) last_seq: i64,
    pub(crate) published_epoch: i32,
    pub(crate) published_seq: i64,
}

/// What was seen of the streams, and when: see [`super::run`] for the order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// Whether the log is the one that the checkpoint is of.
    pub(crate) log_is_ours: bool,
    /// The first sequence that the log still held when it had been read.
    pub(crate) log_first: u64,
    /// The last sequence of the log.
    pub(crate) log_last: u64,
    /// Whether nothing is missing between the two.
    pub(crate) log_whole: bool,
    /// Whether no dead letter was ever removed.
    pub(crate) letters_whole: bool,
    /// The last event that was acked, like all before it, when the snapshot was taken.
    pub(crate) acked: u64,
    /// The first event that the stream still held when it had been read.
    pub(crate) events_first: u64,
    /// Whether events were purged that may have been acked after the snapshot was taken.
    pub(crate) events_overtaken: bool,
}

/// One thing that breaks a law.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Offender {
    /// The update, delivery (`updateId/callbackId`), lead or stream.
    pub(crate) id: String,
    /// What is wrong with it.
    pub(crate) fault: String,
}

/// What became of the updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Updates {
    pub(crate) accepted: i64,
    pub(crate) succeeded: i64,
    pub(crate) failed: i64,
    /// In the log behind the checkpoint, or held.
    pub(crate) pending: i64,
    /// Held until a call ends.
    pub(crate) held: i64,
    /// Entries of the log that repeat an update.
    pub(crate) duplicates: i64,
    pub(crate) dead_letters: i64,
}

/// What became of what a callback was to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Told {
    pub(crate) callback_id: String,
    /// Null when it is not in the configuration any more.
    pub(crate) name: Option<String>,
    pub(crate) announced: i64,
    pub(crate) delivered: i64,
    pub(crate) exhausted: i64,
    /// Waiting for another attempt, or announced and not dispatched yet.
    pub(crate) pending: i64,
}

/// What cannot be decided, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Undecided {
    pub(crate) law: &'static str,
    pub(crate) count: i64,
    pub(crate) why: &'static str,
}

/// A law of the audit.
pub(crate) struct Law {
    /// Its name, stable.
    pub(crate) name: &'static str,
    /// What it says.
    pub(crate) says: &'static str,
    /// Who breaks it: id, fault, and how many there are in all; at most `$1` of them.
    sql: &'static str,
}

const TABLES: &str = "
    CREATE TEMP TABLE audit_facts (
        from_time timestamptz, to_time timestamptz, project_id bytea,
        epoch int NOT NULL, last_seq bigint NOT NULL, generation int NOT NULL, published_epoch int NOT NULL,
        published_seq bigint NOT NULL,
        applied_seq bigint NOT NULL, log_first bigint NOT NULL, log_last bigint NOT NULL, log_whole boolean NOT NULL,
        letters_whole boolean NOT NULL, acked bigint NOT NULL, events_first bigint NOT NULL, overtaken boolean NOT NULL,
        ledger_since timestamptz NOT NULL, deliveries_since bytea NOT NULL);
    -- The ledger within the scope, and of the leads in it the rest of what succeeded.
    CREATE TEMP TABLE audit_rows (
        project_id bytea, update_id bytea, epoch int, log_seq bigint, lead_id bytea, process_id bytea, success boolean,
        from_state text, to_state text, version bigint, applied_at timestamptz, in_scope boolean,
        -- Where it was decided: at its own place, or where the call ended that held it.
        at_epoch int, at_seq bigint);
    CREATE TEMP TABLE audit_held (
        project_id bytea, update_id bytea, lead_id bytea, epoch int, log_seq bigint, in_scope boolean);
    CREATE TEMP TABLE audit_entries (seq bigint, kind text, project_id bytea, update_id bytea);
    CREATE TEMP TABLE audit_events (
        seq bigint, project_id bytea, update_id bytea, published_at timestamptz, generation int);
    CREATE TEMP TABLE audit_letters (origin text, epoch int, seq bigint);
    CREATE TEMP TABLE audit_callbacks (
        callback_id bytea, project_id bytea, process_id bytea, name text, wants_succeeded boolean, wants_failed boolean,
        known_since timestamptz);
    -- Announced updates that a callback wants and has no delivery of.
    CREATE TEMP TABLE audit_wanted (update_id bytea, callback_id bytea, verdict text);
";

/// The month of a table's oldest partition: what is older may have been dropped.
const OLDEST_PARTITION: &str = r"
    SELECT coalesce(min(to_date(substring(c.relname FROM '\d{4}_\d{2}$'), 'YYYY_MM')::timestamp AT TIME ZONE 'UTC'),
                    to_timestamp(0))
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = $1::regclass AND c.relname ~ '_\d{4}_\d{2}$'";

const ROWS: &str = "
    INSERT INTO audit_rows
    SELECT u.project_id, u.update_id, u.log_epoch, u.log_sequence, u.lead_id, coalesce(u.process_id, ''), u.success,
           u.from_state, u.to_state, u.version, u.applied_at, true, coalesce(u.decided_epoch, u.log_epoch),
           coalesce(u.decided_sequence, u.log_sequence)
    FROM lead_state.lead_updates u, audit_facts f
    WHERE (f.from_time IS NULL OR u.logged_at >= f.from_time) AND (f.to_time IS NULL OR u.logged_at < f.to_time)
      AND (f.project_id IS NULL OR u.project_id = f.project_id)";

const OTHER_ROWS: &str = "
    INSERT INTO audit_rows
    SELECT u.project_id, u.update_id, u.log_epoch, u.log_sequence, u.lead_id, coalesce(u.process_id, ''), u.success,
           u.from_state, u.to_state, u.version, u.applied_at, false, coalesce(u.decided_epoch, u.log_epoch),
           coalesce(u.decided_sequence, u.log_sequence)
    FROM lead_state.lead_updates u
    WHERE u.success AND u.lead_id IN (SELECT lead_id FROM audit_rows WHERE success)
      AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = u.project_id AND r.update_id = u.update_id)";

const HELD: &str = "
    INSERT INTO audit_held
    SELECT h.project_id, h.update_id, h.lead_id, h.log_epoch, h.log_sequence,
           (f.from_time IS NULL OR h.logged_at >= f.from_time) AND (f.to_time IS NULL OR h.logged_at < f.to_time)
               AND (f.project_id IS NULL OR h.project_id = f.project_id)
    FROM lead_state.queued_updates h, audit_facts f";

const CALLBACKS: &str = r#"
    INSERT INTO audit_callbacks
    SELECT decode(c->>'callbackId', 'hex'), p.project_id, coalesce(p.process_id, ''), c->>'name',
           enabled AND coalesce(events ? 'update.succeeded', true), enabled AND coalesce(events ? 'update.failed', true),
           CASE WHEN p.projected_revision = p.revision THEN p.changed_at ELSE 'infinity' END
    FROM lead_state.processes p, audit_facts f, json_array_elements(p.config->'callbacks') c,
         LATERAL (SELECT coalesce((c->>'enabled')::boolean, true) AS enabled,
                         nullif((c->'events')::jsonb, 'null') AS events) AS wish
    WHERE f.project_id IS NULL OR p.project_id = f.project_id"#;

const WANTED: &str = "
    INSERT INTO audit_wanted
    SELECT r.update_id, c.callback_id,
           CASE WHEN v.seq > f.acked THEN 'pending'
                WHEN v.seq IS NULL AND f.overtaken THEN 'overtaken'
                WHEN r.applied_at < c.known_since + $1 THEN 'changed'
                WHEN r.update_id < f.deliveries_since THEN 'dropped'
                WHEN EXISTS (SELECT FROM audit_letters l WHERE l.origin = 'events' AND l.seq = v.seq) THEN 'letter'
                ELSE 'untold' END
    FROM audit_facts f
    CROSS JOIN audit_rows r
    JOIN audit_callbacks c ON c.project_id = r.project_id AND c.process_id = r.process_id
        AND CASE WHEN r.success THEN c.wants_succeeded ELSE c.wants_failed END
    -- Announced again, it is told again: the last time counts.
    LEFT JOIN (SELECT project_id, update_id, max(seq) AS seq FROM audit_events GROUP BY 1, 2) v
        ON v.project_id = r.project_id AND v.update_id = r.update_id
    WHERE r.in_scope AND ((r.at_epoch, r.at_seq) <= (f.published_epoch, f.published_seq) OR v.seq IS NOT NULL)
      AND NOT EXISTS (SELECT FROM webhooks.deliveries d
                      WHERE d.update_id = r.update_id AND d.callback_id = c.callback_id)";

const UPDATES: &str = "
    SELECT
        (SELECT count(*) FROM audit_rows WHERE in_scope AND success),
        (SELECT count(*) FROM audit_rows WHERE in_scope AND NOT success),
        (SELECT count(*) FROM (
            SELECT DISTINCT e.project_id, e.update_id FROM audit_entries e, audit_facts f
            WHERE e.kind = 'update' AND e.seq > f.applied_seq AND NOT EXISTS (
                SELECT FROM lead_state.lead_updates u WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
              AND NOT EXISTS (SELECT FROM audit_held h WHERE h.project_id = e.project_id AND h.update_id = e.update_id)
        ) AS waiting),
        (SELECT count(*) FROM audit_held WHERE in_scope),
        (SELECT count(*) FROM audit_entries e, audit_facts f
         WHERE e.kind = 'update' AND e.seq <= f.applied_seq
           AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.epoch = f.epoch AND r.log_seq = e.seq
                             AND r.project_id = e.project_id AND r.update_id = e.update_id)
           AND (EXISTS (SELECT FROM lead_state.lead_updates u
                        WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
                OR EXISTS (SELECT FROM audit_held h WHERE h.project_id = e.project_id AND h.update_id = e.update_id
                             AND (h.epoch, h.log_seq) <> (f.epoch, e.seq)))),
        (SELECT count(*) FROM audit_letters)";

const TOLD: &str = "
    SELECT encode(callback_id, 'hex'), max(c.name), sum(delivered)::bigint, sum(exhausted)::bigint, sum(pending)::bigint,
           sum(untold)::bigint
    FROM (
        SELECT d.callback_id, count(*) FILTER (WHERE d.status = 'delivered') AS delivered,
               count(*) FILTER (WHERE d.status = 'exhausted') AS exhausted,
               count(*) FILTER (WHERE d.status = 'pending') AS pending, 0 AS untold
        FROM webhooks.deliveries d
        JOIN audit_rows r ON r.update_id = d.update_id AND r.project_id = d.project_id AND r.in_scope
        GROUP BY d.callback_id
        UNION ALL
        SELECT callback_id, 0, 0, count(*) FILTER (WHERE verdict = 'pending'), count(*) FILTER (WHERE verdict = 'untold')
        FROM audit_wanted GROUP BY callback_id
    ) AS parts
    LEFT JOIN audit_callbacks c USING (callback_id)
    GROUP BY callback_id ORDER BY max(c.name), callback_id";

/// Why something cannot be decided: the law, the number, the reason.
const UNDECIDED: [(&str, &str, &str); 6] = [
    (
        "unlogged",
        "SELECT count(*) FROM audit_rows r, audit_facts f
         WHERE r.in_scope AND (r.epoch < f.epoch OR r.log_seq < f.log_first)",
        "ledger rows whose command has left the log were not compared with it",
    ),
    (
        "unaccounted",
        "SELECT count(*) FROM audit_entries e, audit_facts f
         WHERE e.kind = 'dead' AND e.seq <= f.applied_seq AND NOT f.letters_whole
           AND NOT EXISTS (SELECT FROM audit_letters l
                           WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq)",
        "entries that cannot be read have no dead letter, but dead letters were removed",
    ),
    (
        "unlogged",
        "SELECT count(*) FROM audit_rows r, audit_facts f
         WHERE r.in_scope AND r.epoch = f.epoch AND r.log_seq <= f.applied_seq AND NOT f.letters_whole
           AND EXISTS (SELECT FROM audit_entries e
                       WHERE e.kind = 'update' AND e.project_id = r.project_id AND e.update_id = r.update_id
                         AND e.seq < r.log_seq
                         AND NOT EXISTS (SELECT FROM audit_letters l
                                         WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq))",
        "they were applied at their repetition, and the first may be a dead letter, but dead letters were removed",
    ),
    (
        "untold",
        "SELECT count(*) FROM audit_wanted WHERE verdict = 'changed'",
        "the configuration of the callback changed since, so it may not have wanted them",
    ),
    (
        "untold",
        "SELECT count(*) FROM audit_wanted WHERE verdict = 'dropped'",
        "they are older than the oldest month of the delivery log",
    ),
    (
        "untold",
        "SELECT count(*) FROM audit_wanted WHERE verdict = 'overtaken'",
        "their events were purged while they were being looked at; audit again",
    ),
];

/// The laws, in the order of the flow.
pub(crate) const LAWS: [Law; 10] = [
    Law {
        name: "unaccounted",
        says: "every update in the log up to the checkpoint has a ledger row or a dead letter, or is held",
        sql: "
            SELECT coalesce(encode(e.update_id, 'hex'), 'LEAD_COMMANDS/' || e.seq),
                   format('log entry %s has neither a ledger row nor a dead letter', e.seq), count(*) OVER ()
            FROM audit_entries e, audit_facts f
            WHERE e.seq <= f.applied_seq AND (e.kind = 'update' OR e.kind = 'dead' AND f.letters_whole)
              AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = e.project_id AND r.update_id = e.update_id)
              AND NOT EXISTS (SELECT FROM audit_letters l
                              WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq)
              AND NOT EXISTS (SELECT FROM audit_held h WHERE h.project_id = e.project_id AND h.update_id = e.update_id)
              -- A repetition of an update outside of the scope.
              AND NOT EXISTS (SELECT FROM lead_state.lead_updates u
                              WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
            ORDER BY e.seq LIMIT $1",
    },
    Law {
        name: "unlogged",
        says: "every ledger row is what the log holds at its place, and no other row has that place",
        sql: "
            SELECT encode(update_id, 'hex'), fault, count(*) OVER () FROM (
                SELECT r.epoch, r.log_seq, r.update_id,
                       format('its command is not log entry %s', r.log_seq) AS fault
                FROM audit_rows r, audit_facts f
                WHERE r.in_scope AND r.epoch = f.epoch AND r.log_seq BETWEEN f.log_first AND f.log_last
                  AND NOT EXISTS (SELECT FROM audit_entries e
                                  WHERE e.seq = r.log_seq AND e.kind = 'update'
                                    AND e.project_id = r.project_id AND e.update_id = r.update_id)
                  AND (f.log_whole OR EXISTS (SELECT FROM audit_entries e WHERE e.seq = r.log_seq))
                UNION ALL
                SELECT s.epoch, s.log_seq, s.update_id, format('log entry %s has several rows', s.log_seq)
                FROM (SELECT r.*, count(*) OVER (PARTITION BY epoch, log_seq) AS rows FROM audit_rows r) s
                WHERE s.in_scope AND s.rows > 1
                UNION ALL
                SELECT r.epoch, r.log_seq, r.update_id,
                       format('log entry %s was passed over for its repetition at %s', min(e.seq), r.log_seq)
                FROM audit_rows r JOIN audit_entries e USING (project_id, update_id), audit_facts f
                WHERE r.in_scope AND e.kind = 'update' AND r.epoch = f.epoch AND e.seq < r.log_seq
                  AND r.log_seq <= f.applied_seq
                  -- What the database refused at first, and took when its dead letter was sent again.
                  AND f.letters_whole AND NOT EXISTS (SELECT FROM audit_letters l
                                  WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq)
                GROUP BY r.epoch, r.log_seq, r.update_id
            ) AS offenders ORDER BY epoch, log_seq LIMIT $1",
    },
    Law {
        name: "misheld",
        says: "what is held has no ledger row and a call that holds it, and no later update of its lead went before it",
        sql: "
            SELECT encode(update_id, 'hex'), fault, count(*) OVER () FROM (
                SELECT h.update_id, 'it is held, and in the ledger' AS fault FROM audit_held h
                WHERE h.in_scope AND EXISTS (SELECT FROM lead_state.lead_updates u
                                             WHERE u.project_id = h.project_id AND u.update_id = h.update_id)
                UNION ALL
                SELECT h.update_id, format('no call with lead %s holds it', encode(h.lead_id, 'hex')) FROM audit_held h
                WHERE h.in_scope AND NOT EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = h.lead_id)
                UNION ALL
                SELECT h.update_id, format('it is held since log entry %s; the checkpoint is at %s', h.log_seq, f.last_seq)
                FROM audit_held h, audit_facts f WHERE h.in_scope AND (h.epoch, h.log_seq) > (f.epoch, f.last_seq)
                UNION ALL
                SELECT h.update_id, format('a later update of lead %s went before it', encode(h.lead_id, 'hex'))
                FROM audit_held h
                WHERE h.in_scope AND EXISTS (SELECT FROM lead_state.lead_updates u
                                             WHERE u.lead_id = h.lead_id AND u.success
                                               AND (u.log_epoch, u.log_sequence) > (h.epoch, h.log_seq))
            ) AS offenders ORDER BY 1 LIMIT $1",
    },
    Law {
        name: "out_of_order",
        says: "the updates of a lead follow one another in log order: versions without gap, each from the state before",
        sql: "
            SELECT encode(s.update_id, 'hex'),
                   format('lead %s: version %s from %s follows version %s in %s', encode(s.lead_id, 'hex'), s.version,
                          s.from_state, coalesce(s.version_before, 1), coalesce(s.state_before, 'its first state')),
                   count(*) OVER ()
            FROM (SELECT r.*, lag(version) OVER log AS version_before, lag(to_state) OVER log AS state_before
                  FROM audit_rows r WHERE success
                  WINDOW log AS (PARTITION BY lead_id ORDER BY epoch, log_seq)) s
            LEFT JOIN lead_state.leads l USING (lead_id), audit_facts f
            WHERE s.in_scope
              AND (s.version <> 1 + coalesce(s.version_before,
                                             -- The first row of a lead that is younger than the ledger.
                                             CASE WHEN l.created_at >= f.ledger_since THEN 1 ELSE s.version - 1 END)
                   OR s.from_state IS DISTINCT FROM coalesce(s.state_before, s.from_state))
            ORDER BY s.epoch, s.log_seq LIMIT $1",
    },
    Law {
        name: "lead_differs",
        says: "every lead stands where its last successful update left it",
        sql: "
            SELECT encode(lead_id, 'hex'), fault, count(*) OVER () FROM (
                SELECT s.lead_id, CASE WHEN l.lead_id IS NULL THEN 'it does not exist' ELSE
                    format('it is at version %s in %s, its last update at version %s in %s', l.version, l.state,
                           s.version, s.to_state) END AS fault
                FROM (SELECT DISTINCT ON (lead_id) lead_id, version, to_state FROM audit_rows WHERE success
                      ORDER BY lead_id, epoch DESC, log_seq DESC) s
                LEFT JOIN lead_state.leads l USING (lead_id)
                WHERE l.version IS DISTINCT FROM s.version OR l.state IS DISTINCT FROM s.to_state
                UNION ALL
                SELECT l.lead_id, format('it is at version %s, and no update in the ledger succeeded', l.version)
                FROM lead_state.leads l, audit_facts f
                WHERE l.version <> 1 AND l.created_at >= f.ledger_since AND f.from_time IS NULL AND f.to_time IS NULL
                  AND (f.project_id IS NULL OR l.project_id = f.project_id)
                  -- Distinct first: one pass over the rows, not one for each lead.
                  AND NOT EXISTS (SELECT FROM (SELECT DISTINCT lead_id FROM audit_rows WHERE success) r
                                  WHERE r.lead_id = l.lead_id)
            ) AS offenders ORDER BY 1 LIMIT $1",
    },
    Law {
        name: "beyond_checkpoint",
        says: "no ledger row is beyond the checkpoint, and the log reaches up to it",
        sql: "
            SELECT id, fault, count(*) OVER () FROM (
                SELECT encode(r.update_id, 'hex') AS id,
                       format('epoch %s entry %s; the checkpoint is at epoch %s entry %s', r.at_epoch, r.at_seq, f.epoch,
                              f.last_seq) AS fault
                FROM audit_rows r, audit_facts f
                WHERE r.in_scope AND (r.at_epoch > f.epoch OR r.at_epoch = f.epoch AND r.at_seq > f.last_seq)
                UNION ALL
                SELECT 'LEAD_COMMANDS', 'it is not the log that the checkpoint is of' FROM audit_facts f
                WHERE f.applied_seq < f.last_seq
                UNION ALL
                SELECT 'LEAD_COMMANDS', format('it ends at %s, but %s was applied', f.log_last, f.last_seq)
                FROM audit_facts f WHERE f.applied_seq = f.last_seq AND f.log_last < f.last_seq
                UNION ALL
                SELECT 'checkpoint', format('%s was announced, but only %s applied', f.published_seq, f.last_seq)
                FROM audit_facts f
                WHERE (f.published_epoch, f.published_seq) > (f.epoch, f.last_seq)
            ) AS offenders ORDER BY 1 LIMIT $1",
    },
    Law {
        name: "unannounced",
        says: "every row up to published_seq whose event cannot have been purged yet is in LEAD_EVENTS",
        sql: "
            WITH start AS (
                SELECT r.at_epoch, r.at_seq FROM audit_events v JOIN audit_rows r USING (project_id, update_id), audit_facts f
                WHERE v.seq >= f.events_first
                  -- What is announced again follows later ones: where the stream was purged it says nothing about those.
                  AND (f.events_first <= 1 OR v.published_at < r.applied_at + interval '120 s')
                ORDER BY v.seq LIMIT 1),
            -- Announcements that are taken back begin again behind what was told: the stream may have lost what is before.
            taken_back AS (
                SELECT r.at_epoch, r.at_seq FROM audit_events v JOIN audit_rows r USING (project_id, update_id), audit_facts f
                WHERE v.generation = f.generation ORDER BY 1, 2 LIMIT 1)
            SELECT encode(r.update_id, 'hex'), format('log entry %s, published_seq %s', r.at_seq, f.published_seq),
                   count(*) OVER ()
            FROM audit_rows r, audit_facts f, start s
            WHERE r.in_scope AND (r.at_epoch, r.at_seq) >= (s.at_epoch, s.at_seq)
              AND (r.at_epoch, r.at_seq) <= (f.published_epoch, f.published_seq)
              AND (f.generation = 0 OR (r.at_epoch, r.at_seq) >= (SELECT t.at_epoch, t.at_seq FROM taken_back t))
              AND NOT EXISTS (SELECT FROM audit_events v
                              WHERE v.project_id = r.project_id AND v.update_id = r.update_id)
            ORDER BY r.at_epoch, r.at_seq LIMIT $1",
    },
    Law {
        name: "untold",
        says: "every event that the webhook-notifier acked has a delivery for each callback that wanted it",
        sql: "
            SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex'), 'it has no delivery', count(*) OVER ()
            FROM audit_wanted WHERE verdict = 'untold' ORDER BY update_id, callback_id LIMIT $1",
    },
    Law {
        name: "unfounded",
        says: "nothing is delivered that was never announced",
        sql: "
            SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex'), fault, count(*) OVER () FROM (
                SELECT d.update_id, d.callback_id, 'the ledger does not know the update' AS fault
                FROM webhooks.deliveries d, audit_facts f
                WHERE (f.from_time IS NULL OR d.created_at >= f.from_time) AND (f.to_time IS NULL OR d.created_at < f.to_time)
                  AND (f.project_id IS NULL OR d.project_id = f.project_id)
                  AND d.update_id >= webhooks.id_prefix(f.ledger_since)
                  AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = d.project_id AND r.update_id = d.update_id)
                  AND NOT EXISTS (SELECT FROM lead_state.lead_updates u
                                  WHERE u.project_id = d.project_id AND u.update_id = d.update_id)
                UNION ALL
                SELECT d.update_id, d.callback_id, format('log entry %s, published_seq %s', r.at_seq, f.published_seq)
                FROM webhooks.deliveries d JOIN audit_rows r USING (project_id, update_id), audit_facts f
                WHERE r.in_scope AND (r.at_epoch, r.at_seq) > (f.published_epoch, f.published_seq)
                  -- Announcements that were taken back were made.
                  AND f.generation = 0
                  -- Announced a moment ago: it is in the stream and will be noted. Unless it is purged by now.
                  AND f.events_first <= 1
                  AND NOT EXISTS (SELECT FROM audit_events v
                                  WHERE v.project_id = d.project_id AND v.update_id = d.update_id)
            ) AS offenders ORDER BY 1 LIMIT $1",
    },
    Law {
        name: "attempts",
        says: "attempts belong to a delivery and run from 1 to their number; what is delivered was answered with 2xx",
        sql: "
            SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex'), fault, count(*) OVER () FROM (
                SELECT d.update_id, d.callback_id,
                       format('%s of %s attempts are recorded, the last is number %s%s', coalesce(a.number, 0), d.attempts,
                              coalesce(a.last, 0),
                              CASE WHEN d.status = 'delivered' AND NOT coalesce(a.taken, false)
                                   THEN '; none was answered with 2xx' ELSE '' END) AS fault
                FROM webhooks.deliveries d
                JOIN audit_rows r ON r.update_id = d.update_id AND r.project_id = d.project_id AND r.in_scope
                CROSS JOIN audit_facts f
                LEFT JOIN (SELECT update_id, callback_id, count(*) AS number, min(number) AS first, max(number) AS last,
                                  bool_or(status_code BETWEEN 200 AND 299) AS taken
                           FROM webhooks.every_attempt GROUP BY 1, 2) a
                    ON a.update_id = d.update_id AND a.callback_id = d.callback_id
                WHERE d.update_id >= f.deliveries_since
                  AND (coalesce(a.number, 0) <> d.attempts OR coalesce(a.last, 0) <> d.attempts
                       OR coalesce(a.first, 1) <> 1 OR d.status = 'delivered' AND NOT coalesce(a.taken, false))
                UNION ALL
                -- One that stands in a delivery's row has that.
                SELECT a.update_id, a.callback_id, format('attempt %s has no delivery', a.number)
                FROM webhooks.attempts a, audit_facts f
                WHERE f.project_id IS NULL AND (f.from_time IS NULL OR a.started_at >= f.from_time)
                  AND (f.to_time IS NULL OR a.started_at < f.to_time) AND a.update_id >= f.deliveries_since
                  AND NOT EXISTS (SELECT FROM webhooks.deliveries d
                                  WHERE d.update_id = a.update_id AND d.callback_id = a.callback_id)
            ) AS offenders ORDER BY 1 LIMIT $1",
    },
];

/// A moment of both schemas, and room beside it for what was read of the streams.
pub(crate) struct Snapshot {
    connection: PgConnection,
    scope: Scope,
    /// Nothing before lead-state first led.
    pub(crate) checkpoint: Option<Checkpoint>,
}

impl Snapshot {
    /// Takes the snapshot.
    pub(crate) async fn take(mut connection: PgConnection, scope: Scope) -> anyhow::Result<Self> {
        sqlx::raw_sql(
            "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET jit = off; SET work_mem = '64MB';
             SET client_min_messages = warning",
        )
        .execute(&mut connection)
        .await
        .context("cannot prepare the session")?;
        sqlx::raw_sql(TABLES).execute(&mut connection).await.context("cannot make temporary tables")?;
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(&mut connection).await?;
        let row = sqlx::query(
            "SELECT stream_created_at, generation, epoch, last_sequence, announced_epoch, announced_sequence
             FROM lead_state.checkpoints WHERE stream = $1",
        )
        .bind(contract::streams::LEAD_COMMANDS)
        .fetch_optional(&mut connection)
        .await
        .context("cannot read the checkpoint; is the schema lead_state there?")?;
        let checkpoint = match row {
            None => None,
            Some(row) => Some(Checkpoint {
                stream_created_at: row.try_get(0)?,
                generation: row.try_get(1)?,
                epoch: row.try_get(2)?,
                last_seq: row.try_get(3)?,
                published_epoch: row.try_get(4)?,
                published_seq: row.try_get(5)?,
            }),
        };
        Ok(Self { connection, scope, checkpoint })
    }

    /// Keeps entries of the log.
    pub(crate) async fn put_entries(&mut self, entries: &[Entry]) -> anyhow::Result<()> {
        let seqs: Vec<_> = entries.iter().map(|entry| entry.sequence as i64).collect();
        let kinds: Vec<_> = entries
            .iter()
            .map(|entry| match entry.kind {
                EntryKind::Update(..) => "update",
                EntryKind::Call => "call",
                EntryKind::Dead => "dead",
            })
            .collect();
        let ids = |of: fn(&(ObjectId, ObjectId)) -> ObjectId| -> Vec<_> {
            let id = |entry: &Entry| match &entry.kind {
                EntryKind::Update(project_id, update_id) => Some(*of(&(*project_id, *update_id)).as_bytes()),
                EntryKind::Call | EntryKind::Dead => None,
            };
            entries.iter().map(id).collect()
        };
        sqlx::query(
            "INSERT INTO audit_entries SELECT * FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::bytea[])",
        )
        .bind(seqs)
        .bind(kinds)
        .bind(ids(|ids| ids.0))
        .bind(ids(|ids| ids.1))
        .execute(&mut self.connection)
        .await
        .context("cannot keep entries of the log")?;
        Ok(())
    }

    /// Keeps events.
    pub(crate) async fn put_events(&mut self, events: &[Event]) -> anyhow::Result<()> {
        sqlx::query(
            "INSERT INTO audit_events
             SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::timestamptz[], $5::int[])",
        )
        .bind(events.iter().map(|event| event.sequence as i64).collect::<Vec<_>>())
        .bind(events.iter().map(|event| *event.project_id.as_bytes()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| *event.update_id.as_bytes()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.published_at.into()).collect::<Vec<OffsetDateTime>>())
        .bind(events.iter().map(|event| event.generation).collect::<Vec<_>>())
        .execute(&mut self.connection)
        .await
        .context("cannot keep events")?;
        Ok(())
    }

    /// Keeps dead letters.
    pub(crate) async fn put_letters(&mut self, letters: &[Letter]) -> anyhow::Result<()> {
        let of = |letter: &Letter| match letter.origin {
            Origin::Commands(EventPosition { log: LogPosition { epoch, sequence, .. }, .. }) => {
                ("commands", epoch, sequence as i64)
            }
            Origin::Events(sequence) => ("events", 0, sequence as i64),
        };
        let rows: Vec<_> = letters.iter().map(of).collect();
        sqlx::query("INSERT INTO audit_letters SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[])")
            .bind(rows.iter().map(|row| row.0).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.1).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.2).collect::<Vec<_>>())
            .execute(&mut self.connection)
            .await
            .context("cannot keep dead letters")?;
        Ok(())
    }

    /// Brings together what the laws need.
    pub(crate) async fn prepare(&mut self, seen: Seen) -> anyhow::Result<()> {
        let connection = &mut self.connection;
        let oldest = async |connection: &mut PgConnection, table: &str| {
            let oldest: Result<OffsetDateTime, _> =
                sqlx::query_scalar(OLDEST_PARTITION).bind(table).fetch_one(connection).await;
            oldest.with_context(|| format!("cannot read the partitions of {table}; is its schema there?"))
        };
        let ledger_since = oldest(connection, "lead_state.lead_updates").await?;
        let deliveries = oldest(connection, "webhooks.deliveries").await?;
        let deliveries_since = deliveries.max(oldest(connection, "webhooks.attempts").await?);
        let at = self.checkpoint.clone().unwrap_or_default();
        let last_seq = at.last_seq;
        // A log that is another holds nothing that was applied, and nothing to compare with.
        let (applied_seq, log_first) = if seen.log_is_ours { (last_seq, seen.log_first as i64) } else { (0, i64::MAX) };
        sqlx::query(
            "INSERT INTO audit_facts
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,
                     webhooks.id_prefix($18))",
        )
        .bind(self.scope.from.map(OffsetDateTime::from))
        .bind(self.scope.to.map(OffsetDateTime::from))
        .bind(self.scope.project_id.map(|id| *id.as_bytes()))
        .bind(at.epoch)
        .bind(last_seq)
        .bind(at.generation)
        .bind(at.published_epoch)
        .bind(at.published_seq)
        .bind(applied_seq)
        .bind(log_first)
        .bind(seen.log_last as i64)
        .bind(seen.log_whole)
        .bind(seen.letters_whole)
        .bind(seen.acked as i64)
        .bind(seen.events_first as i64)
        .bind(seen.events_overtaken)
        .bind(ledger_since)
        .bind(deliveries_since)
        .execute(&mut *connection)
        .await
        .context("cannot keep what was seen")?;
        sqlx::query(ROWS).execute(&mut *connection).await.context("cannot read the ledger")?;
        if self.scope.from.is_some() || self.scope.to.is_some() {
            sqlx::raw_sql("ANALYZE audit_rows").execute(&mut *connection).await?;
            sqlx::query(OTHER_ROWS).execute(&mut *connection).await.context("cannot read the ledger")?;
        }
        sqlx::query(HELD).execute(&mut *connection).await.context("cannot read what is held")?;
        sqlx::query(CALLBACKS).execute(&mut *connection).await.context("cannot read the processes")?;
        let analyze = "ANALYZE audit_rows; ANALYZE audit_entries; ANALYZE audit_events; ANALYZE audit_letters;
                       ANALYZE audit_callbacks; ANALYZE audit_facts; ANALYZE audit_held";
        sqlx::raw_sql(analyze).execute(&mut *connection).await?;
        sqlx::query(WANTED)
            .bind(CHANGE_GRACE)
            .execute(&mut *connection)
            .await
            .context("cannot compare the events with the deliveries")?;
        Ok(())
    }

    /// What became of the updates; `unaccounted` are accepted as well.
    pub(crate) async fn updates(&mut self, unaccounted: i64) -> anyhow::Result<Updates> {
        let (succeeded, failed, behind, held, duplicates, dead_letters): (i64, i64, i64, i64, i64, i64) =
            sqlx::query_as(UPDATES).fetch_one(&mut self.connection).await.context("cannot count the updates")?;
        let pending = behind + held;
        let accepted = succeeded + failed + pending + unaccounted;
        Ok(Updates { accepted, succeeded, failed, pending, held, duplicates, dead_letters })
    }

    /// What became of what each callback was to be told.
    pub(crate) async fn told(&mut self) -> anyhow::Result<Vec<Told>> {
        let rows: Vec<(String, Option<String>, i64, i64, i64, i64)> =
            sqlx::query_as(TOLD).fetch_all(&mut self.connection).await.context("cannot count the deliveries")?;
        let told = rows.into_iter().map(|(callback_id, name, delivered, exhausted, pending, untold)| {
            let announced = delivered + exhausted + pending + untold;
            Told { callback_id, name, announced, delivered, exhausted, pending }
        });
        Ok(told.collect())
    }

    /// Who breaks a law: how many there are, and at most `limit` of them.
    pub(crate) async fn offenders(&mut self, law: &Law, limit: Option<i64>) -> anyhow::Result<(i64, Vec<Offender>)> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as(law.sql)
            .bind(limit)
            .fetch_all(&mut self.connection)
            .await
            .with_context(|| format!("cannot check the law {}", law.name))?;
        let count = rows.first().map_or(0, |(_, _, count)| *count);
        Ok((count, rows.into_iter().map(|(id, fault, _)| Offender { id, fault }).collect()))
    }

    /// What cannot be decided.
    pub(crate) async fn undecided(&mut self) -> anyhow::Result<Vec<Undecided>> {
        let mut undecided = Vec::new();
        for (law, sql, why) in UNDECIDED {
            let count: i64 = sqlx::query_scalar(sql).fetch_one(&mut self.connection).await?;
            if count > 0 {
                undecided.push(Undecided { law, count, why });
            }
        }
        Ok(undecided)
    }

    /// Lets go of the snapshot.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        self.connection.close().await.context("cannot disconnect from Postgres")
    }
}

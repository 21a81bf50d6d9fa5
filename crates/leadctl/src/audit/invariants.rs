//! The invariants that the audit checks, in the order of the flow.
//!
//! An invariant is one SQL statement over the snapshot's tables. Compile-time checks of queries do not know temporary
//! tables; instead, `tests/audit.rs` breaks each invariant by hand.

/// A statement that must hold for every update or delivery in the scope.
pub(crate) struct Invariant {
    /// Stable name in the JSON report.
    pub(crate) name: &'static str,
    pub(crate) statement: &'static str,
    /// Selects id, fault and total count of the violations; at most `$1` rows.
    pub(crate) sql: &'static str,
}

/// A reason why some rows could not be checked.
pub(crate) struct Exemption {
    pub(crate) invariant: &'static str,
    pub(crate) reason: &'static str,
    /// Counts the rows.
    pub(crate) sql: &'static str,
}

pub(crate) const INVARIANTS: [&Invariant; 11] = [
    &UNACCOUNTED,
    &UNLOGGED,
    &CREATION_LOST,
    &QUEUE_INCONSISTENT,
    &OUT_OF_ORDER,
    &LEAD_DIFFERS,
    &BEYOND_CHECKPOINT,
    &UNANNOUNCED,
    &UNDELIVERED,
    &UNFOUNDED,
    &ATTEMPTS,
];

/// Entries up to the checkpoint that have neither a ledger row nor a dead letter, and fulfil a condition on their age.
macro_rules! unaccounted_entries {
    ($select:literal, $age:literal, $end:literal) => {
        concat!(
            "
    SELECT ",
            $select,
            "
    FROM audit_entries e, audit_facts f
    WHERE e.seq <= f.applied_seq AND e.kind IN ('update', 'dead') AND ",
            $age,
            "
      AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = e.project_id AND r.update_id = e.update_id)
      AND NOT EXISTS (SELECT FROM audit_dead_letters l
                      WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq)
      AND NOT EXISTS (SELECT FROM audit_queued h WHERE h.project_id = e.project_id AND h.update_id = e.update_id)
      -- A duplicate of an update outside the scope.
      AND NOT EXISTS (SELECT FROM lead_state.lead_updates u
                      WHERE u.project_id = e.project_id AND u.update_id = e.update_id)
    ",
            $end
        )
    };
}

const UNACCOUNTED: Invariant = Invariant {
    name: "unaccounted",
    statement: "every update, call event and creation in the log up to the checkpoint has a ledger row or a dead letter, or is queued",
    sql: unaccounted_entries!(
        "coalesce(encode(e.update_id, 'hex'), 'LEAD_COMMANDS/' || pg_temp.entry(e.seq)),
           format('log entry %s has neither a ledger row nor a dead letter', pg_temp.entry(e.seq)), count(*) OVER ()",
        "e.logged_at >= f.letters_since",
        "ORDER BY e.seq LIMIT $1"
    ),
};

const UNLOGGED: Invariant = Invariant {
    name: "unlogged",
    statement: "every ledger row belongs to the log entry at its position, and no two rows share a position",
    sql: "
    SELECT encode(update_id, 'hex'), fault, count(*) OVER () FROM (
        SELECT r.epoch, r.log_seq, r.update_id,
               format('log entry %s is not its command', pg_temp.entry(r.log_seq)) AS fault
        FROM audit_rows r, audit_facts f
        WHERE r.in_scope AND r.epoch = f.epoch AND r.log_seq BETWEEN f.log_first AND f.log_last
          AND NOT EXISTS (SELECT FROM audit_entries e
                          WHERE e.seq = r.log_seq AND e.kind = 'update'
                            AND e.project_id = r.project_id AND e.update_id = r.update_id)
          AND (f.log_complete OR EXISTS (SELECT FROM audit_entries e WHERE e.seq = r.log_seq))
        UNION ALL
        SELECT s.epoch, s.log_seq, s.update_id, format('log entry %s has several ledger rows', pg_temp.entry(s.log_seq))
        FROM (SELECT r.*, count(*) OVER (PARTITION BY epoch, log_seq) AS rows FROM audit_rows r) s
        WHERE s.in_scope AND s.rows > 1
        UNION ALL
        SELECT r.epoch, r.log_seq, r.update_id,
               format('log entry %s was skipped, and its duplicate at %s was applied', pg_temp.entry(min(e.seq)),
                      pg_temp.entry(r.log_seq))
        FROM audit_rows r JOIN audit_entries e USING (project_id, update_id), audit_facts f
        WHERE r.in_scope AND e.kind = 'update' AND r.epoch = f.epoch AND e.seq < r.log_seq
          AND r.log_seq <= f.applied_seq
          -- A dead letter that was replayed successfully.
          AND e.logged_at >= f.letters_since AND NOT EXISTS (SELECT FROM audit_dead_letters l
                          WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq)
        GROUP BY r.epoch, r.log_seq, r.update_id
    ) AS violations ORDER BY epoch, log_seq LIMIT $1",
};

/// Leads without a creation that fulfil a condition.
macro_rules! leads_without_creation {
    ($select:literal, $condition:literal, $end:literal) => {
        concat!(
            "
    SELECT ",
            $select,
            "
    FROM (SELECT project_id, process_id, min(known_since) AS known_since FROM audit_callbacks
          WHERE 'lead.created' = ANY (events) GROUP BY 1, 2) c
    JOIN lead_state.leads l ON l.process_id = c.process_id, audit_facts f,
         -- Leads that were created just after a change may have been created by the process before it.
         LATERAL (SELECT l.created_at >= c.known_since + interval '5 s' AND l.created_at >= f.ledger_since
                      AND l.erased_at IS NULL AS is_certain) AS creation
    WHERE ",
            $condition,
            "
      AND (f.from_time IS NULL OR l.created_at >= f.from_time) AND (f.to_time IS NULL OR l.created_at < f.to_time)
      AND NOT EXISTS (SELECT FROM lead_state.created_leads w WHERE w.lead_id = l.lead_id)
      AND NOT EXISTS (SELECT FROM lead_state.lead_updates u
                      WHERE u.lead_id = l.lead_id AND u.project_id = l.project_id AND u.kind = 'lead.created')
    ",
            $end
        )
    };
}

const CREATION_LOST: Invariant = Invariant {
    name: "creation_lost",
    statement: "the creation of every lead that a callback receives is in the ledger, or waits to be logged",
    sql: leads_without_creation!(
        "encode(l.lead_id, 'hex'), 'its creation is neither in the ledger nor waits to be logged', count(*) OVER ()",
        "is_certain",
        "ORDER BY l.lead_id LIMIT $1"
    ),
};

const QUEUE_INCONSISTENT: Invariant = Invariant {
    name: "queue_inconsistent",
    statement: "a queued update has no ledger row, its lead has a call in progress, and no later update of the lead was applied",
    sql: "
    SELECT encode(update_id, 'hex'), fault, count(*) OVER () FROM (
        SELECT h.update_id, 'queued, and already in the ledger' AS fault FROM audit_queued h
        WHERE h.in_scope AND EXISTS (SELECT FROM lead_state.lead_updates u
                                     WHERE u.project_id = h.project_id AND u.update_id = h.update_id)
        UNION ALL
        SELECT h.update_id, format('queued, but lead %s has no call in progress', encode(h.lead_id, 'hex')) FROM audit_queued h
        WHERE h.in_scope AND NOT EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = h.lead_id)
        UNION ALL
        SELECT h.update_id, format('queued at log entry %s; the checkpoint is at %s', pg_temp.entry(h.log_seq),
                                    pg_temp.entry(f.last_seq))
        FROM audit_queued h, audit_facts f WHERE h.in_scope AND (h.epoch, h.log_seq) > (f.epoch, f.last_seq)
        UNION ALL
        SELECT h.update_id, format('queued, but a later update of lead %s was applied', encode(h.lead_id, 'hex'))
        FROM audit_queued h
        WHERE h.in_scope AND EXISTS (SELECT FROM lead_state.lead_updates u
                                     WHERE u.lead_id = h.lead_id AND u.success AND u.kind = 'update'
                                       AND (u.log_epoch, pg_temp.place(u.log_sequence, u.log_index)) > (h.epoch, h.log_seq))
    ) AS violations ORDER BY 1 LIMIT $1",
};

/// The updates in the scope that do not follow the one before, and fulfil a condition. Only a row that was logged after
/// the one before, or after the creation of the lead, can be missing between the two.
macro_rules! updates_out_of_order {
    ($select:literal, $condition:literal, $end:literal) => {
        concat!(
            "
    SELECT ",
            $select,
            "
    FROM (SELECT r.*, lag(version) OVER log AS version_before, lag(to_state) OVER log AS state_before,
                 lag(logged_at) OVER log AS logged_before
          FROM audit_rows r WHERE changes
          WINDOW log AS (PARTITION BY lead_id ORDER BY epoch, log_seq)) s
    LEFT JOIN lead_state.leads l USING (lead_id), audit_facts f,
         LATERAL (SELECT s.version > 1 + coalesce(s.version_before, 1) AS is_behind_gap) AS gap,
         LATERAL (SELECT is_behind_gap AND coalesce(s.logged_before, l.created_at, '-infinity') < f.rows_since
                      AS may_be_dropped) AS dropped
    WHERE s.in_scope
      AND (is_behind_gap OR s.version < 1 + coalesce(s.version_before, 1)
           OR s.from_state IS DISTINCT FROM coalesce(s.state_before, s.from_state))
      AND ",
            $condition,
            "
    ",
            $end
        )
    };
}

const OUT_OF_ORDER: Invariant = Invariant {
    name: "out_of_order",
    statement: "the updates of a lead are in log order: versions without gaps, each from the state of the previous one",
    sql: updates_out_of_order!(
        "encode(s.update_id, 'hex'),
           format('lead %s: version %s from %s follows version %s in %s', encode(s.lead_id, 'hex'), s.version,
                  s.from_state, coalesce(s.version_before, 1), coalesce(s.state_before, 'its initial state')),
           count(*) OVER ()",
        "NOT may_be_dropped",
        "ORDER BY s.epoch, s.log_seq LIMIT $1"
    ),
};

/// The leads that differ from their last row in the ledger, and fulfil a condition. Only a row that was logged after
/// the last one, or after the creation of the lead, can be missing.
macro_rules! differing_leads {
    ($select:literal, $condition:literal, $end:literal) => {
        concat!(
            "
    SELECT ",
            $select,
            "
    FROM (
        SELECT s.lead_id, CASE WHEN l.lead_id IS NULL THEN 'the lead does not exist' ELSE
            format('the lead is at version %s in %s, its last update at version %s in %s', l.version, l.state,
                   s.version, s.to_state) END AS fault,
               coalesce(l.version > s.version AND s.logged_at < f.rows_since, false) AS may_be_dropped
        FROM (SELECT DISTINCT ON (lead_id) lead_id, version, to_state, logged_at FROM audit_rows WHERE changes
              ORDER BY lead_id, epoch DESC, log_seq DESC) s
        LEFT JOIN lead_state.leads l USING (lead_id), audit_facts f
        WHERE l.version IS DISTINCT FROM s.version OR l.state IS DISTINCT FROM s.to_state
        UNION ALL
        SELECT l.lead_id, format('the lead is at version %s, but no update in the ledger succeeded', l.version),
               l.created_at < f.rows_since
        FROM lead_state.leads l, audit_facts f
        WHERE l.version <> 1 AND f.from_time IS NULL AND f.to_time IS NULL
          AND (f.project_id IS NULL OR l.project_id = f.project_id)
          -- DISTINCT first: one pass over the rows instead of one per lead.
          AND NOT EXISTS (SELECT FROM (SELECT DISTINCT lead_id FROM audit_rows WHERE changes) r
                          WHERE r.lead_id = l.lead_id)
    ) AS leads WHERE ",
            $condition,
            " ",
            $end
        )
    };
}

const LEAD_DIFFERS: Invariant = Invariant {
    name: "lead_differs",
    statement: "every lead has the version and state of its last successful update",
    sql: differing_leads!(
        "encode(lead_id, 'hex'), fault, count(*) OVER ()",
        "NOT may_be_dropped",
        "ORDER BY 1 LIMIT $1"
    ),
};

const BEYOND_CHECKPOINT: Invariant = Invariant {
    name: "beyond_checkpoint",
    statement: "no ledger row is beyond the checkpoint, and the log reaches the checkpoint",
    sql: "
    SELECT id, fault, count(*) OVER () FROM (
        SELECT encode(r.update_id, 'hex') AS id,
               format('epoch %s entry %s; the checkpoint is at epoch %s entry %s', r.at_epoch, pg_temp.entry(r.at_seq), f.epoch,
                      pg_temp.entry(f.last_seq)) AS fault
        FROM audit_rows r, audit_facts f
        WHERE r.in_scope AND (r.at_epoch > f.epoch OR r.at_epoch = f.epoch AND r.at_seq > f.last_seq)
        UNION ALL
        SELECT 'LEAD_COMMANDS', 'the checkpoint belongs to another stream' FROM audit_facts f
        WHERE f.applied_seq < f.last_seq
        UNION ALL
        SELECT 'LEAD_COMMANDS', format('the log ends at %s, but %s was applied', f.log_last >> 10, pg_temp.entry(f.last_seq))
        FROM audit_facts f WHERE f.applied_seq = f.last_seq AND f.log_last < f.last_seq
        UNION ALL
        SELECT 'checkpoint', format('announced up to %s, but applied only up to %s', pg_temp.entry(f.announced_seq),
                                    pg_temp.entry(f.last_seq))
        FROM audit_facts f
        WHERE (f.announced_epoch, f.announced_seq) > (f.epoch, f.last_seq)
    ) AS violations ORDER BY 1 LIMIT $1",
};

const UNANNOUNCED: Invariant = Invariant {
    name: "unannounced",
    statement: "every ledger row up to the announce watermark has its event in LEAD_EVENTS, unless it was purged",
    sql: "
    WITH start AS (
        SELECT r.at_epoch, r.at_seq FROM audit_events v JOIN audit_rows r USING (project_id, update_id), audit_facts f
        WHERE v.seq >= f.events_first
          -- In a purged stream, an event that was announced again, after the stream's duplicate window, says nothing about its
          -- neighbors.
          AND (f.events_first <= 1 OR v.published_at < r.applied_at + interval '30 s')
        ORDER BY v.seq LIMIT 1),
    -- After a rewind, announcements restart at the delivered watermark: the stream may lack earlier events.
    rewound AS (
        SELECT r.at_epoch, r.at_seq FROM audit_events v JOIN audit_rows r USING (project_id, update_id), audit_facts f
        WHERE v.generation = f.generation ORDER BY 1, 2 LIMIT 1)
    SELECT encode(r.update_id, 'hex'), format('log entry %s; announced up to %s', pg_temp.entry(r.at_seq), pg_temp.entry(f.announced_seq)),
           count(*) OVER ()
    FROM audit_rows r, audit_facts f, start s
    WHERE r.in_scope AND (r.at_epoch, r.at_seq) >= (s.at_epoch, s.at_seq)
      AND (r.at_epoch, r.at_seq) <= (f.announced_epoch, f.announced_seq)
      AND (f.generation = 0 OR (r.at_epoch, r.at_seq) >= (SELECT t.at_epoch, t.at_seq FROM rewound t))
      AND NOT EXISTS (SELECT FROM audit_events v
                      WHERE v.project_id = r.project_id AND v.update_id = r.update_id)
    ORDER BY r.at_epoch, r.at_seq LIMIT $1",
};

const UNDELIVERED: Invariant = Invariant {
    name: "undelivered",
    statement: "every event that webhook-notifier acked is parked or has a delivery of each kind for each subscribed callback",
    sql: "
    SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex')
               || CASE WHEN kind = 'update' THEN '' ELSE '/' || kind END, 'no delivery', count(*) OVER ()
    FROM audit_missing_deliveries WHERE verdict = 'undelivered' ORDER BY update_id, callback_id, kind LIMIT $1",
};

/// Deliveries without a ledger row, whose ids compare like this with the first id of which the ledger has the row.
macro_rules! deliveries_without_row {
    ($select:literal, $compares:literal) => {
        concat!(
            "SELECT ",
            $select,
            "
        FROM webhooks.deliveries d, audit_facts f
        WHERE (f.from_time IS NULL OR d.created_at >= f.from_time) AND (f.to_time IS NULL OR d.created_at < f.to_time)
          AND (f.project_id IS NULL OR d.project_id = f.project_id)
          AND d.update_id ",
            $compares,
            " webhooks.id_prefix(f.ledger_since)
          -- Operational events are of no update.
          AND d.kind NOT IN ('callback.failing', 'callback.disabled', 'callback.recovered', 'delivery.exhausted')
          AND NOT EXISTS (SELECT FROM audit_rows r WHERE r.project_id = d.project_id AND r.update_id = d.update_id)
          AND NOT EXISTS (SELECT FROM lead_state.lead_updates u
                          WHERE u.project_id = d.project_id AND u.update_id = d.update_id)"
        )
    };
}

const UNFOUNDED: Invariant = Invariant {
    name: "unfounded",
    statement: "every delivery belongs to an announced update",
    sql: concat!(
        "
    SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex'), fault, count(*) OVER () FROM (
        ",
        deliveries_without_row!("d.update_id, d.callback_id, 'the ledger has no such update' AS fault", ">="),
        "
        UNION ALL
        SELECT d.update_id, d.callback_id, format('log entry %s; announced up to %s', pg_temp.entry(r.at_seq), pg_temp.entry(f.announced_seq))
        FROM webhooks.deliveries d JOIN audit_rows r USING (project_id, update_id), audit_facts f
        WHERE r.in_scope AND (r.at_epoch, r.at_seq) > (f.announced_epoch, f.announced_seq)
          -- Before a rewind, such rows had been announced.
          AND f.generation = 0
          -- Announced just now: the event is in the stream, unless it was purged.
          AND f.events_first <= 1
          AND NOT EXISTS (SELECT FROM audit_events v
                          WHERE v.project_id = d.project_id AND v.update_id = d.update_id)
    ) AS violations ORDER BY 1 LIMIT $1"
    ),
};

const ATTEMPTS: Invariant = Invariant {
    name: "attempts",
    statement: "every attempt belongs to a delivery, attempts are numbered from 1, and every delivered one got a 2xx answer",
    sql: "
    SELECT encode(update_id, 'hex') || '/' || encode(callback_id, 'hex'), fault, count(*) OVER () FROM (
        SELECT d.update_id, d.callback_id,
               format('%s of %s attempts are recorded, the last one has number %s%s', coalesce(a.number, 0), d.attempts,
                      coalesce(a.last, 0),
                      CASE WHEN d.status = 'delivered' AND NOT coalesce(a.taken, false)
                           THEN '; none got a 2xx answer' ELSE '' END) AS fault
        FROM webhooks.deliveries d
        JOIN audit_rows r ON r.update_id = d.update_id AND r.project_id = d.project_id AND r.in_scope
        CROSS JOIN audit_facts f
        LEFT JOIN (SELECT update_id, callback_id, kind, count(*) AS number, min(number) AS first, max(number) AS last,
                          bool_or(status_code BETWEEN 200 AND 299) AS taken
                   FROM webhooks.every_attempt GROUP BY 1, 2, 3) a
            ON a.update_id = d.update_id AND a.callback_id = d.callback_id AND a.kind = d.kind
        WHERE d.update_id >= f.deliveries_since
          AND (coalesce(a.number, 0) <> d.attempts OR coalesce(a.last, 0) <> d.attempts
               OR coalesce(a.first, 1) <> 1 OR d.status = 'delivered' AND NOT coalesce(a.taken, false))
        UNION ALL
        -- Attempts stored in the delivery's own row always have one.
        SELECT a.update_id, a.callback_id, format('attempt %s has no delivery', a.number)
        FROM webhooks.attempts a, audit_facts f
        WHERE f.project_id IS NULL AND (f.from_time IS NULL OR a.started_at >= f.from_time)
          AND (f.to_time IS NULL OR a.started_at < f.to_time) AND a.update_id >= f.deliveries_since
          AND NOT EXISTS (SELECT FROM webhooks.deliveries d
                          WHERE d.update_id = a.update_id AND d.callback_id = a.callback_id AND d.kind = a.kind)
    ) AS violations ORDER BY 1 LIMIT $1",
};

pub(crate) const EXEMPTIONS: [Exemption; 12] = [
    Exemption {
        invariant: "unlogged",
        reason: "the log no longer has the commands of these ledger rows",
        sql: "SELECT count(*) FROM audit_rows r, audit_facts f
         WHERE r.in_scope AND (r.epoch < f.epoch OR r.log_seq < f.log_first)",
    },
    Exemption {
        invariant: "unaccounted",
        reason: "these log entries have neither a ledger row nor a dead letter, but dead letters were removed since",
        sql: unaccounted_entries!("count(*)", "e.logged_at < f.letters_since", ""),
    },
    Exemption {
        invariant: "unlogged",
        reason: "their duplicates were applied; the first entries may be dead letters, but dead letters were removed since",
        sql: "SELECT count(*) FROM audit_rows r, audit_facts f
         WHERE r.in_scope AND r.epoch = f.epoch AND r.log_seq <= f.applied_seq
           AND EXISTS (SELECT FROM audit_entries e
                       WHERE e.kind = 'update' AND e.project_id = r.project_id AND e.update_id = r.update_id
                         AND e.seq < r.log_seq AND e.logged_at < f.letters_since
                         AND NOT EXISTS (SELECT FROM audit_dead_letters l
                                         WHERE l.origin = 'commands' AND l.epoch = f.epoch AND l.seq = e.seq))",
    },
    Exemption {
        invariant: "creation_lost",
        reason: "these leads were created before the last change of their process or before the ledger's months, or were \
                 erased",
        sql: leads_without_creation!("count(*)", "NOT is_certain", ""),
    },
    Exemption {
        invariant: "out_of_order",
        reason: "the updates before these may have been in a month of the ledger that was dropped",
        sql: updates_out_of_order!("count(*)", "may_be_dropped", ""),
    },
    Exemption {
        invariant: "lead_differs",
        reason: "the last updates of these leads may have been in a month of the ledger that was dropped",
        sql: differing_leads!("count(*)", "may_be_dropped", ""),
    },
    Exemption {
        invariant: "undelivered",
        reason: "the callback's configuration has changed since",
        sql: "SELECT count(*) FROM audit_missing_deliveries WHERE verdict = 'changed'",
    },
    Exemption {
        invariant: "undelivered",
        reason: "the month of the delivery log with their ids may have been dropped",
        sql: "SELECT count(*) FROM audit_missing_deliveries WHERE verdict = 'dropped'",
    },
    Exemption {
        invariant: "undelivered",
        reason: "their leads were erased, and with them what the callback's filter compares",
        sql: "SELECT count(*) FROM audit_missing_deliveries WHERE verdict = 'erased'",
    },
    Exemption {
        invariant: "undelivered",
        reason: "their events were purged during the audit; run it again",
        sql: "SELECT count(*) FROM audit_missing_deliveries WHERE verdict = 'overtaken'",
    },
    Exemption {
        invariant: "unfounded",
        reason: "the month of the ledger with their ids may have been dropped",
        sql: deliveries_without_row!("count(*)", "<"),
    },
    Exemption {
        invariant: "attempts",
        reason: "the month of the delivery log with their ids may have been dropped",
        sql: "SELECT count(*) FROM webhooks.deliveries d
         JOIN audit_rows r ON r.update_id = d.update_id AND r.project_id = d.project_id AND r.in_scope, audit_facts f
         WHERE d.update_id < f.deliveries_since",
    },
];

-- The schema lead_state. Only lead-state writes it; no other service reads it. Ids are MongoDB ObjectIds, 12 bytes:
-- encode(lead_id, 'hex') is the form that clients see. A position in the command log is (epoch, sequence, index): the
-- epoch counts the logs, the sequence is the log entry's, the index numbers the updates within one entry and is 0 as
-- long as an entry holds one update.

CREATE TABLE lead_state.projects (
    project_id bytea PRIMARY KEY CHECK (octet_length(project_id) = 12),
    name       text        NOT NULL UNIQUE,
    created_at timestamptz NOT NULL
);

-- Increases with every change of configuration. A row whose projected_revision is less than its revision is not in its
-- NATS bucket yet.
CREATE SEQUENCE lead_state.config_revision;

CREATE TABLE lead_state.processes (
    project_id         bytea  NOT NULL REFERENCES lead_state.projects,
    -- '_' is the project's fallback process: callbacks for updates whose lead is unknown.
    name               text   NOT NULL,
    process_id         bytea  UNIQUE CHECK (octet_length(process_id) = 12),
    -- The process as services read it (contract::process::Process).
    config             json   NOT NULL,
    revision           bigint NOT NULL,
    projected_revision bigint NOT NULL DEFAULT 0,
    -- The last change or projection. Events announced before it may have been delivered by the older configuration.
    changed_at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, name),
    CHECK ((process_id IS NULL) = (name = '_'))
);

CREATE FUNCTION lead_state.set_changed_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed_at := clock_timestamp();
    RETURN NEW;
END $$;
CREATE TRIGGER set_changed_at BEFORE UPDATE ON lead_state.processes
    FOR EACH ROW WHEN (OLD.revision <> NEW.revision OR OLD.projected_revision <> NEW.projected_revision)
    EXECUTE FUNCTION lead_state.set_changed_at();

CREATE TABLE lead_state.api_keys (
    key_id             bytea PRIMARY KEY CHECK (octet_length(key_id) = 12),
    project_id         bytea       NOT NULL REFERENCES lead_state.projects,
    name               text        NOT NULL,
    -- SHA-256 of the key's text, in hex. The key itself is not stored.
    sha256             text        NOT NULL UNIQUE,
    scopes             text[]      NOT NULL,
    created_at         timestamptz NOT NULL,
    expires_at         timestamptz,
    revoked_at         timestamptz,
    revision           bigint      NOT NULL,
    projected_revision bigint      NOT NULL DEFAULT 0
);
CREATE INDEX api_keys_of_project ON lead_state.api_keys (project_id, key_id);

-- No CHECK on the tables that every update writes (leads, lead_updates): Postgres parses their constraints again for
-- every statement, which is a tenth of the cost of a small batch. The batch statement writes ids from twelve bytes and
-- derives `success` from `error`.
CREATE TABLE lead_state.leads (
    lead_id      bytea PRIMARY KEY,
    project_id   bytea       NOT NULL,
    process_id   bytea       NOT NULL REFERENCES lead_state.processes (process_id),
    group_id     text,
    reference_id text,
    name         text,
    phone        text,
    email        text,
    state        text        NOT NULL,
    disposition  text,
    -- json, not jsonb: values stay what the client sent, to the digit, and keys keep their order.
    metadata     json        NOT NULL,
    version      bigint      NOT NULL,
    created_at   timestamptz NOT NULL,
    updated_at   timestamptz NOT NULL
) WITH (fillfactor = 80); -- room for heap-only updates: no indexed column ever changes
-- By hash: 1024 characters can be more bytes than an index row holds.
CREATE UNIQUE INDEX leads_by_reference ON lead_state.leads (process_id, md5(reference_id));
-- Lists a project's leads, newest first.
CREATE INDEX leads_of_project ON lead_state.leads (project_id, lead_id);

-- The ledger: one row per update in the command log. Audit trail, status source and outbox of the completion events.
-- Partitioned by update_id, whose first four bytes are the Unix second at which the id was made.
CREATE TABLE lead_state.lead_updates (
    project_id       bytea       NOT NULL,
    update_id        bytea       NOT NULL,
    log_epoch        int         NOT NULL,
    log_sequence     bigint      NOT NULL,
    log_index        int         NOT NULL,
    logged_at        timestamptz NOT NULL,
    -- The lead's ids if the lead was found, else those that the command named.
    lead_id          bytea,
    process_id       bytea,
    reference_id     text,
    command          json        NOT NULL,
    success          boolean     NOT NULL,
    error            text,
    error_code       text,
    from_state       text,
    to_state         text,
    disposition      text,
    version          bigint,
    user_id          text,
    api_key_id       bytea,
    warnings         text[]      NOT NULL,
    -- The lead's metadata after the merge; null on failure.
    data             json,
    traceparent      text,
    applied_at       timestamptz NOT NULL,
    -- For an update that was queued: the log entry at which it was decided; its event is announced at that position.
    -- Null for an update that was decided at its own log entry.
    decided_epoch    int,
    decided_sequence bigint,
    decided_index    int,
    PRIMARY KEY (project_id, update_id)
) PARTITION BY RANGE (update_id);
CREATE INDEX lead_updates_in_log_order ON lead_state.lead_updates (log_epoch, log_sequence, log_index);
CREATE INDEX lead_updates_of_lead ON lead_state.lead_updates (lead_id, log_epoch, log_sequence, log_index);
CREATE INDEX lead_updates_decided_later ON lead_state.lead_updates (decided_epoch, decided_sequence, decided_index)
    WHERE decided_sequence IS NOT NULL;

-- Takes rows whose month has no partition: producers may give an update any id.
CREATE TABLE lead_state.lead_updates_default PARTITION OF lead_state.lead_updates DEFAULT;

-- Creates the ledger's partitions from the month of first_day to the month of last_day. Rows of such a month in the
-- default partition move to the new one.
CREATE FUNCTION lead_state.ensure_partitions(first_day date, last_day date) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    month date := date_trunc('month', first_day);
    part  text;
    low   bytea;
    high  bytea;
BEGIN
    WHILE month <= last_day LOOP
        part := 'lead_updates_' || to_char(month, 'YYYY_MM');
        IF to_regclass('lead_state.' || part) IS NULL THEN
            -- Inserts wait here, before they are routed: a row already routed to the default partition would violate
            -- its constraint when the month's own partition is attached.
            LOCK TABLE lead_state.lead_updates IN ACCESS EXCLUSIVE MODE;
        END IF;
        IF to_regclass('lead_state.' || part) IS NULL THEN
            -- An ObjectId begins with its Unix second, big-endian: four bytes bound a month.
            low  := decode(lpad(to_hex(extract(epoch FROM month::timestamp AT TIME ZONE 'UTC')::bigint),
                                8, '0'), 'hex');
            high := decode(lpad(to_hex(extract(epoch FROM (month + interval '1 month') AT TIME ZONE 'UTC')::bigint),
                                8, '0'), 'hex');
            EXECUTE format('CREATE TABLE lead_state.%I (LIKE lead_state.lead_updates INCLUDING ALL)', part);
            EXECUTE format(
                'WITH moved AS (DELETE FROM lead_state.lead_updates_default
                                WHERE update_id >= %L AND update_id < %L RETURNING *)
                 INSERT INTO lead_state.%I SELECT * FROM moved', low, high, part);
            EXECUTE format(
                'ALTER TABLE lead_state.lead_updates ATTACH PARTITION lead_state.%I FOR VALUES FROM (%L) TO (%L)',
                part, low, high);
        END IF;
        month := month + interval '1 month';
    END LOOP;
END $$;

-- Drops the ledger's months that ended at or before `cutoff` and whose rows were all applied before it, are announced,
-- and were acknowledged by the webhook-notifier. Returns the dropped partitions. The default partition stays.
CREATE FUNCTION lead_state.drop_partitions(cutoff timestamptz) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    part    text;
    needed  boolean;
    dropped text[] := '{}';
BEGIN
    FOR part IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'lead_state.lead_updates'::regclass AND c.relname ~ '^lead_updates_\d{4}_\d{2}$'
          AND (to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= cutoff
        ORDER BY c.relname
    LOOP
        FOR round IN 1..2 LOOP
            -- Rows are applied in log order, so the last row stands for all of them. Queued updates are decided later
            -- than their log position says; the last decided one stands for those.
            EXECUTE format(
                'SELECT EXISTS (
                     SELECT FROM (
                         (SELECT log_epoch AS epoch, log_sequence AS sequence, log_index AS index, applied_at
                          FROM lead_state.%1$I ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT 1)
                         UNION ALL
                         (SELECT decided_epoch, decided_sequence, decided_index, applied_at FROM lead_state.%1$I
                          WHERE decided_sequence IS NOT NULL
                          ORDER BY decided_epoch DESC, decided_sequence DESC, decided_index DESC LIMIT 1)) AS last
                     WHERE last.applied_at >= $1 OR NOT EXISTS (
                         SELECT FROM lead_state.checkpoints c
                         WHERE (last.epoch, last.sequence, last.index)
                                   <= (c.announced_epoch, c.announced_sequence, c.announced_index)
                           AND (last.epoch, last.sequence, last.index)
                                   <= (c.delivered_epoch, c.delivered_sequence, c.delivered_index)))', part)
            INTO needed USING cutoff;
            EXIT WHEN needed;
            IF round = 1 THEN
                -- Check again under a lock: an update may arrive with an id of any month.
                LOCK TABLE lead_state.lead_updates IN ACCESS EXCLUSIVE MODE;
            END IF;
        END LOOP;
        CONTINUE WHEN needed;
        EXECUTE format('DROP TABLE lead_state.%I', part);
        dropped := dropped || part;
    END LOOP;
    RETURN dropped;
END $$;

-- Fails the statement, and with it everything that the statement wrote, unless the expected number of leads was
-- changed.
CREATE FUNCTION lead_state.require_changed_leads(changed bigint, expected bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF changed <> expected THEN
        RAISE EXCEPTION 'the batch changes % leads, but % exist', expected, changed USING ERRCODE = 'LR001';
    END IF;
    RETURN true;
END $$;

CREATE TABLE lead_state.active_calls (
    lead_id    bytea       NOT NULL REFERENCES lead_state.leads,
    -- Empty if the producer gave no id.
    call_id    text        NOT NULL,
    started_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX active_calls_of_lead ON lead_state.active_calls (lead_id);
CREATE INDEX active_calls_by_expiry ON lead_state.active_calls (expires_at);

-- Updates that wait for the end of a call (duringCall: "queue"). A queued update has no ledger row until it is decided;
-- then it leaves this table in the same transaction. A lead with queued updates has a row in active_calls.
CREATE TABLE lead_state.queued_updates (
    project_id   bytea       NOT NULL,
    update_id    bytea       NOT NULL CHECK (octet_length(update_id) = 12),
    lead_id      bytea       NOT NULL REFERENCES lead_state.leads,
    log_epoch    int         NOT NULL,
    log_sequence bigint      NOT NULL,
    log_index    int         NOT NULL,
    logged_at    timestamptz NOT NULL,
    command      json        NOT NULL,
    traceparent  text,
    PRIMARY KEY (project_id, update_id)
);
CREATE INDEX queued_updates_of_lead ON lead_state.queued_updates (lead_id, log_epoch, log_sequence, log_index);

-- How far a command log is applied, announced and delivered. Moved by compare-and-set only.
CREATE TABLE lead_state.checkpoints (
    stream             text PRIMARY KEY,
    -- The stream's creation time is its identity: another creation time is another log.
    stream_created_at  text        NOT NULL,
    -- The number of recoveries. Events of an older generation say nothing about this checkpoint.
    generation         int         NOT NULL DEFAULT 0,
    -- The last log entry that was applied, and when the log stored it: another time at that position is another log.
    epoch              int         NOT NULL,
    last_sequence      bigint      NOT NULL,
    last_index         int         NOT NULL,
    last_logged_at     timestamptz,
    -- The announce watermark: every event up to here was acknowledged by JetStream. Moving it back announces again.
    announced_epoch    int         NOT NULL,
    announced_sequence bigint      NOT NULL,
    announced_index    int         NOT NULL,
    -- The delivered watermark: every event up to here was acknowledged by the webhook-notifier. Events after it are
    -- announced again when LEAD_EVENTS is lost.
    delivered_epoch    int         NOT NULL,
    delivered_sequence bigint      NOT NULL,
    delivered_index    int         NOT NULL,
    -- The creation time of LEAD_EVENTS.
    events_created_at  text,
    updated_at         timestamptz NOT NULL,
    CHECK (0 <= announced_sequence
           AND (announced_epoch, announced_sequence, announced_index) <= (epoch, last_sequence, last_index))
);

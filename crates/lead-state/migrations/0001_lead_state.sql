-- The lead_state schema: owned by lead-state alone, no other service reads it.
-- Ids are MongoDB ObjectIds, 12 bytes: encode(lead_id, 'hex') is what clients see.

CREATE TABLE lead_state.projects (
    project_id bytea PRIMARY KEY CHECK (octet_length(project_id) = 12),
    name       text        NOT NULL UNIQUE,
    created_at timestamptz NOT NULL
);

-- Grows with every change of configuration. A row whose projected_revision is behind its revision has not
-- reached its NATS bucket yet.
CREATE SEQUENCE lead_state.config_revision;

CREATE TABLE lead_state.processes (
    project_id         bytea  NOT NULL REFERENCES lead_state.projects,
    -- '_' is the project's fallback: callbacks without a process.
    name               text   NOT NULL,
    process_id         bytea  UNIQUE CHECK (octet_length(process_id) = 12),
    -- The process as services see it (contract::process::Process).
    config             json   NOT NULL,
    revision           bigint NOT NULL,
    projected_revision bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (project_id, name),
    CHECK ((process_id IS NULL) = (name = '_'))
);

CREATE TABLE lead_state.api_keys (
    key_id             bytea PRIMARY KEY CHECK (octet_length(key_id) = 12),
    project_id         bytea       NOT NULL REFERENCES lead_state.projects,
    name               text        NOT NULL,
    -- Of the key's text, in hex. The key itself is stored nowhere.
    sha256             text        NOT NULL UNIQUE,
    scopes             text[]      NOT NULL,
    created_at         timestamptz NOT NULL,
    expires_at         timestamptz,
    revoked_at         timestamptz,
    revision           bigint      NOT NULL,
    projected_revision bigint      NOT NULL DEFAULT 0
);
CREATE INDEX api_keys_of_project ON lead_state.api_keys (project_id, key_id);

CREATE TABLE lead_state.leads (
    lead_id      bytea PRIMARY KEY CHECK (octet_length(lead_id) = 12),
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
) WITH (fillfactor = 80); -- room for updates in place: no indexed column changes
-- By hash: 1024 characters can be more bytes than an index row holds.
CREATE UNIQUE INDEX leads_by_reference ON lead_state.leads (process_id, md5(reference_id));

-- The ledger: one row per update in the log. Audit trail, source of the status, and outbox of the completion events
-- in one. Partitioned by update_id, whose first four bytes are the Unix second of its making.
CREATE TABLE lead_state.lead_updates (
    project_id   bytea       NOT NULL,
    update_id    bytea       NOT NULL CHECK (octet_length(update_id) = 12),
    -- Its place in the log; the epoch counts the logs there have been.
    epoch        int         NOT NULL,
    log_seq      bigint      NOT NULL,
    logged_at    timestamptz NOT NULL,
    -- The lead's where it was found, else what the command named.
    lead_id      bytea,
    process_id   bytea,
    reference_id text,
    command      json        NOT NULL,
    success      boolean     NOT NULL,
    error        text,
    error_code   text,
    from_state   text,
    to_state     text,
    disposition  text,
    version      bigint,
    user_id      text,
    api_key_id   bytea,
    warnings     text[]      NOT NULL,
    -- The lead's metadata after the merge; null on failure.
    data         json,
    traceparent  text,
    applied_at   timestamptz NOT NULL,
    PRIMARY KEY (project_id, update_id),
    CHECK (success = (error IS NULL))
) PARTITION BY RANGE (update_id);
CREATE INDEX lead_updates_in_log_order ON lead_state.lead_updates (epoch, log_seq);
CREATE INDEX lead_updates_of_lead ON lead_state.lead_updates (lead_id, epoch, log_seq);

-- Holds what has no month of its own: producers may give an update any id.
CREATE TABLE lead_state.lead_updates_default PARTITION OF lead_state.lead_updates DEFAULT;

-- Makes the ledger's partitions from the month of first_day to the month of last_day. What the default partition
-- holds of a month moves over.
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
            -- Inserts wait here, before they are routed: one that was routed to the default partition already would
            -- violate its constraint when the month's own partition is attached.
            LOCK TABLE lead_state.lead_updates IN ACCESS EXCLUSIVE MODE;
        END IF;
        IF to_regclass('lead_state.' || part) IS NULL THEN
            -- An ObjectId begins with its Unix second, big-endian: four bytes bound a month.
            low  := decode(lpad(to_hex(extract(epoch FROM month::timestamp AT TIME ZONE 'UTC')::bigint), 8, '0'), 'hex');
            high := decode(lpad(to_hex(extract(epoch FROM (month + interval '1 month') AT TIME ZONE 'UTC')::bigint), 8, '0'), 'hex');
            EXECUTE format('CREATE TABLE lead_state.%I (LIKE lead_state.lead_updates INCLUDING ALL)', part);
            EXECUTE format(
                'WITH moved AS (DELETE FROM lead_state.lead_updates_default WHERE update_id >= %L AND update_id < %L RETURNING *)
                 INSERT INTO lead_state.%I SELECT * FROM moved', low, high, part);
            EXECUTE format('ALTER TABLE lead_state.lead_updates ATTACH PARTITION lead_state.%I FOR VALUES FROM (%L) TO (%L)',
                part, low, high);
        END IF;
        month := month + interval '1 month';
    END LOOP;
END $$;

CREATE TABLE lead_state.active_calls (
    lead_id    bytea       NOT NULL REFERENCES lead_state.leads,
    -- Empty where the producer gave no id.
    call_id    text        NOT NULL,
    started_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX active_calls_of_lead ON lead_state.active_calls (lead_id);
CREATE INDEX active_calls_by_expiry ON lead_state.active_calls (expires_at);

-- How far a log was read and announced. Moved by compare-and-set only.
CREATE TABLE lead_state.checkpoints (
    stream            text PRIMARY KEY,
    -- The stream's creation time is its identity: another one is another log.
    stream_created_at text        NOT NULL,
    epoch             int         NOT NULL,
    last_seq          bigint      NOT NULL,
    published_seq     bigint      NOT NULL,
    updated_at        timestamptz NOT NULL,
    CHECK (0 <= published_seq AND published_seq <= last_seq)
);

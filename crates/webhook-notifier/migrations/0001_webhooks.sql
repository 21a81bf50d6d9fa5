-- The schema `webhooks`: the delivery log. Owned by webhook-notifier; no other service reads it. Ids are MongoDB
-- ObjectIds, 12 bytes: clients see encode(update_id, 'hex'). Their first four bytes are the Unix second of their
-- creation, so a range of ids is a range of time.

-- An event of an update on its way to one callback. Without CHECKs on ids, status and payload: Postgres parses them
-- again for every statement, which takes a tenth of a small batch, and they cannot fail: ids are written from twelve
-- bytes, the status from an enumeration.
CREATE TABLE webhooks.deliveries (
    update_id           bytea       NOT NULL,
    callback_id         bytea       NOT NULL,
    -- Which event of the update: 'update' is its completion.
    kind                text        NOT NULL DEFAULT 'update',
    project_id          bytea       NOT NULL,
    -- The process whose configuration contains the callback; null for the project's fallback callbacks.
    process_id          bytea,
    -- pending, delivered or exhausted.
    status              text        NOT NULL,
    -- How many attempts were made.
    attempts            integer     NOT NULL,
    -- How many of them were made before the delivery was requeued: its retry schedule does not count these.
    schedule_offset     integer,
    -- When it is due. A claim moves this beyond the longest attempt: that is the lease. Null while an ordered delivery
    -- waits for the lead's earlier ones.
    next_attempt_at     timestamptz,
    created_at          timestamptz NOT NULL,
    updated_at          timestamptz NOT NULL,
    -- Whether the event about its exhaustion was published.
    exhausted_announced boolean     NOT NULL DEFAULT false,
    traceparent         text,
    last_error          text,
    -- The exact bytes of the request's body. Null once it is delivered, and while it is in `payloads`.
    payload             text,
    -- Attempt 1, if the endpoint accepted it: most deliveries then write no row in `attempts`. Null where attempt 1
    -- failed or is in `attempts`. Nulls take no space.
    first_started_at    timestamptz,
    first_duration_ms   integer,
    first_status_code   integer,
    -- Only of callbacks with `ordering: "lead"`: the lead whose deliveries are ordered,
    lead_id             bytea,
    -- the delivery's position among them: log position and event sequence, big-endian, so that bytes compare like
    -- numbers,
    order_key           bytea,
    -- and its event: the identity of the stream, and the sequence in it.
    event_stream        text,
    event_sequence      bigint,
    PRIMARY KEY (update_id, callback_id, kind),
    CONSTRAINT deliveries_due CHECK (
        CASE WHEN status <> 'pending' THEN next_attempt_at IS NULL
             ELSE next_attempt_at IS NOT NULL OR lead_id IS NOT NULL END)
) PARTITION BY RANGE (update_id);

-- The due deliveries of a callback, oldest first. Skipping through its first column finds all callbacks with pending
-- deliveries.
CREATE INDEX deliveries_pending ON webhooks.deliveries (callback_id, next_attempt_at) WHERE status = 'pending';
-- The undelivered deliveries of a project by time. A delivery that succeeds at once is never in it.
CREATE INDEX deliveries_undelivered ON webhooks.deliveries (project_id, status, update_id, callback_id)
    WHERE status <> 'delivered';
-- The pending ordered deliveries of a lead to a callback, in their order.
CREATE INDEX deliveries_ordered ON webhooks.deliveries (callback_id, lead_id, order_key)
    WHERE status = 'pending' AND lead_id IS NOT NULL;
CREATE INDEX deliveries_to_announce ON webhooks.deliveries (update_id, callback_id)
    WHERE status = 'exhausted' AND NOT exhausted_announced;

-- The bodies that are too long for a row of `deliveries`: once per update, however many deliveries wait. A row stays until
-- all deliveries of the update that were recorded are delivered.
CREATE TABLE webhooks.payloads (
    update_id bytea NOT NULL,
    kind      text  NOT NULL DEFAULT 'update',
    payload   text  NOT NULL,
    PRIMARY KEY (update_id, kind)
) PARTITION BY RANGE (update_id);

-- One request to a callback, unless it is in its delivery's row.
CREATE TABLE webhooks.attempts (
    update_id   bytea       NOT NULL,
    callback_id bytea       NOT NULL,
    kind        text        NOT NULL DEFAULT 'update',
    number      integer     NOT NULL,
    started_at  timestamptz NOT NULL,
    duration_ms integer     NOT NULL,
    -- Null without a response.
    status_code integer,
    -- Null if the endpoint accepted it.
    error       text,
    -- The first bytes of the response's body, of failed attempts.
    response    text,
    PRIMARY KEY (update_id, callback_id, kind, number)
) PARTITION BY RANGE (update_id);

-- All attempts, from both tables.
CREATE VIEW webhooks.every_attempt AS
    SELECT update_id, callback_id, kind, number, started_at, duration_ms, status_code, error, response
    FROM webhooks.attempts
    UNION ALL
    SELECT update_id, callback_id, kind, 1, first_started_at, first_duration_ms, first_status_code, NULL::text, NULL::text
    FROM webhooks.deliveries
    WHERE first_started_at IS NOT NULL;

-- Callbacks that were disabled because of their endpoint's responses. The row stays when the callback is enabled again.
CREATE TABLE webhooks.callback_health (
    callback_id        bytea PRIMARY KEY CHECK (octet_length(callback_id) = 12),
    project_id         bytea       NOT NULL CHECK (octet_length(project_id) = 12),
    process_id         bytea       CHECK (octet_length(process_id) = 12),
    disabled_at        timestamptz NOT NULL,
    reason             text        NOT NULL,
    -- Null while it is disabled.
    enabled_at         timestamptz,
    -- Whether the event about its disabling was published.
    disabled_announced boolean     NOT NULL DEFAULT false
);
CREATE INDEX callback_health_disabled ON webhooks.callback_health (callback_id) WHERE enabled_at IS NULL;
CREATE INDEX callback_health_to_announce ON webhooks.callback_health (callback_id) WHERE NOT disabled_announced;

-- Callbacks with nothing but failures, and since when. The first success deletes the row.
CREATE TABLE webhooks.callback_failures (
    callback_id   bytea PRIMARY KEY CHECK (octet_length(callback_id) = 12),
    failing_since timestamptz NOT NULL
);

-- Events whose process cannot be read in its bucket. Once it can, their deliveries are recorded and the row is deleted.
CREATE TABLE webhooks.parked_events (
    -- The identity of the stream, and the sequence in it.
    event_stream   text        NOT NULL,
    event_sequence bigint      NOT NULL,
    project_id     bytea       NOT NULL,
    -- Empty for an event without a process, which belongs to the project's fallback callbacks.
    process_id     bytea       NOT NULL,
    update_id      bytea       NOT NULL,
    -- As in `deliveries`: a later ordered delivery of the lead waits while the event is parked.
    lead_id        bytea,
    order_key      bytea,
    published_at   timestamptz NOT NULL,
    parked_at      timestamptz NOT NULL,
    -- Until then, a notifier that records its deliveries has it alone.
    claimed_until  timestamptz,
    reason         text        NOT NULL,
    traceparent    text,
    -- The exact bytes of the event.
    payload        text        NOT NULL,
    PRIMARY KEY (event_stream, event_sequence)
);
CREATE INDEX parked_events_process ON webhooks.parked_events (project_id, process_id, event_stream, event_sequence);
CREATE INDEX parked_events_update ON webhooks.parked_events (update_id);
CREATE INDEX parked_events_lead ON webhooks.parked_events (lead_id, order_key) WHERE lead_id IS NOT NULL;

-- Ids outside all months that have a partition, e.g. ids that a producer made up.
CREATE TABLE webhooks.deliveries_default PARTITION OF webhooks.deliveries DEFAULT;
CREATE TABLE webhooks.payloads_default PARTITION OF webhooks.payloads DEFAULT;
CREATE TABLE webhooks.attempts_default PARTITION OF webhooks.attempts DEFAULT;

-- The first four bytes of the ids of this second.
CREATE FUNCTION webhooks.id_prefix(at timestamptz) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT substring(int8send(extract(epoch FROM at)::bigint) FROM 5 FOR 4)
$$;

-- Creates the monthly partitions (UTC) from the month of `since` to the month of `until`, and moves rows of such a
-- month out of the default partition. Returns how many partitions were created.
CREATE FUNCTION webhooks.ensure_partitions(since timestamptz, until timestamptz) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    month    timestamp := date_trunc('month', since AT TIME ZONE 'UTC');
    parent   text;
    part     text;
    from_id  bytea;
    to_id    bytea;
    created  integer := 0;
BEGIN
    -- One replica at a time.
    PERFORM pg_advisory_xact_lock(hashtext('webhooks.ensure_partitions'));
    WHILE month <= until AT TIME ZONE 'UTC' LOOP
        from_id := webhooks.id_prefix(month AT TIME ZONE 'UTC');
        to_id := webhooks.id_prefix((month + interval '1 month') AT TIME ZONE 'UTC');
        FOREACH parent IN ARRAY ARRAY['deliveries', 'payloads', 'attempts'] LOOP
            part := parent || to_char(month, '_YYYY_MM');
            IF to_regclass('webhooks.' || part) IS NULL THEN
                -- The strongest lock first, which avoids deadlocks with transactions that wait for it; and on the
                -- parent, so that no insert is routed to the default partition while the month is attached.
                EXECUTE format('LOCK TABLE webhooks.%I IN ACCESS EXCLUSIVE MODE', parent);
                EXECUTE format('CREATE TABLE webhooks.%I (LIKE webhooks.%I INCLUDING ALL)', part, parent);
                EXECUTE format(
                    'WITH moved AS (DELETE FROM webhooks.%I WHERE update_id >= %L AND update_id < %L RETURNING *)
                     INSERT INTO webhooks.%I SELECT * FROM moved', parent || '_default', from_id, to_id, part);
                EXECUTE format('ALTER TABLE webhooks.%I ATTACH PARTITION webhooks.%I FOR VALUES FROM (%L) TO (%L)',
                    parent, part, from_id, to_id);
                created := created + 1;
            END IF;
        END LOOP;
        month := month + interval '1 month';
    END LOOP;
    RETURN created;
END
$$;

-- Drops the months that ended at or before `cutoff` and have no work left: no delivery is pending, and every exhausted
-- one is announced. Returns the dropped months. Rows in the default partitions stay.
CREATE FUNCTION webhooks.drop_partitions(cutoff timestamptz) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    month   text;
    needed  boolean;
    dropped text[] := '{}';
BEGIN
    -- One replica at a time, also with those that create partitions.
    PERFORM pg_advisory_xact_lock(hashtext('webhooks.ensure_partitions'));
    FOR month IN
        SELECT right(c.relname, 7) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'webhooks.deliveries'::regclass AND c.relname ~ '^deliveries_\d{4}_\d{2}$'
          AND (to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= cutoff
        ORDER BY c.relname
    LOOP
        FOR round IN 1..2 LOOP
            EXECUTE format(
                'SELECT EXISTS (SELECT FROM webhooks.%1$I WHERE status = ''pending'')
                     OR EXISTS (SELECT FROM webhooks.%1$I WHERE status = ''exhausted'' AND NOT exhausted_announced)',
                'deliveries_' || month)
            INTO needed;
            EXIT WHEN needed;
            IF round = 1 THEN
                -- Checked again under the lock: an old delivery may be requeued.
                LOCK TABLE webhooks.deliveries, webhooks.payloads, webhooks.attempts IN ACCESS EXCLUSIVE MODE;
            END IF;
        END LOOP;
        CONTINUE WHEN needed;
        EXECUTE format('DROP TABLE webhooks.%I', 'deliveries_' || month);
        EXECUTE format('DROP TABLE IF EXISTS webhooks.%I', 'payloads_' || month);
        EXECUTE format('DROP TABLE IF EXISTS webhooks.%I', 'attempts_' || month);
        dropped := dropped || month;
    END LOOP;
    RETURN dropped;
END $$;

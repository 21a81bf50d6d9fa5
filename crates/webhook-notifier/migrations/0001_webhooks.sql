-- The webhooks schema: owned by webhook-notifier alone, no other service reads it.
-- Ids are MongoDB ObjectIds, 12 bytes: encode(update_id, 'hex') is what clients see. Their first four bytes are the
-- Unix second of their making, so a range of ids is a range of time.

-- A completion event on its way to one callback.
CREATE TABLE webhooks.deliveries (
    update_id           bytea       NOT NULL CHECK (octet_length(update_id) = 12),
    callback_id         bytea       NOT NULL CHECK (octet_length(callback_id) = 12),
    project_id          bytea       NOT NULL CHECK (octet_length(project_id) = 12),
    -- The process in whose configuration the callback stands; null for the project's fallback callbacks.
    process_id          bytea       CHECK (octet_length(process_id) = 12),
    status              text        NOT NULL CHECK (status IN ('pending', 'delivered', 'exhausted')),
    -- How often it was tried.
    attempts            integer     NOT NULL,
    -- When it is due. Claiming a delivery moves this past the longest attempt: that is the lease.
    next_attempt_at     timestamptz CHECK ((next_attempt_at IS NOT NULL) = (status = 'pending')),
    created_at          timestamptz NOT NULL,
    updated_at          timestamptz NOT NULL,
    -- Whether the event that it is exhausted was published.
    exhausted_announced boolean     NOT NULL DEFAULT false,
    traceparent         text,
    -- What went wrong the last time.
    last_error          text,
    -- The exact bytes of the body; not kept once they were delivered.
    payload             text        CHECK ((payload IS NULL) = (status = 'delivered')),
    PRIMARY KEY (update_id, callback_id)
) PARTITION BY RANGE (update_id);

-- What is due for a callback, oldest first; its first column is skipped through to find who has anything due at all.
CREATE INDEX deliveries_pending ON webhooks.deliveries (callback_id, next_attempt_at) WHERE status = 'pending';
CREATE INDEX deliveries_to_announce ON webhooks.deliveries (update_id, callback_id)
    WHERE status = 'exhausted' AND NOT exhausted_announced;

-- One POST to a callback.
CREATE TABLE webhooks.attempts (
    update_id   bytea       NOT NULL,
    callback_id bytea       NOT NULL,
    number      integer     NOT NULL,
    started_at  timestamptz NOT NULL,
    duration_ms integer     NOT NULL,
    status_code integer,
    -- What went wrong; null when the endpoint took it.
    error       text,
    -- The first bytes of the answer's body, of attempts that failed.
    response    text,
    PRIMARY KEY (update_id, callback_id, number)
) PARTITION BY RANGE (update_id);

-- Callbacks that were disabled because of what their endpoint answered. A row stays when its callback is enabled again.
CREATE TABLE webhooks.callback_health (
    callback_id        bytea PRIMARY KEY CHECK (octet_length(callback_id) = 12),
    project_id         bytea       NOT NULL CHECK (octet_length(project_id) = 12),
    process_id         bytea       CHECK (octet_length(process_id) = 12),
    disabled_at        timestamptz NOT NULL,
    reason             text        NOT NULL,
    -- Null while it is disabled.
    enabled_at         timestamptz,
    -- Whether the event that it was disabled was published.
    disabled_announced boolean     NOT NULL DEFAULT false
);
CREATE INDEX callback_health_disabled ON webhooks.callback_health (callback_id) WHERE enabled_at IS NULL;
CREATE INDEX callback_health_to_announce ON webhooks.callback_health (callback_id) WHERE NOT disabled_announced;

-- Ids of other times than those that have a partition, e.g. ones that a producer made up.
CREATE TABLE webhooks.deliveries_default PARTITION OF webhooks.deliveries DEFAULT;
CREATE TABLE webhooks.attempts_default PARTITION OF webhooks.attempts DEFAULT;

-- The smallest id of this second, as a prefix.
CREATE FUNCTION webhooks.id_prefix(at timestamptz) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT substring(int8send(extract(epoch FROM at)::bigint) FROM 5 FOR 4)
$$;

-- Makes the monthly partitions (UTC) from the one of `since` to the one of `until`; rows of such a month that went to the
-- default partition before move along. Returns how many partitions were made.
CREATE FUNCTION webhooks.ensure_partitions(since timestamptz, until timestamptz) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    month    timestamp := date_trunc('month', since AT TIME ZONE 'UTC');
    parent   text;
    part     text;
    from_id  bytea;
    to_id    bytea;
    made     integer := 0;
BEGIN
    -- One at a time, whichever replica asks.
    PERFORM pg_advisory_xact_lock(hashtext('webhooks.ensure_partitions'));
    WHILE month <= until AT TIME ZONE 'UTC' LOOP
        from_id := webhooks.id_prefix(month AT TIME ZONE 'UTC');
        to_id := webhooks.id_prefix((month + interval '1 month') AT TIME ZONE 'UTC');
        FOREACH parent IN ARRAY ARRAY['deliveries', 'attempts'] LOOP
            part := parent || to_char(month, '_YYYY_MM');
            IF to_regclass('webhooks.' || part) IS NULL THEN
                -- The strongest lock first, so that nobody who waits for it holds what this needs next; and of the
                -- whole table, so that no insert is routed to the default partition while its month is attached.
                EXECUTE format('LOCK TABLE webhooks.%I IN ACCESS EXCLUSIVE MODE', parent);
                EXECUTE format('CREATE TABLE webhooks.%I (LIKE webhooks.%I INCLUDING ALL)', part, parent);
                EXECUTE format(
                    'WITH moved AS (DELETE FROM webhooks.%I WHERE update_id >= %L AND update_id < %L RETURNING *)
                     INSERT INTO webhooks.%I SELECT * FROM moved', parent || '_default', from_id, to_id, part);
                EXECUTE format('ALTER TABLE webhooks.%I ATTACH PARTITION webhooks.%I FOR VALUES FROM (%L) TO (%L)',
                    parent, part, from_id, to_id);
                made := made + 1;
            END IF;
        END LOOP;
        month := month + interval '1 month';
    END LOOP;
    RETURN made;
END
$$;

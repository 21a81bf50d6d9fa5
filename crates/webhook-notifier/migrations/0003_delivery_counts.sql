-- Exact statistics: how attempts and deliveries ended, written by the statement that records them.

CREATE TABLE webhooks.delivery_counts (
    project_id       bytea       NOT NULL,
    -- The minute in which the attempts started (every_attempt.started_at) or deliveries were exhausted
    -- (deliveries.exhausted_at).
    minute           timestamptz NOT NULL,
    callback_id      bytea       NOT NULL,
    -- As deliveries.kind.
    kind             text        NOT NULL,
    -- The month (UTC) of the update ids: that of the partition of the deliveries. Counts are compared with deliveries, and
    -- kept, as long as this partition exists.
    id_month         date        NOT NULL,
    -- The server process of the session that counted. Each session has rows of its own, so no notifier waits until
    -- another one has committed.
    writer           integer     NOT NULL,
    -- Empty for fallback callbacks.
    process_id       bytea       NOT NULL,
    -- Attempts that the endpoint accepted, by their duration: at most 100 ms, 1 s, 10 s, or longer.
    delivered_100ms  bigint      NOT NULL,
    delivered_1s     bigint      NOT NULL,
    delivered_10s    bigint      NOT NULL,
    delivered_longer bigint      NOT NULL,
    -- Attempts that failed.
    failed           bigint      NOT NULL,
    -- Deliveries that were exhausted; again for one that was requeued and exhausted again.
    exhausted        bigint      NOT NULL,
    PRIMARY KEY (project_id, minute, callback_id, kind, id_month, writer)
) WITH (fillfactor = 80); -- room for heap-only updates: no indexed column ever changes
-- Finds what is older than the retention.
CREATE INDEX delivery_counts_by_minute ON webhooks.delivery_counts (minute);

-- When the delivery was exhausted, each time; null if never, and where the version before recorded it. Nulls take no space.
ALTER TABLE webhooks.deliveries ADD COLUMN exhausted_at timestamptz[];
-- Whether delivery_counts counts the attempt in the delivery's row. Attempts of the version before are not counted.
ALTER TABLE webhooks.deliveries ADD COLUMN first_counted boolean;
-- Whether delivery_counts counts it.
ALTER TABLE webhooks.attempts ADD COLUMN counted boolean NOT NULL DEFAULT false;

CREATE OR REPLACE VIEW webhooks.every_attempt AS
    SELECT update_id, callback_id, kind, number, started_at, duration_ms, status_code, error, response, counted
    FROM webhooks.attempts
    UNION ALL
    SELECT update_id, callback_id, kind, 1, first_started_at, first_duration_ms, first_status_code, NULL::text, NULL::text,
           coalesce(first_counted, false)
    FROM webhooks.deliveries
    WHERE first_started_at IS NOT NULL;

-- Deletes counts of minutes before `cutoff` whose month of the delivery log was dropped.
CREATE FUNCTION webhooks.delete_counts(cutoff timestamptz) RETURNS bigint LANGUAGE sql AS $$
    WITH deleted AS (
        DELETE FROM webhooks.delivery_counts
        WHERE minute < cutoff AND to_regclass('webhooks.deliveries_' || to_char(id_month, 'YYYY_MM')) IS NULL
        RETURNING 1)
    SELECT count(*) FROM deleted
$$;

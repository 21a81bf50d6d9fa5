-- Callbacks that are paused: their deliveries are recorded and wait. Resuming a callback deletes its row.
CREATE TABLE webhooks.paused_callbacks (
    callback_id bytea       PRIMARY KEY CHECK (octet_length(callback_id) = 12),
    paused_at   timestamptz NOT NULL
);

-- The oldest pending delivery of a callback, however many wait.
CREATE INDEX deliveries_pending_by_age ON webhooks.deliveries (callback_id, created_at) WHERE status = 'pending';

-- The month (UTC) of an id.
CREATE FUNCTION webhooks.id_month(id bytea) RETURNS date LANGUAGE sql IMMUTABLE AS $$
    SELECT date_trunc('month', to_timestamp(('x' || encode(substring(id FROM 1 FOR 4), 'hex'))::bit(32)::bigint)
                               AT TIME ZONE 'UTC')::date
$$;

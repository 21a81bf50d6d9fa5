-- Operational events: callbacks that fail, are disabled or recover, and exhausted deliveries, for the owner of the project.

-- Whether the event callback.failing was recorded of this series of failures.
ALTER TABLE webhooks.callback_failures ADD COLUMN failing_recorded boolean NOT NULL DEFAULT false;

-- Events whose deliveries are not recorded yet. Written in the transaction that records what happened.
CREATE TABLE webhooks.operational_events (
    event_id      bytea       PRIMARY KEY,
    -- The callback that it happened to.
    callback_id   bytea       NOT NULL,
    -- As deliveries.kind.
    kind          text        NOT NULL,
    occurred_at   timestamptz NOT NULL,
    reason        text,
    failing_since timestamptz
);
CREATE INDEX operational_events_by_time ON webhooks.operational_events (occurred_at);

-- Exhausted deliveries that no event delivery.exhausted has reported yet, by callback.
CREATE TABLE webhooks.exhausted_deliveries (
    callback_id    bytea       PRIMARY KEY,
    deliveries     bigint      NOT NULL,
    -- The last one of them, and why it is exhausted.
    last_update_id bytea       NOT NULL,
    last_kind      text        NOT NULL,
    last_error     text,
    -- When the next event may report them: at once after a quiet interval.
    due_at         timestamptz NOT NULL
);
CREATE INDEX exhausted_deliveries_due ON webhooks.exhausted_deliveries (due_at);

-- A new ObjectId.
CREATE FUNCTION webhooks.new_id(at timestamptz) RETURNS bytea LANGUAGE sql VOLATILE AS $$
    SELECT webhooks.id_prefix(at) || substring(uuid_send(gen_random_uuid()) FROM 9 FOR 8)
$$;

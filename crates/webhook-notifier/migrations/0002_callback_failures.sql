-- Callbacks whose attempts have all failed, and since when. The row goes with the first success; how it is with an endpoint
-- that answers stands nowhere.
CREATE TABLE webhooks.callback_failures (
    callback_id   bytea PRIMARY KEY CHECK (octet_length(callback_id) = 12),
    failing_since timestamptz NOT NULL
);

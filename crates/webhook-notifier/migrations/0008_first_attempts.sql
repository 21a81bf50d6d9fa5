-- The first attempt of a delivery, when the endpoint took it, stands in the delivery's own row: most deliveries then write no
-- other. Every other attempt stands in webhooks.attempts, and so does what was recorded before.
ALTER TABLE webhooks.deliveries
    -- Null where attempt 1 failed, was not made yet, or stands in webhooks.attempts. Null costs a row nothing.
    ADD COLUMN first_started_at  timestamptz,
    ADD COLUMN first_duration_ms integer,
    ADD COLUMN first_status_code integer;

-- All attempts, wherever they stand: what readers read.
CREATE VIEW webhooks.every_attempt AS
    SELECT update_id, callback_id, number, started_at, duration_ms, status_code, error, response
    FROM webhooks.attempts
    UNION ALL
    SELECT update_id, callback_id, 1, first_started_at, first_duration_ms, first_status_code, NULL::text, NULL::text
    FROM webhooks.deliveries
    WHERE first_started_at IS NOT NULL;

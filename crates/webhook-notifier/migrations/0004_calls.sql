-- Deliveries of callbacks with an order: a lead's next one waits for the one before. One that waits for its turn is pending and
-- has no time.
ALTER TABLE webhooks.deliveries
    -- Whose turn it waits for; null for a callback without an order.
    ADD COLUMN lead_id      bytea,
    -- Where its event comes among the lead's: position and sequence, big-endian, so that bytes compare as they do.
    ADD COLUMN place        bytea,
    -- The stream that its event is in, and the event's sequence there.
    ADD COLUMN event_stream text,
    ADD COLUMN event_seq    bigint;

-- The one about next_attempt_at and status.
ALTER TABLE webhooks.deliveries DROP CONSTRAINT deliveries_check;
ALTER TABLE webhooks.deliveries
    ADD CONSTRAINT deliveries_due CHECK (
        CASE WHEN status <> 'pending' THEN next_attempt_at IS NULL
             ELSE next_attempt_at IS NOT NULL OR lead_id IS NOT NULL END) NOT VALID;

-- A lead's pending deliveries to a callback, in their order. Deliveries without an order are not in it.
CREATE INDEX deliveries_in_order ON webhooks.deliveries (callback_id, lead_id, place)
    WHERE status = 'pending' AND lead_id IS NOT NULL;

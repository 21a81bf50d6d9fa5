-- Erased leads whose deliveries still have content. It is erased once all earlier events are recorded.
CREATE TABLE webhooks.pending_erasures (
    lead_id        bytea       PRIMARY KEY,
    project_id     bytea       NOT NULL,
    -- The erasure. The updates before it in the lead's history are erased.
    update_id      bytea       NOT NULL,
    -- Its event: the identity of the stream, and the sequence in it.
    event_stream   text        NOT NULL,
    event_sequence bigint      NOT NULL,
    -- Not before this time. A notifier that erases the lead moves it, and has the erasure alone until then.
    due_at         timestamptz NOT NULL
);

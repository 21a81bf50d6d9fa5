-- What it takes to notice, and to mend, that Postgres or NATS was set back to an older state.

ALTER TABLE lead_state.checkpoints
    -- When the log stored the last entry that was applied: another time at that place means another log.
    ADD COLUMN last_logged_at    timestamptz,
    -- How often an operator recovered. Events of an older generation say nothing about this checkpoint.
    ADD COLUMN generation        int    NOT NULL DEFAULT 0,
    -- The epoch that published_seq belongs to: moving both back announces again.
    ADD COLUMN published_epoch   int    NOT NULL DEFAULT 1,
    -- Everything up to here was acked by the webhook-notifier. What is behind it is announced again when LEAD_EVENTS
    -- was lost.
    ADD COLUMN told_epoch        int    NOT NULL DEFAULT 0,
    ADD COLUMN told_seq          bigint NOT NULL DEFAULT 0,
    -- The identity of LEAD_EVENTS: when it was created.
    ADD COLUMN events_created_at text;
UPDATE lead_state.checkpoints SET published_epoch = epoch;
ALTER TABLE lead_state.checkpoints
    DROP CONSTRAINT checkpoints_check,
    ADD CHECK (0 <= published_seq AND (published_epoch < epoch OR published_epoch = epoch AND published_seq <= last_seq));

-- When a process last changed, its projection included. What was told before may have been told by its configuration
-- of that time.
ALTER TABLE lead_state.processes ADD COLUMN changed_at timestamptz NOT NULL DEFAULT now();

CREATE FUNCTION lead_state.note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed_at := clock_timestamp();
    RETURN NEW;
END $$;
CREATE TRIGGER note_change BEFORE UPDATE ON lead_state.processes
    FOR EACH ROW WHEN (OLD.revision <> NEW.revision OR OLD.projected_revision <> NEW.projected_revision)
    EXECUTE FUNCTION lead_state.note_change();

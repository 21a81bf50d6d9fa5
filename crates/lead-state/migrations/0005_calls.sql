-- Updates that wait until no call with their lead is in progress (duringCall: queue). They have no row in the ledger
-- until they are decided; then they leave this table in the same transaction. A lead of which something is here has a row
-- in active_calls.
CREATE TABLE lead_state.held_updates (
    project_id  bytea       NOT NULL,
    update_id   bytea       NOT NULL CHECK (octet_length(update_id) = 12),
    lead_id     bytea       NOT NULL REFERENCES lead_state.leads,
    -- Its place in the log; the epoch counts the logs there have been.
    epoch       int         NOT NULL,
    log_seq     bigint      NOT NULL,
    logged_at   timestamptz NOT NULL,
    command     json        NOT NULL,
    traceparent text,
    PRIMARY KEY (project_id, update_id)
);
CREATE INDEX held_updates_of_lead ON lead_state.held_updates (lead_id, epoch, log_seq);

ALTER TABLE lead_state.lead_updates
    -- Of an update that was held: the log entry at which it was decided, which announces it. Null: at its own.
    ADD COLUMN decided_epoch int,
    ADD COLUMN decided_seq   bigint;
CREATE INDEX lead_updates_decided_later ON lead_state.lead_updates (decided_epoch, decided_seq)
    WHERE decided_seq IS NOT NULL;

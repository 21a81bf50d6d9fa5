-- Exact statistics: how many ledger rows there are, written by the statement that writes the rows.

CREATE TABLE lead_state.update_counts (
    project_id bytea       NOT NULL,
    -- The minute in which the log stored the commands (lead_updates.logged_at).
    minute     timestamptz NOT NULL,
    -- Empty for updates whose lead is unknown.
    process_id bytea       NOT NULL,
    -- As lead_updates.kind.
    kind       text        NOT NULL,
    -- The error code; empty for what succeeded.
    code       text        NOT NULL,
    -- The month (UTC) of the update ids: that of the ledger's partition. Counts are compared with the ledger, and kept, as
    -- long as this partition exists.
    id_month   date        NOT NULL,
    updates    bigint      NOT NULL,
    PRIMARY KEY (project_id, minute, process_id, kind, code, id_month)
) WITH (fillfactor = 80); -- room for heap-only updates: no indexed column ever changes
-- Finds what is older than the retention.
CREATE INDEX update_counts_by_minute ON lead_state.update_counts (minute);

-- Whether update_counts counts the row. Rows of the version before are not counted.
ALTER TABLE lead_state.lead_updates ADD COLUMN counted boolean NOT NULL DEFAULT false;

-- Deletes counts of minutes before `cutoff` whose month of the ledger was dropped.
CREATE FUNCTION lead_state.delete_counts(cutoff timestamptz) RETURNS bigint LANGUAGE sql AS $$
    WITH deleted AS (
        DELETE FROM lead_state.update_counts
        WHERE minute < cutoff
          AND to_regclass('lead_state.lead_updates_' || to_char(id_month, 'YYYY_MM')) IS NULL
        RETURNING 1)
    SELECT count(*) FROM deleted
$$;

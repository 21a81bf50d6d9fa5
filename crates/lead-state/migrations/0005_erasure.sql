-- Leads can be erased: their ids, state, codes and times remain.

-- When the lead was erased. Its texts are null then, and its metadata is empty.
ALTER TABLE lead_state.leads ADD COLUMN erased_at timestamptz;

-- Erased leads whose ledger rows still have content. The leader erases it in steps, once the erasure is announced.
CREATE TABLE lead_state.pending_erasures (
    lead_id      bytea  PRIMARY KEY REFERENCES lead_state.leads,
    project_id   bytea  NOT NULL,
    -- The log entry of the erasure. Rows of later entries have no content.
    log_epoch    int    NOT NULL,
    log_sequence bigint NOT NULL,
    log_index    int    NOT NULL
);

-- Failed updates that named a reference of no lead: they are erased with the lead that gets the reference.
CREATE INDEX lead_updates_without_lead ON lead_state.lead_updates (project_id, md5(reference_id))
    WHERE lead_id IS NULL AND reference_id IS NOT NULL;

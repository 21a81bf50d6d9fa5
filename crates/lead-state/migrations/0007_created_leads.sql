-- Callbacks receive the creation of leads (lead.created).

-- What is to be logged of new leads, written by the statement that creates them: the outbox of the commands lead.created.
-- Only leads of processes that have a callback for lead.created have a row. The row is deleted once the creation is in the
-- ledger; until then the leader logs it again.
CREATE TABLE lead_state.created_leads (
    lead_id    bytea       PRIMARY KEY,
    project_id bytea       NOT NULL,
    -- The id of the creation in the ledger.
    update_id  bytea       NOT NULL,
    -- As contract::command::LeadCreated.
    command    json        NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE INDEX created_leads_by_age ON lead_state.created_leads (created_at);

-- Call events have ledger rows, and calls in progress are listed by project.

-- What the row is of: 'update', 'call.started' or 'call.ended'. A call event has neither states nor version nor data.
ALTER TABLE lead_state.lead_updates ADD COLUMN kind text NOT NULL DEFAULT 'update';

-- The project of the lead. Null in rows that the version before wrote since this migration; lists leave those out.
ALTER TABLE lead_state.active_calls ADD COLUMN project_id bytea;
UPDATE lead_state.active_calls c SET project_id = l.project_id FROM lead_state.leads l WHERE l.lead_id = c.lead_id;
-- Lists a project's calls by lead.
CREATE INDEX active_calls_of_project ON lead_state.active_calls (project_id, lead_id, call_id);

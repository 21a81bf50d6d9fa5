-- A project's leads, the newest first. Neither column ever changes, so updates of leads still write no index; initiating
-- one writes one entry more.
CREATE INDEX leads_of_project ON lead_state.leads (project_id, lead_id);

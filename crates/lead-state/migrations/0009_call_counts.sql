-- Calls are counted (POST /api/v1/analytics/customer/stats).

-- What the call counts as, if the row is the end of a call with a result; otherwise null. The sum of 1 for an outgoing call,
-- 2 for a connected one, 4 for an incoming one, 8 for a connected one that brought a disposition or moved the lead to another
-- state, and 16 for one that moved the lead to the state interested or confirmed it. A column, because results are long, and
-- so that calls with erased leads count. Calls before this migration do not count.
ALTER TABLE lead_state.lead_updates ADD COLUMN call_facts smallint;
CREATE INDEX lead_updates_of_calls ON lead_state.lead_updates (project_id, update_id)
    INCLUDE (process_id, lead_id, call_facts) WHERE call_facts IS NOT NULL;

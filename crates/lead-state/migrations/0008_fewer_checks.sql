-- Constraints of the tables that every update writes, which nothing can violate: ids are written from twelve bytes, and whether it went
-- well from whether there is an error. Postgres parses them anew for every statement, which is a tenth of what a
-- small batch takes.
DO $$
DECLARE
    part regclass;
BEGIN
    ALTER TABLE lead_state.leads DROP CONSTRAINT leads_lead_id_check;
    ALTER TABLE lead_state.lead_updates
        DROP CONSTRAINT lead_updates_update_id_check,
        DROP CONSTRAINT lead_updates_check;
    -- A partition that was made by itself and then attached has its own.
    FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'lead_state.lead_updates'::regclass LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS lead_updates_update_id_check,
                                       DROP CONSTRAINT IF EXISTS lead_updates_check', part);
    END LOOP;
END $$;

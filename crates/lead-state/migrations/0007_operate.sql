-- Drops the months of the ledger that ended at or before `cutoff` and that nobody needs any more: their last row was applied
-- before it, is announced, and its event was acked by the webhook-notifier. A month with a later row stays as a whole. Returns
-- what was dropped. What is in the default partition stays.
CREATE FUNCTION lead_state.drop_partitions(cutoff timestamptz) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    part    text;
    needed  boolean;
    dropped text[] := '{}';
BEGIN
    FOR part IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'lead_state.lead_updates'::regclass AND c.relname ~ '^lead_updates_\d{4}_\d{2}$'
          AND (to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= cutoff
        ORDER BY c.relname
    LOOP
        FOR round IN 1..2 LOOP
            -- Rows are applied in the order of the log, so the last one speaks for all; and the last of those that were held, which
            -- were decided later than their place in the log, for those.
            EXECUTE format(
                'SELECT EXISTS (
                     SELECT FROM (
                         (SELECT epoch, log_seq AS seq, applied_at FROM lead_state.%1$I
                          ORDER BY epoch DESC, log_seq DESC LIMIT 1)
                         UNION ALL
                         (SELECT decided_epoch, decided_seq, applied_at FROM lead_state.%1$I WHERE decided_seq IS NOT NULL
                          ORDER BY decided_epoch DESC, decided_seq DESC LIMIT 1)) AS last
                     WHERE last.applied_at >= $1 OR NOT EXISTS (
                         SELECT FROM lead_state.checkpoints c
                         WHERE (last.epoch, last.seq) <= (c.published_epoch, c.published_seq)
                           AND (last.epoch, last.seq) <= (c.told_epoch, c.told_seq)))', part)
            INTO needed USING cutoff;
            EXIT WHEN needed;
            IF round = 1 THEN
                -- And again when nobody can write to it: an update may come under an id of any month.
                LOCK TABLE lead_state.lead_updates IN ACCESS EXCLUSIVE MODE;
            END IF;
        END LOOP;
        CONTINUE WHEN needed;
        EXECUTE format('DROP TABLE lead_state.%I', part);
        dropped := dropped || part;
    END LOOP;
    RETURN dropped;
END $$;

-- Drops the months of the delivery log that ended at or before `cutoff` and in which nothing is left to do: no delivery is
-- pending, and what is exhausted was announced. Returns what was dropped. What is in the default partitions stays.
CREATE FUNCTION webhooks.drop_partitions(cutoff timestamptz) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    month   text;
    needed  boolean;
    dropped text[] := '{}';
BEGIN
    -- One at a time with those that make partitions, whichever replica asks.
    PERFORM pg_advisory_xact_lock(hashtext('webhooks.ensure_partitions'));
    FOR month IN
        SELECT right(c.relname, 7) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'webhooks.deliveries'::regclass AND c.relname ~ '^deliveries_\d{4}_\d{2}$'
          AND (to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= cutoff
        ORDER BY c.relname
    LOOP
        FOR round IN 1..2 LOOP
            EXECUTE format(
                'SELECT EXISTS (SELECT FROM webhooks.%1$I WHERE status = ''pending'')
                     OR EXISTS (SELECT FROM webhooks.%1$I WHERE status = ''exhausted'' AND NOT exhausted_announced)',
                'deliveries_' || month)
            INTO needed;
            EXIT WHEN needed;
            IF round = 1 THEN
                -- And again when nobody can write to it: an old delivery may be made due again.
                LOCK TABLE webhooks.deliveries, webhooks.attempts IN ACCESS EXCLUSIVE MODE;
            END IF;
        END LOOP;
        CONTINUE WHEN needed;
        EXECUTE format('DROP TABLE webhooks.%I', 'deliveries_' || month);
        EXECUTE format('DROP TABLE IF EXISTS webhooks.%I', 'attempts_' || month);
        dropped := dropped || month;
    END LOOP;
    RETURN dropped;
END $$;

-- A delivery that is made again after it was settled begins its schedule anew.

-- The attempts that its schedule does not count: those from before. Null costs a row nothing.
ALTER TABLE webhooks.deliveries ADD COLUMN schedule_from integer;

-- What of a project is not delivered, by time. What is delivered at the first attempt is never in it, so delivering writes
-- nothing more; what has to wait writes one entry more.
CREATE INDEX deliveries_unsettled ON webhooks.deliveries (project_id, status, update_id, callback_id)
    WHERE status <> 'delivered';

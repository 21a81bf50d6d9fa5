-- The process that configures a paused callback, so that the pause ends when the callback is removed from it.

-- Null until a notifier finds the callback in a process: the version before does not write it.
ALTER TABLE webhooks.paused_callbacks ADD COLUMN project_id bytea;
-- Null for the project's fallback callbacks, too.
ALTER TABLE webhooks.paused_callbacks ADD COLUMN process_id bytea;

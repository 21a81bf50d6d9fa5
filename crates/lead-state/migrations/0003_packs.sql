-- A message of the command log may hold many commands.

-- Whether the last applied entry is the last one of its message. If not, a pack is applied in part, and its rest is next.
ALTER TABLE lead_state.checkpoints ADD COLUMN ends_message boolean NOT NULL DEFAULT true;

-- Update ids are unique within a project only, and producers choose theirs: two projects with the same id shared one body.

ALTER TABLE webhooks.payloads ADD COLUMN project_id bytea;
UPDATE webhooks.payloads AS p SET project_id = d.project_id
FROM webhooks.deliveries AS d WHERE d.update_id = p.update_id AND d.kind = p.kind;
-- No delivery refers to the others.
DELETE FROM webhooks.payloads WHERE project_id IS NULL;
ALTER TABLE webhooks.payloads ALTER COLUMN project_id SET NOT NULL;
ALTER TABLE webhooks.payloads DROP CONSTRAINT payloads_pkey;
ALTER TABLE webhooks.payloads ADD PRIMARY KEY (update_id, project_id, kind);
INSERT INTO webhooks.payloads (update_id, project_id, kind, payload)
SELECT DISTINCT p.update_id, d.project_id, p.kind, p.payload
FROM webhooks.payloads AS p JOIN webhooks.deliveries AS d ON d.update_id = p.update_id AND d.kind = p.kind
WHERE d.project_id <> p.project_id AND d.payload IS NULL AND d.status <> 'delivered'
ON CONFLICT DO NOTHING;

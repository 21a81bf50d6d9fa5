-- Searches for leads. An update that changes none of these columns stays heap-only. Bounded, because a text of 1024
-- characters can be more bytes than an index row holds.
CREATE INDEX leads_by_email ON lead_state.leads (project_id, md5(lower(email))) WHERE email IS NOT NULL;
-- By its last digits: people leave the country code out.
CREATE INDEX leads_by_phone ON lead_state.leads
    (project_id, (left(reverse(regexp_replace(phone, '[^0-9]', '', 'g')), 32) COLLATE "C")) WHERE phone IS NOT NULL;
CREATE INDEX leads_by_name ON lead_state.leads (project_id, (left(lower(name), 64) COLLATE "C"))
    WHERE name IS NOT NULL;

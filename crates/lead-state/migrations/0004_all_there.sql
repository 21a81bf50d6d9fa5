-- True when as many leads were changed as were to be; else the statement fails, and with it all that it wrote.
CREATE FUNCTION lead_state.all_there(changed bigint, expected bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF changed <> expected THEN
        RAISE EXCEPTION '% leads to change, % there', expected, changed USING ERRCODE = 'LR001';
    END IF;
    RETURN true;
END $$;

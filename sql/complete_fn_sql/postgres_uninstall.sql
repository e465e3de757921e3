-- Takes everything that postgres_install.sql made out of this database, by a superuser:
--
--   psql -d DATABASE -f postgres_uninstall.sql
--
-- The language plpython3u stays, others may use it (DROP EXTENSION plpython3u). So do the two roles while another
-- database of the server has them. Jobs that were submitted go on in the service.
\set ON_ERROR_STOP on
BEGIN;
SET LOCAL client_min_messages = 'warning';
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['complete_fn_user', 'complete_fn_owner'] LOOP
        IF EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('DROP OWNED BY %I CASCADE', name);
        END IF;
    END LOOP;
    FOREACH name IN ARRAY ARRAY['complete_fn_user', 'complete_fn_owner'] LOOP
        BEGIN
            EXECUTE format('DROP ROLE IF EXISTS %I', name);
        EXCEPTION WHEN dependent_objects_still_exist THEN
            RAISE WARNING 'Role % stays: another database has its objects.', name;
        END;
    END LOOP;
END $$;
COMMIT;

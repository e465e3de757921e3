-- Takes everything that postgres_install.sql made out of this database, by a superuser:
--
--   psql -d DATABASE -f postgres_uninstall.sql
--
-- It fails and changes nothing while other objects use the functions (views, defaults) or are in the schema
-- complete_fn. The language plpython3u stays, others may use it (DROP EXTENSION plpython3u). So do the two roles while
-- they own or may do anything else, in this database or another. Jobs that were submitted go on in the service.
\set ON_ERROR_STOP on
BEGIN;
SET LOCAL client_min_messages = 'warning';
SET LOCAL search_path = pg_catalog, pg_temp;
DO $$
DECLARE
    mine text[] := ARRAY['complete(text,text,jsonb)', 'complete_details(text,text,jsonb)',
        'complete_many(text,text[],jsonb)', 'complete_table(text,text,jsonb)', 'complete_result(text)',
        'complete_submit(text,text,text,jsonb,numeric)', 'complete_progress(text)', 'complete_cancel(text)',
        'complete_usage()'];
    owned_by regrole := to_regrole('complete_fn_owner');
    functions text;
    users text;
BEGIN
    SELECT string_agg(p.oid::regprocedure::text, ', ') INTO functions
    FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE p.proowner = owned_by AND (n.nspname = 'complete_fn'
        OR p.oid IN (SELECT to_regprocedure(format('%I.%s', n.nspname, m)) FROM unnest(mine) AS m));
    IF functions IS NOT NULL THEN
        EXECUTE 'DROP FUNCTION ' || functions || ' RESTRICT';
    END IF;
    IF EXISTS (SELECT FROM pg_namespace WHERE nspname = 'complete_fn' AND nspowner = owned_by) THEN
        DROP TABLE IF EXISTS complete_fn.jobs, complete_fn.service RESTRICT;
        DROP SCHEMA complete_fn RESTRICT;
    END IF;
EXCEPTION WHEN dependent_objects_still_exist THEN
    GET STACKED DIAGNOSTICS users = PG_EXCEPTION_DETAIL;
    RAISE EXCEPTION USING ERRCODE = '2BP01', DETAIL = users,
        MESSAGE = 'Other objects use the functions or are in the schema complete_fn, so nothing was uninstalled.',
        HINT = 'Keep the answers you need (CREATE TABLE ... AS SELECT), drop or move these objects and run it again.';
END $$;
DO $$
DECLARE
    name text;
    owned text;
BEGIN
    FOREACH name IN ARRAY ARRAY['complete_fn_user', 'complete_fn_owner'] LOOP
        BEGIN
            EXECUTE format('DROP ROLE IF EXISTS %I', name);
        EXCEPTION WHEN dependent_objects_still_exist THEN
            GET STACKED DIAGNOSTICS owned = PG_EXCEPTION_DETAIL;
            RAISE WARNING 'Role % stays: %', name, owned;
        END;
    END LOOP;
END $$;
COMMIT;
